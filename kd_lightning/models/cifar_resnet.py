"""Residual networks for 32×32 images (He et al. 2016, section 4.2), as the distillation literature uses them."""

import torch
from torch import Tensor, nn

from kd_lightning.models._layers import blocks_per_stage, check_positive, conv3x3, init_convolutions, residual_stage


class BasicBlock(nn.Module):
    """A residual block of two 3×3 convolutions with batch norm; the shortcut is a 1×1 projection if the shape changes.

    Shapes: ``(N, in_channels, H, W)`` → ``(N, out_channels, H / stride, W / stride)``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the block's output, after its last ReLU."""
        residual = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(inputs)))))
        return torch.relu(residual + self.shortcut(inputs))


class CifarResNet(nn.Module):
    """A residual network of ``6n + 2`` layers in three stages, for small images.

    Shapes: images ``(N, in_channels, H, W)`` → logits ``(N, num_classes)``; the stages ``layer1``, ``layer2`` and
    ``layer3`` give ``widths[1:]`` channels at full, half and quarter resolution (32, 16, 8 for CIFAR).

    | function     | depth | widths           | parameters (100 classes) |
    |--------------|-------|------------------|--------------------------|
    | `resnet20`   | 20    | 16, 16, 32, 64   | 278,324                  |
    | `resnet32`   | 32    | 16, 16, 32, 64   | 472,756                  |
    | `resnet56`   | 56    | 16, 16, 32, 64   | 861,620                  |
    | `resnet110`  | 110   | 16, 16, 32, 64   | 1,736,564                |
    | `resnet8x4`  | 8     | 32, 64, 128, 256 | 1,233,540                |
    | `resnet32x4` | 32    | 32, 64, 128, 256 | 7,433,860                |

    The layout is that of Tian et al. 2020, "Contrastive Representation Distillation", which distillation papers report
    on: its shortcuts are projections with batch norm, where He et al. 2016, "Deep Residual Learning for Image
    Recognition", pad with zeros. Convolutions start Kaiming-normal (fan-out), the classifier as PyTorch's.

    Args:
        depth: Number of layers with weights, ``6n + 2``.
        widths: Channels of the first convolution and of the three stages.
        num_classes: Number of logits.
        in_channels: Channels of the images.

    Raises:
        ValueError: If the depth is not ``6n + 2``, if there are not four widths, or if a number is below 1.

    Example:
        >>> model = CifarResNet(8, widths=(4, 4, 8, 16), num_classes=5)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        depth: int,
        widths: tuple[int, int, int, int] = (16, 16, 32, 64),
        num_classes: int = 100,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        blocks = blocks_per_stage(depth, plain_layers=2, name="CifarResNet")
        check_positive(widths=widths, num_classes=num_classes, in_channels=in_channels)
        if len(widths) != 4:
            raise ValueError(f"widths must hold four numbers (first convolution, three stages), got {widths}.")
        stem, *stages = widths
        self.conv1 = conv3x3(in_channels, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = residual_stage(BasicBlock, stem, stages[0], blocks, stride=1)
        self.layer2 = residual_stage(BasicBlock, stages[0], stages[1], blocks, stride=2)
        self.layer3 = residual_stage(BasicBlock, stages[1], stages[2], blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(stages[2], num_classes)
        init_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``."""
        features = torch.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        return self.fc(self.avgpool(features).flatten(1))


def resnet20(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """Return the resnet20 of Tian et al. 2020, student of resnet56 and resnet110: :class:`CifarResNet` of depth 20."""
    return CifarResNet(20, num_classes=num_classes, in_channels=in_channels)


def resnet32(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """Return the resnet32 of Tian et al. 2020, student of resnet110: :class:`CifarResNet` of depth 32."""
    return CifarResNet(32, num_classes=num_classes, in_channels=in_channels)


def resnet56(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """Return the resnet56 of Tian et al. 2020, a teacher of resnet20: :class:`CifarResNet` of depth 56."""
    return CifarResNet(56, num_classes=num_classes, in_channels=in_channels)


def resnet110(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """Return the resnet110 of Tian et al. 2020, teacher of resnet20 and resnet32: :class:`CifarResNet` of depth 110."""
    return CifarResNet(110, num_classes=num_classes, in_channels=in_channels)


def resnet8x4(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """Return the resnet8x4 of Tian et al. 2020, student of resnet32x4: a wide :class:`CifarResNet` of depth 8."""
    return CifarResNet(8, widths=(32, 64, 128, 256), num_classes=num_classes, in_channels=in_channels)


def resnet32x4(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """Return the resnet32x4 of Tian et al. 2020, teacher of resnet8x4: a wide :class:`CifarResNet` of depth 32."""
    return CifarResNet(32, widths=(32, 64, 128, 256), num_classes=num_classes, in_channels=in_channels)
