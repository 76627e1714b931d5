"""Small networks for scikit-learn's 8×8 digits: a strong teacher and tiny students that train in seconds."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from kd_lightning.models._layers import check_positive, conv3x3, init_convolutions


class DigitsCNN(nn.Module):
    """A convolutional network for 1×8×8 images: the teacher of the digits experiments.

    One 3×3 convolution with batch norm and ReLU per entry of ``channels``, one 2×2 max pooling, one hidden layer.

    Shapes: images ``(N, 1, 8, 8)`` → logits ``(N, num_classes)``; ``features`` gives ``(N, channels[-1], 4, 4)``.

    Args:
        channels: Channels of the convolutions.
        num_classes: Number of logits.
        hidden: Units of the hidden layer.

    Raises:
        ValueError: If ``channels`` is empty, or if a number is below 1.

    Example:
        >>> model = DigitsCNN()
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
        >>> sum(p.numel() for p in model.parameters())
        38330
    """

    def __init__(self, channels: tuple[int, ...] = (16, 32), num_classes: int = 10, hidden: int = 64) -> None:
        super().__init__()
        check_positive(channels=channels, num_classes=num_classes, hidden=hidden)
        if not channels:
            raise ValueError("channels must hold at least one number, got (). Take DigitsMLP for no convolution.")
        layers: list[nn.Module] = []
        for before, after in pairwise((1, *channels)):
            layers += [conv3x3(before, after), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.MaxPool2d(2))
        self.hidden = nn.Linear(channels[-1] * 4 * 4, hidden)
        self.fc = nn.Linear(hidden, num_classes)
        init_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of images ``(N, 1, 8, 8)``."""
        return self.fc(torch.relu(self.hidden(self.features(images).flatten(1))))


class DigitsMLP(nn.Module):
    """A multilayer perceptron for 1×8×8 images: the student of the digits experiments.

    Shapes: images ``(N, 1, 8, 8)`` → logits ``(N, num_classes)``.

    Args:
        hidden: Units of the hidden layers, each followed by ReLU; empty for a linear classifier.
        num_classes: Number of logits.

    Raises:
        ValueError: If a number is below 1.

    Example:
        >>> DigitsMLP(hidden=(8,))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
        >>> sum(p.numel() for p in DigitsMLP(hidden=()).parameters())
        650
    """

    def __init__(self, hidden: tuple[int, ...] = (64,), num_classes: int = 10) -> None:
        super().__init__()
        check_positive(hidden=hidden, num_classes=num_classes)
        layers: list[nn.Module] = []
        for before, after in pairwise((64, *hidden)):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.fc = nn.Linear((64, *hidden)[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of images ``(N, 1, 8, 8)``."""
        return self.fc(self.hidden(images.flatten(1)))
