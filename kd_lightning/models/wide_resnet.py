"""Wide residual networks for 32×32 images (Zagoruyko & Komodakis 2016)."""

from functools import partial

import torch
from torch import Tensor, nn

from kd_lightning.models._layers import blocks_per_stage, check_positive, conv3x3, init_convolutions, residual_stage


class PreActivationBlock(nn.Module):
    """A residual block with batch norm and ReLU before each of its two 3×3 convolutions.

    Where the channels change, the shortcut is a 1×1 convolution of the activated input.

    Shapes: ``(N, in_channels, H, W)`` → ``(N, out_channels, H / stride, W / stride)``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.projection: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.projection = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sum of shortcut and residual, not yet activated."""
        activated = torch.relu(self.bn1(inputs))
        residual = self.conv2(self.dropout(torch.relu(self.bn2(self.conv1(activated)))))
        return residual + (inputs if self.projection is None else self.projection(activated))


class WideResNet(nn.Module):
    """A pre-activation residual network of ``6n + 4`` layers whose stages are ``widen_factor`` times as wide.

    Shapes: images ``(N, in_channels, H, W)`` → logits ``(N, num_classes)``; the stages ``block1``, ``block2`` and
    ``block3`` give 16, 32 and 64 times ``widen_factor`` channels at full, half and quarter resolution.

    | function   | depth | widen_factor | parameters (100 classes) |
    |------------|-------|--------------|--------------------------|
    | `wrn_16_2` | 16    | 2            | 703,284                  |
    | `wrn_40_1` | 40    | 1            | 569,780                  |
    | `wrn_40_2` | 40    | 2            | 2,255,156                |

    Source: Zagoruyko & Komodakis 2016, "Wide Residual Networks". Convolutions start Kaiming-normal (fan-out), the
    classifier's bias at zero.

    Args:
        depth: Number of layers with weights, ``6n + 4``.
        widen_factor: Factor on the widths 16, 32 and 64 of the stages.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        dropout: Probability of dropping an activation inside the blocks; the distillation literature uses none.

    Raises:
        ValueError: If the depth is not ``6n + 4``, if a number is below 1, or if the dropout lies outside [0, 1).

    Example:
        >>> WideResNet(10, widen_factor=1, num_classes=5)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        depth: int,
        widen_factor: int = 1,
        num_classes: int = 100,
        in_channels: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        blocks = blocks_per_stage(depth, plain_layers=4, name="WideResNet")
        check_positive(widen_factor=widen_factor, num_classes=num_classes, in_channels=in_channels)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}. The literature's setting is 0.")
        widths = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = conv3x3(in_channels, widths[0])
        block = partial(PreActivationBlock, dropout=dropout)
        self.block1 = residual_stage(block, widths[0], widths[1], blocks, stride=1)
        self.block2 = residual_stage(block, widths[1], widths[2], blocks, stride=2)
        self.block3 = residual_stage(block, widths[2], widths[3], blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``."""
        features = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(self.avgpool(torch.relu(self.bn1(features))).flatten(1))


def wrn_16_2(num_classes: int = 100, in_channels: int = 3, dropout: float = 0.0) -> WideResNet:
    """Return the WRN-16-2 of Zagoruyko & Komodakis 2016, student of wrn_40_2: :class:`WideResNet` of depth 16."""
    return WideResNet(16, 2, num_classes=num_classes, in_channels=in_channels, dropout=dropout)


def wrn_40_1(num_classes: int = 100, in_channels: int = 3, dropout: float = 0.0) -> WideResNet:
    """Return the WRN-40-1 of Zagoruyko & Komodakis 2016, thin student of wrn_40_2: :class:`WideResNet` of depth 40."""
    return WideResNet(40, 1, num_classes=num_classes, in_channels=in_channels, dropout=dropout)


def wrn_40_2(num_classes: int = 100, in_channels: int = 3, dropout: float = 0.0) -> WideResNet:
    """Return the WRN-40-2 of Zagoruyko & Komodakis 2016, teacher of the other two: :class:`WideResNet` of depth 40."""
    return WideResNet(40, 2, num_classes=num_classes, in_channels=in_channels, dropout=dropout)
