"""Checkpoints written before the rooms were moved still resume: version 0.1.0 at commit e08dbfc wrote the files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule, LayerTerm, TeacherEnsemble
from kd_lightning.callbacks import (
    AdaptiveTemperature,
    DistillationCallback,
    EarlyStopDistillation,
    TemperatureFinder,
)
from kd_lightning.losses import HintLoss
from kd_lightning.temperature import CosineSchedule, LearnableTemperature, LossGapTemperature

FOLDER = Path(__file__).parent / "checkpoints"
MakeTrainer = Callable[..., Trainer]


def network(hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 3))


def teacher(number: int) -> nn.Sequential:
    loaded = network(8)
    loaded.load_state_dict(torch.load(FOLDER / f"teacher{number}.pt", weights_only=True))
    return loaded


def loader() -> DataLoader[tuple[Tensor, ...]]:
    data = torch.load(FOLDER / "data.pt", weights_only=True)
    return DataLoader(TensorDataset(data["x"], data["y"]), batch_size=8)


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def with_an_ensemble() -> tuple[LightningModule, list[Any]]:
    ensemble = TeacherEnsemble([teacher(0), teacher(1)], temperatures=[2.0, LearnableTemperature(4.0)])
    callbacks = [
        AdaptiveTemperature(monitor="val_acc"),
        EarlyStopDistillation(monitor="val_acc"),
        TemperatureFinder(candidates=(1.0, 2.0), steps=2, seeds=1, plot_path=None),
    ]
    return DistillationModule(network(5), ensemble, temperature=LossGapTemperature()), callbacks


def with_layers() -> tuple[LightningModule, list[Any]]:
    temperature = CosineSchedule(init_value=8.0, end_value=1.0)
    return DistillationModule(network(5), teacher(0), temperature, layers=[LayerTerm("0", "0", HintLoss())]), []


def with_the_callback() -> tuple[LightningModule, list[Any]]:
    return Plain(), [DistillationCallback(teacher(0), temperature=LearnableTemperature(4.0))]


@pytest.mark.parametrize(
    ("name", "make"),
    [("module", with_an_ensemble), ("layers", with_layers), ("callback", with_the_callback)],
)
def test_an_old_checkpoint_resumes(name: str, make: Any, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    shutil.copy(FOLDER / f"{name}.ckpt", path)
    saved = torch.load(path, weights_only=True)
    module, callbacks = make()
    trainer = make_trainer(max_epochs=3, callbacks=callbacks)
    data = (loader(), loader()) if name != "callback" else (loader(), None)
    trainer.fit(module, *data, ckpt_path=path, weights_only=True)
    assert trainer.global_step == saved["global_step"] + 4
    assert set(module.state_dict()) == set(saved["state_dict"])
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    written = torch.load(tmp_path / "new.ckpt", weights_only=True)
    assert written["callbacks"].keys() >= {key for key in saved["callbacks"] if "kd_lightning" in key}
