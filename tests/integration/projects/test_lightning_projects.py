"""Modules as Lightning's own examples and lightning-hydra-template have them, distilled unchanged."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MaxMetric, MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from kd_lightning.callbacks import DistillationCallback
from kd_lightning.functional import mse_logits_loss
from kd_lightning.losses import BernoulliKDLoss, MSELogitsLoss
from tests.integration.projects.helpers import distil, trained

MakeTrainer = Callable[..., Trainer]


def images(count: int = 64, size: int = 8) -> tuple[Tensor, Tensor]:
    """A bright row tells the class."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(count) % 4
    pixels = torch.rand(count, 1, size, size, generator=generator) * 0.5
    pixels[torch.arange(count), 0, targets * 2] += 1.0
    return pixels, targets


def loader(batch_size: int = 16) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*images()), batch_size=batch_size)


# ---- the image classifier ----------------------------------------------------------------------------------------


class Backbone(nn.Module):
    def __init__(self, hidden_dim: int = 16) -> None:
        super().__init__()
        self.l1 = nn.Linear(8 * 8, hidden_dim)
        self.l2 = nn.Linear(hidden_dim, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(x.size(0), -1)
        x = torch.relu(self.l1(x))
        return torch.relu(self.l2(x))  # the example ends with a ReLU


class LitClassifier(LightningModule):
    def __init__(self, backbone: Backbone | None = None, learning_rate: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"])
        self.backbone = backbone or Backbone()

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("valid_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.hparams["learning_rate"])


@pytest.mark.parametrize("layer", [None, "backbone", "backbone.l2"])
def test_image_classifier(layer: str | None, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    x, y = images()
    teacher = Backbone(64)
    trained(teacher, lambda: F.cross_entropy(teacher(x), y), steps=40)
    inputs = 0 if layer == "backbone.l2" else None  # the head alone: the logits before that ReLU
    callback = DistillationCallback(teacher, layer, temperature=2.0, inputs=inputs)
    distil(LitClassifier(), callback, (loader(), loader()), make_trainer, tmp_path)


# ---- the autoencoder ---------------------------------------------------------------------------------------------


class LitAutoEncoder(LightningModule):
    """Reconstructs with ``forward``."""

    def __init__(self, hidden_dim: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(8 * 8, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 3))
        self.decoder = nn.Sequential(nn.Linear(3, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 8 * 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].view(batch[0].size(0), -1)
        loss = F.mse_loss(self(x), x)
        self.log("train_loss", loss, on_step=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class TutorialAutoEncoder(LitAutoEncoder):
    """The tutorial's module: ``forward`` is the embedding, and the step calls the two halves."""

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].view(batch[0].size(0), -1)
        return F.mse_loss(self.decoder(self.encoder(x)), x)


def flattened(batch: Any) -> Tensor:
    return batch[0].flatten(1)


@pytest.mark.parametrize("kind", [LitAutoEncoder, TutorialAutoEncoder])
def test_autoencoder(kind: type[LitAutoEncoder], make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """A reconstruction has no classes: the mean squared difference to the teacher's is what makes sense."""
    x = images()[0].flatten(1)
    teacher = LitAutoEncoder(hidden_dim=64)
    trained(teacher, lambda: F.mse_loss(teacher(x), x), steps=60)
    options: dict[str, Any] = {"kd_loss": MSELogitsLoss(), "temperature": 1.0, "kd_weight": 0.5, "task_weight": 0.5}
    if kind is TutorialAutoEncoder:
        options |= {"student_layer": "decoder", "inputs": flattened}
    module = kind()
    expected = mse_logits_loss(module.decoder(module.encoder(x[:16])), teacher(x[:16]), 1.0)
    losses = distil(module, DistillationCallback(teacher, **options), loader(), make_trainer, tmp_path)
    assert losses.kd[0] == pytest.approx(expected.item(), rel=1e-5)


# ---- lightning-hydra-template ------------------------------------------------------------------------------------


class HydraModule(LightningModule):
    """Optimiser and scheduler as partials, metrics as objects, the whole of it among the hyper-parameters."""

    def __init__(self, net: nn.Module, optimizer: Any, scheduler: Any) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = net
        self.criterion = nn.CrossEntropyLoss()
        self.train_acc = MulticlassAccuracy(num_classes=4)
        self.val_acc = MulticlassAccuracy(num_classes=4)
        self.train_loss = MeanMetric()
        self.val_loss = MeanMetric()
        self.val_acc_best = MaxMetric()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def on_train_start(self) -> None:
        self.val_loss.reset()
        self.val_acc.reset()
        self.val_acc_best.reset()

    def model_step(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        logits = self.forward(x)
        return self.criterion(logits, y), torch.argmax(logits, dim=1), y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, preds, targets = self.model_step(batch)
        self.train_loss(loss)
        self.train_acc(preds, targets)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, preds, targets = self.model_step(batch)
        self.val_loss(loss)
        self.val_acc(preds, targets)
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("val/acc", self.val_acc, on_step=False, on_epoch=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        self.val_acc_best(self.val_acc.compute())
        self.log("val/acc_best", self.val_acc_best.compute(), sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> Any:
        assert self.trainer.model is not None
        optimizer = self.hparams["optimizer"](params=self.trainer.model.parameters())
        scheduler = self.hparams["scheduler"](optimizer=optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss", "interval": "epoch", "frequency": 1},
        }


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of `nn.Module`")  # the template does so
@pytest.mark.parametrize("compiled", [False, True])
def test_hydra_template(compiled: bool, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    x, y = images()
    teacher = Backbone(64)
    trained(teacher, lambda: F.cross_entropy(teacher(x), y), steps=40)
    module = HydraModule(
        Backbone(),
        functools.partial(torch.optim.Adam, lr=0.01, weight_decay=0.0),
        functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode="min", factor=0.1, patience=10),
    )
    if compiled:
        module.net.compile(backend="eager")
    callback = DistillationCallback(teacher, temperature=2.0, validate=True)
    distil(module, callback, (loader(), loader()), make_trainer, tmp_path, weights_only=False)


# ---- a multi-label head ------------------------------------------------------------------------------------------


class Tagger(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Backbone()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        logits = self.net(batch["image"])
        return {"loss": F.binary_cross_entropy_with_logits(logits, batch["tags"]), "logits": logits.detach()}

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_multi_label_head(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    x, y = images()
    tags = torch.stack([y == 0, y >= 2, y % 2 == 0, y == 3], dim=1).float()
    teacher = Backbone(64)
    trained(teacher, lambda: F.binary_cross_entropy_with_logits(teacher(x), tags), steps=40)
    batches = [{"image": x[i : i + 16], "tags": tags[i : i + 16]} for i in range(0, 64, 16)]
    callback = DistillationCallback(
        teacher, "net", temperature=2.0, kd_loss=BernoulliKDLoss(), targets="tags", kd_weight=0.5, task_weight=0.5
    )
    data: Any = DataLoader(batches, batch_size=None)  # pyright: ignore[reportArgumentType]
    distil(Tagger(), callback, data, make_trainer, tmp_path)
