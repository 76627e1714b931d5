"""Optimisers, schedulers and learning rates that follow from a user's settings."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ReduceLROnPlateau as MonitoringPlateau
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

from kd_lightning import ClassificationModule, DistillationModule
from kd_lightning.cli import main
from kd_lightning.datamodules import DigitsDataModule
from kd_lightning.models import DigitsCNN
from kd_lightning.modules import SupervisedModule
from tests.helpers import LearnedTemperature, make_loader, make_network, make_teacher

MakeTrainer = Callable[..., Trainer]
sgd = functools.partial(torch.optim.SGD, lr=0.1)


def make(kind: type[SupervisedModule], network: nn.Module | None = None, **options: Any) -> Any:
    network = make_network() if network is None else network
    if kind is ClassificationModule:
        return ClassificationModule(network, **options)
    return DistillationModule(network, make_teacher(), **options)


both = pytest.mark.parametrize("kind", [ClassificationModule, DistillationModule])


@both
def test_plateau_follows_a_loss_that_is_logged(kind: type[SupervisedModule], make_trainer: MakeTrainer) -> None:
    plateau = functools.partial(ReduceLROnPlateau, patience=0, threshold=1e9, threshold_mode="abs")
    trainer = make_trainer(max_epochs=3)
    trainer.fit(make(kind, optimizer=sgd, lr_scheduler=plateau), make_loader(), make_loader())
    monitor = "val_loss" if kind is ClassificationModule else "val_task_loss"
    assert trainer.lr_scheduler_configs[0].monitor == monitor
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**2)  # the first check is the best


@both
def test_the_dictionary_is_lightnings(kind: type[SupervisedModule], make_trainer: MakeTrainer) -> None:
    plateau = functools.partial(ReduceLROnPlateau, mode="max")
    entries = {"monitor": "val_acc", "interval": "epoch", "frequency": 2, "strict": False, "name": "rate"}
    trainer = make_trainer(max_epochs=4)
    module = make(kind, optimizer=sgd, lr_scheduler={"scheduler": plateau, **entries})
    trainer.fit(module, make_loader(), make_loader())
    config = trainer.lr_scheduler_configs[0]
    assert {name: getattr(config, name) for name in entries} == entries
    assert config.scheduler.last_epoch == 2  # steps of the scheduler in four epochs
    assert module.lr_scheduler["scheduler"] is plateau  # the user's dictionary is left alone


def test_a_scheduler_names_its_monitor() -> None:
    module = make(ClassificationModule, lr_scheduler=functools.partial(MonitoringPlateau, monitor="val_acc"))
    assert module.configure_optimizers()["lr_scheduler"]["monitor"] == "val_acc"
    plateau = functools.partial(MonitoringPlateau, monitor="val_acc")
    module = make(ClassificationModule, lr_scheduler={"scheduler": plateau, "monitor": "val_loss"})
    assert module.configure_optimizers()["lr_scheduler"]["monitor"] == "val_loss"


@both
def test_interval_and_frequency(kind: type[SupervisedModule], make_trainer: MakeTrainer) -> None:
    """In 8 optimiser steps the scheduler steps twice, after each third."""
    halve = functools.partial(StepLR, step_size=1, gamma=0.5)
    module = make(kind, optimizer=sgd, lr_scheduler={"scheduler": halve, "interval": "step", "frequency": 3})
    trainer = make_trainer()
    trainer.fit(module, make_loader())
    assert trainer.global_step == 8
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 / 4)


@both
@pytest.mark.parametrize(
    "optimizer",
    [sgd, torch.optim.SGD, lambda parameters: torch.optim.SGD(parameters, lr=0.1)],
    ids=["partial", "class", "function"],
)
def test_partial_class_and_function(kind: type[SupervisedModule], optimizer: Any, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(make(kind, optimizer=optimizer), make_loader())
    expected = 1e-3 if optimizer is torch.optim.SGD else 0.1  # torch's default for a bare class
    assert [type(optimizer) for optimizer in trainer.optimizers] == [torch.optim.SGD]
    assert trainer.optimizers[0].param_groups[0]["lr"] == expected


# ---- module.lr ------------------------------------------------------------------------------------------------------


class SlowPolicy(LearnedTemperature):
    """A policy with a learning rate of its own."""

    def param_groups(self) -> list[dict[str, Any]]:
        return [{**group, "lr": 0.1} for group in super().param_groups()]


@pytest.mark.parametrize("optimizer", [None, sgd], ids=["AdamW", "SGD"])
def test_lr_replaces_the_optimizers_own(optimizer: Any) -> None:
    module = make(DistillationModule, optimizer=optimizer, temperature=LearnedTemperature(),
                  lr_scheduler=functools.partial(LambdaLR, lr_lambda=lambda epoch: 0.5))  # fmt: skip
    module.lr = 0.02
    config = module.configure_optimizers()
    assert [group["initial_lr"] for group in config["optimizer"].param_groups] == [0.02, 0.02]
    assert [group["lr"] for group in config["optimizer"].param_groups] == [0.01, 0.01]  # the scheduler has seen it


def test_lr_leaves_groups_that_set_their_own() -> None:
    module = make(DistillationModule, optimizer=sgd, temperature=SlowPolicy())  # its own equals the optimiser's
    module.lr = 0.02
    assert [group["lr"] for group in module.configure_optimizers().param_groups] == [0.02, 0.1]


class Network(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network, self.learning_rate = make_network(), 0.3

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


@both
def test_lr_goes_to_a_network_that_configures_itself(kind: type[SupervisedModule]) -> None:
    module = make(kind, Network())
    assert module.configure_optimizers().param_groups[0]["lr"] == 0.3
    module.lr = 0.02
    assert module.configure_optimizers().param_groups[0]["lr"] == 0.02


@both
def test_lr_find(kind: type[SupervisedModule], make_trainer: MakeTrainer) -> None:
    module = make(kind, optimizer=sgd)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = make_trainer(max_epochs=20)
    finder = Tuner(trainer).lr_find(module, make_loader(), min_lr=1e-4, num_training=60)
    assert finder is not None
    assert module.lr == finder.suggestion()
    assert 1e-4 <= module.lr <= 1
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, make_loader())
    assert trainer.optimizers[0].param_groups[0]["lr"] == module.lr


@both
def test_scale_batch_size(kind: type[SupervisedModule], make_trainer: MakeTrainer) -> None:
    data, sizes = DigitsDataModule(batch_size=8, eval_batch_size=50), []
    module = make(kind, DigitsCNN((4,)), optimizer=sgd)
    if kind is DistillationModule:
        teacher = DigitsCNN((4,))
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(teacher.parameters()) + 0.1, teacher.parameters())
        module.teacher = teacher
    module.on_train_batch_start = lambda batch, batch_idx: sizes.append(len(batch[0]))
    found = Tuner(make_trainer(max_epochs=1)).scale_batch_size(
        module, datamodule=data, steps_per_trial=1, init_val=16, max_trials=3
    )
    assert (found, data.batch_size, data.eval_batch_size) == (64, 64, 50)
    assert sizes == [8, 32, 64]  # the loader of the first trial is there before its size is set


# ---- YAML -----------------------------------------------------------------------------------------------------------

CONFIG = """
trainer: {max_epochs: 6, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false,
  logger: {class_path: CSVLogger, init_args: {save_dir: .}}}
