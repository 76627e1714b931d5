"""Two processes on the CPU (gloo), forked: a second each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.multiprocessing.spawn import ProcessRaisedException

from kd_lightning import DistillationModule, FrozenTeacher, TeacherEnsemble
from kd_lightning.teachers import MappedClasses
from kd_lightning.temperature import CosineSchedule
from tests.helpers import InOrder, LearnedTemperature, make_loader, make_network

pytestmark = pytest.mark.slow

Make = Callable[..., DistillationModule]
MakeTrainer = Callable[..., Trainer]


def networks_of(teacher: Any) -> nn.ModuleList:
    """The teacher's network, or those of an ensemble's members."""
    return nn.ModuleList(teacher.modules())


class Report(Callback):
    """Writes what each rank has, and looks at what DDP synchronises."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temperatures: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DistillationModule)
        assert pl_module.teacher is not None
        self.before = {name: value.clone() for name, value in networks_of(pl_module.teacher).state_dict().items()}
        if trainer.world_size > 1:
            assert trainer.model is not None
            assert trainer.model is not pl_module  # the DDP wrapper
            networks = networks_of(pl_module.teacher)
            taught = {id(t) for t in [*networks.parameters(), *networks.buffers()]}
            synchronised = [*trainer.model.parameters(), *trainer.model.buffers()]
            assert not taught & {id(tensor) for tensor in synchronised}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DistillationModule)
        assert pl_module.last_output is not None
        self.temperatures.append(pl_module.last_output.temperatures[0].student.item())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DistillationModule)
        assert pl_module.teacher is not None
        for name, value in networks_of(pl_module.teacher).state_dict().items():
            assert torch.equal(value, self.before[name])
        report = {
            "state": pl_module.state_dict(),
            "temperatures": self.temperatures,
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        }
        torch.save(report, self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


def ensemble(teacher: torch.nn.Module) -> TeacherEnsemble:
    """An ensemble of two, with a temperature to learn, and weights and routing by row."""
    members = [FrozenTeacher(copy.deepcopy(teacher)), FrozenTeacher(teacher, micro_batch_size=4)]
    teacher.get_parameter("3.bias").data.add_(1.0)
    return TeacherEnsemble(members, [LearnedTemperature(), 3.0], "confidence", routing=[[0, 1, 2, 3], [2, 3, 4, 5]])


def of_different_classes(teacher: torch.nn.Module) -> TeacherEnsemble:
    """An ensemble of two that know four of the six classes each, one of which is merged of two."""
    one = MappedClasses(copy.deepcopy(teacher), [[0, 4], 1, 2, 3, None, None])
    two = MappedClasses(teacher, [None, None, 2, 3, 4, 5])
    return TeacherEnsemble(
        [one, two], [LearnedTemperature(), 3.0], combine="losses", routing=[[0, 1, 2, 3], [2, 3, 4, 5]]
    )


@pytest.mark.parametrize(
    ("temperature", "teachers"),
    [(CosineSchedule(8, 2), None), (LearnedTemperature(), None), (4.0, ensemble), (4.0, of_different_classes)],
    ids=["cosine", "learned", "ensemble", "of different classes"],
)
def test_two_processes_train_as_one(
    temperature: Any, teachers: Any, make_module: Make, make_trainer: MakeTrainer, teacher: Any, tmp_path: Path
) -> None:
    for devices in (2, 1):
        torch.manual_seed(7)
        options = {} if teachers is None else {"teacher": teachers(copy.deepcopy(teacher))}
        module = make_module(student=make_network(norm=False), temperature=copy.deepcopy(temperature), **options)
        options = {"strategy": "ddp_fork"} if devices == 2 else {}
        trainer = make_trainer(
            devices=devices, callbacks=[Report(tmp_path)], use_distributed_sampler=False, max_epochs=2, **options
        )
        trainer.fit(module, datamodule=InOrder())
    one, first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert first["temperatures"] == second["temperatures"]
    assert len(one["temperatures"]) == len(first["temperatures"]) == 8
    assert first["temperatures"] == pytest.approx(one["temperatures"], rel=1e-5)
    for name, value in one["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        torch.testing.assert_close(first["state"][name], value, rtol=1e-4, atol=1e-6)
    for name in ("val_acc", "val_loss", "val_task_loss", "val_agreement", "val_calibration_error", "train_acc"):
        assert first["metrics"][name] == second["metrics"][name]
        assert first["metrics"][name] == pytest.approx(one["metrics"][name], abs=1e-5), name


class DifferentTeachers(Callback):
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, DistillationModule)
        assert pl_module.teacher is not None
        pl_module.teacher.module[0].weight += trainer.global_rank  # pyright: ignore


def test_ranks_with_different_teachers_are_an_error(make_module: Make, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(devices=2, strategy="ddp_fork", callbacks=[DifferentTeachers()])
    with pytest.raises(ProcessRaisedException, match="the ranks have different teachers: fingerprints rank 0"):
        trainer.fit(make_module(), make_loader())
