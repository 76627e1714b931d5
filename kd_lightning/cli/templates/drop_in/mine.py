"""A module that knows nothing of distillation, and a temperature; the configurations name both."""

from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.functional import accuracy

from kd_lightning.schedules import Progress, Schedule


@dataclass(frozen=True)
class SawTooth(Schedule):
    """A temperature that falls from high to low several times in a run.

    Attributes:
        high: Temperature at the start of each tooth.
        low: Temperature that each tooth approaches.
        teeth: Number of teeth in the run.
    """

    high: float = 8.0
    low: float = 2.0
    teeth: int = 3

    def __call__(self, progress: Progress) -> float:
        """Return the temperature at this point of training."""
        return self.high + (self.low - self.high) * (progress.fraction * self.teeth % 1.0)


def network(width: int = 8, num_classes: int = 10) -> nn.Module:
    """Return a small convolutional network for images (B, 1, 8, 8)."""
    first = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(32 * width, num_classes))


class MyModule(LightningModule):
    """An ordinary LightningModule.

    Args:
        width: Channels of the first convolution.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = network(width)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, 10)."""
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy, to which DistillationCallback adds its term."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        images, labels = batch
        self.log("val_acc", accuracy(self(images), labels, task="multiclass", num_classes=10))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=0.003)
