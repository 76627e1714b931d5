"""Metrics under names of the user's own, and whatever follows a metric."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kd_lightning import ClassificationModule, DistillationModule
from kd_lightning.callbacks import (
    AdaptiveTemperature,
    DistillationCallback,
    EarlyStopDistillation,
    MetricNames,
    TemperatureFinder,
    TemperatureMonitor,
)
from kd_lightning.temperature import CosineSchedule, Progress
from tests.helpers import make_loader, make_network

MakeTrainer = Callable[..., Trainer]
Make = Callable[..., DistillationModule]
STAGES = ("train", "val", "test")


def logged(make_trainer: MakeTrainer, module: LightningModule, *callbacks: Any) -> dict[str, Tensor]:
    trainer = make_trainer(max_epochs=1, callbacks=list(callbacks))
    trainer.fit(module, make_loader(), make_loader(32, seed=1))
    values = dict(trainer.callback_metrics)
    trainer.test(module, make_loader(32, seed=2), verbose=False)
    return values | dict(trainer.callback_metrics)


@pytest.mark.parametrize("kind", [ClassificationModule, DistillationModule])
@pytest.mark.parametrize("pattern", ["{stage}/{name}", "{name} ({stage})"])
def test_the_values_are_the_same(kind: Any, pattern: str, make_module: Make, make_trainer: MakeTrainer) -> None:
    def make() -> LightningModule:
        torch.manual_seed(0)
        return make_module() if kind is DistillationModule else ClassificationModule(make_network())

    plain, named = logged(make_trainer, make()), logged(make_trainer, make(), MetricNames(pattern))

    def rename(name: str) -> str:
        stage, _, rest = name.partition("_")
        return pattern.format(stage=stage, name=rest) if stage in STAGES else name

    assert named == {rename(name): value for name, value in plain.items()}
    assert {"train_loss", "train_acc", "val_loss", "val_acc", "test_loss", "test_acc"} <= plain.keys()


def test_of_the_callback_that_distils(make_trainer: MakeTrainer, teacher: torch.nn.Module) -> None:
    class Project(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.student = make_network()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.student(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.student(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    trainer = make_trainer(
        max_epochs=1, callbacks=[DistillationCallback(teacher, student_layer="student", validate=True), MetricNames()]
    )
    trainer.fit(Project(), make_loader(), make_loader(32, seed=1))
    assert {"train/kd_loss", "train/task_loss", "val/kd_loss", "val/agreement"} <= trainer.callback_metrics.keys()
    assert not any(name.startswith(("train_", "val_")) for name in trainer.callback_metrics)


def test_what_follows_a_metric(
    make_module: Make, make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stopping, saving, the finder, the scheduler's default and the callbacks of the temperature."""
    plateau = functools.partial(ReduceLROnPlateau, patience=1)
    finder = TemperatureFinder([2.0, 4.0], steps=4, monitor="val/acc")
    best = ModelCheckpoint(tmp_path, "{epoch}", monitor="val/task_loss")
    trainer = make_trainer(
        callbacks=[
            MetricNames(),
            finder,
            AdaptiveTemperature("val/acc"),
            EarlyStopDistillation("val/acc", patience=5),
            EarlyStopping("val/loss"),
            best,
        ],
        enable_checkpointing=True,
    )
    with caplog.at_level(logging.INFO):
        trainer.fit(make_module(lr_scheduler=plateau), make_loader(), make_loader(32, seed=1))
    assert trainer.lr_scheduler_configs[0].monitor == "val/task_loss"
    assert [len(trial.scores) for trial in finder.results] == [finder.seeds] * 2
    assert best.best_model_score == min(
        torch.load(path, weights_only=True)["callbacks"][best.state_key]["current_score"]
        for path in tmp_path.glob("*.ckpt")
    )
    assert "val/acc: student" in caplog.text


@pytest.mark.parametrize("monitor", ["val/loss", "val/kd_loss", "test/acc"])
def test_a_metric_that_cannot_choose_is_known_by_its_new_name(monitor: str) -> None:
    with pytest.raises(ValueError, match=r"changes with the temperature itself|does not choose on the test set"):
        TemperatureFinder([2.0, 4.0], monitor=monitor)


def test_the_temperature_on_the_progress_bar(make_module: Make, make_trainer: MakeTrainer) -> None:
    values = []

    class Bar(TemperatureMonitor):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            values.append(trainer.progress_bar_metrics.get("temperature_student"))

    for prog_bar in (False, True):
        callbacks = [Bar(prog_bar=prog_bar, plot=not prog_bar)]
        make_trainer(callbacks=callbacks, log_every_n_steps=1).fit(
            make_module(temperature=CosineSchedule(8.0, 2.0)), make_loader()
        )
    assert values[:2] == [None, None]
    last = [CosineSchedule(8.0, 2.0)(Progress(step=step, max_steps=8)) for step in (3, 7)]  # of each epoch
    assert values[2:] == pytest.approx(last)
