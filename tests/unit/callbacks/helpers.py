"""Scripted metrics and small fits that the callbacks' tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from kd_lightning import DistillationModule, Distiller, FrozenTeacher
from kd_lightning.datamodules import DigitsDataModule
from kd_lightning.models import DigitsCNN

TEACHER = Path(__file__).parents[3] / "configs" / "digits_teacher.safetensors"


class Script(Callback):
    """Logs, at each validation of a fit, the scripted value of the training step that it follows.

    Without state, so that a resumed run reads on where it stands. Ranks but the first may have values of their own.
    """

    def __init__(
        self, values: Sequence[float], steps_per_check: int, name: str = "scripted", others: Sequence[float] = ()
    ) -> None:
        self.values = values
        self.steps_per_check = steps_per_check
        self.name = name
        self.others = others

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            values = self.others if self.others and trainer.global_rank > 0 else self.values
            pl_module.log(self.name, values[trainer.global_step // self.steps_per_check - 1])


class Save(Callback):
    """Saves, when training ends, a state of the rank's module or callbacks as ``<rank>.pt``."""

    def __init__(self, folder: Path, state: Callable[[LightningModule], object]) -> None:
        self.folder, self.state = folder, state

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(self.state(pl_module), self.folder / f"{trainer.global_rank}.pt")


def distiller_of(module: LightningModule) -> Distiller:
    assert isinstance(module, DistillationModule)
    return module.distiller


def multiplier_of(module: LightningModule) -> float:
    return distiller_of(module).temperature.multiplier.item()


def digits(lr: float, maximize: bool = False, **options: Any) -> tuple[DistillationModule, DigitsDataModule]:
    """Real digits, the real teacher, and a student that starts as good as the teacher.

    With ``lr=0`` and the teacher's batch norm its accuracy provably stays; with ``maximize`` it provably falls.
    """
    torch.manual_seed(0)
    teacher = FrozenTeacher(DigitsCNN(), TEACHER).load()
    student = DigitsCNN()
    student.load_state_dict(teacher.module.state_dict())
    for part in student.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 0.0
    module = DistillationModule(
        student=student,
        teacher=teacher,
        optimizer=lambda params: torch.optim.SGD(params, lr=lr, maximize=maximize),
        **options,
    )
    return module, DigitsDataModule(batch_size=32, train_fraction=0.1, in_memory=True)
