"""VGG networks for small images, with batch norm and one linear layer on top (Simonyan & Zisserman 2015)."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.models._layers import check_positive, conv3x3, init_convolutions


class VGG(nn.Module):
    """A network of five blocks of 3×3 convolutions with batch norm, max pooling between them, and a linear classifier.

    Shapes: images ``(N, in_channels, H, W)`` with H, W ≥ 8 → logits ``(N, num_classes)``. The blocks ``block0`` to
    ``block4`` run at resolutions 32, 16, 8, 4, 4 for 32×32 images: there is no pooling between ``block3`` and
    ``block4`` unless the images have 64 pixels or more. The last pooling is a global average.

    | function | convolutions per block | widths                  | parameters (100 classes) |
    |----------|------------------------|-------------------------|--------------------------|
    | `vgg8`   | 1                      | 64, 128, 256, 512, 512  | 3,965,028                |
    | `vgg13`  | 2                      | 64, 128, 256, 512, 512  | 9,462,180                |

    Source: Simonyan & Zisserman 2015, "Very Deep Convolutional Networks for Large-Scale Image Recognition", in the
    form of Tian et al. 2020, "Contrastive Representation Distillation". Convolutions start Kaiming-normal (fan-out),
    the classifier normal with standard deviation 0.01, all biases at zero.

    Args:
        convolutions: Number of convolutions in each block.
        widths: Channels of the five blocks.
        num_classes: Number of logits.
        in_channels: Channels of the images.

    Raises:
        ValueError: If there are not five widths, or if a number is below 1.

    Example:
        >>> import torch
        >>> VGG(1, widths=(4, 4, 8, 8, 8), num_classes=5)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        convolutions: int,
        widths: tuple[int, int, int, int, int] = (64, 128, 256, 512, 512),
        num_classes: int = 100,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_positive(convolutions=convolutions, widths=widths, num_classes=num_classes, in_channels=in_channels)
        if len(widths) != 5:
            raise ValueError(f"widths must hold five numbers, one per block, got {widths}.")
        self.block0 = self._block([in_channels, *[widths[0]] * convolutions])
        self.block1 = self._block([widths[0], *[widths[1]] * convolutions])
        self.block2 = self._block([widths[1], *[widths[2]] * convolutions])
        self.block3 = self._block([widths[2], *[widths[3]] * convolutions])
        self.block4 = self._block([widths[3], *[widths[4]] * convolutions])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[4], num_classes)
        init_convolutions(self)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    @staticmethod
    def _block(channels: Sequence[int]) -> nn.Sequential:
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            layers += [conv3x3(before, after, bias=True), nn.BatchNorm2d(after), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``."""
        features = F.max_pool2d(self.block0(images), 2)
        features = F.max_pool2d(self.block1(features), 2)
        features = F.max_pool2d(self.block2(features), 2)
        features = self.block3(features)
        if images.shape[-2] >= 64:
            features = F.max_pool2d(features, 2)
        return self.fc(self.avgpool(self.block4(features)).flatten(1))


def vgg8(num_classes: int = 100, in_channels: int = 3) -> VGG:
    """Return the vgg8 of Tian et al. 2020, student of vgg13: :class:`VGG` with one convolution per block."""
    return VGG(1, num_classes=num_classes, in_channels=in_channels)


def vgg13(num_classes: int = 100, in_channels: int = 3) -> VGG:
    """Return the vgg13 of Tian et al. 2020, teacher of vgg8: :class:`VGG` with two convolutions per block."""
    return VGG(2, num_classes=num_classes, in_channels=in_channels)