model:
  class_path: ClassificationModule
  init_args:
    model: {class_path: DigitsCNN, init_args: {channels: [4], hidden: 8}}
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
    lr_scheduler:
      scheduler:
        class_path: torch.optim.lr_scheduler.ReduceLROnPlateau
        init_args: {mode: max, factor: 0.5, patience: 0, threshold: 1000.0, threshold_mode: abs}
      monitor: val_acc
      frequency: 2
      strict: false
data: {class_path: DigitsDataModule, init_args: {train_fraction: 0.05}}
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # another run goes on elsewhere
def test_the_dictionary_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings survive into the saved configuration, which runs again, and into the checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kd-lightning"])
    (tmp_path / "mine.yaml").write_text(CONFIG)
    configs = [tmp_path / "mine.yaml", tmp_path / "lightning_logs" / "version_0" / "run_config.yaml"]
    said = yaml.safe_load(CONFIG)["model"]["init_args"]["lr_scheduler"]
    checkpoint = None
    for version, config in enumerate(configs):
        main(["fit", "--config", str(config)])
        folder = tmp_path / "lightning_logs" / f"version_{version}"
        saved = yaml.safe_load((folder / "run_config.yaml").read_text())["model"]["init_args"]["lr_scheduler"]
        assert said.pop("scheduler", None) is None or saved["scheduler"]["class_path"].endswith("ReduceLROnPlateau")
        assert saved | said == saved
        (checkpoint,) = folder.rglob("*.ckpt")
        content = torch.load(checkpoint, weights_only=True)
        assert content["optimizer_states"][0]["param_groups"][0]["lr"] == 0.05  # written before the third check
        assert content["hyper_parameters"]["lr_scheduler"]["monitor"] == "val_acc"
    main(["validate", "--ckpt_path", str(checkpoint), "--data=DigitsDataModule", "--trainer.logger=false"])
