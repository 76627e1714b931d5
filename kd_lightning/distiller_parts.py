"""The parts of a Distiller, which are converted and checked whenever they are set; the call is in ``distiller``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from typing_extensions import Self, override

from kd_lightning.layers import LayerTerms
from kd_lightning.losses.task import as_loss, check_ignore_index
from kd_lightning.output import DistillationOutput
from kd_lightning.schedules import Progress, as_schedule
from kd_lightning.teachers import Teacher
from kd_lightning.teachers.frozen import as_teacher
from kd_lightning.teachers.teacher import GivenLogits
from kd_lightning.temperature import TemperaturePolicy, as_policy

_NO_TEACHER = GivenLogits()
_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "teacher": as_teacher,
    "temperature": as_policy,
    "kd_weight": partial(as_schedule, name="kd_weight"),
    "task_weight": partial(as_schedule, name="task_weight"),
    "kd_loss": partial(as_loss, name="kd_loss"),
    "task_loss": partial(as_loss, name="task_loss"),
}


class DistillerParts(nn.Module):
    """Teacher, temperature, losses, weights and layers, and the questions that they answer together."""

    teacher: Teacher | None
    temperature: TemperaturePolicy
    kd_loss: nn.Module
    task_loss: nn.Module
    kd_weight: Callable[[Progress], float]
    task_weight: Callable[[Progress], float]
    layers: LayerTerms
    kd_enabled: bool
    keeps_output: bool = False
    """True to keep :attr:`last_output`; callbacks that read it turn this on."""
    last_output: DistillationOutput | None = None
    """The output of the last call in train mode, if it is kept."""
    looked_at: bool = False
    """True once the values of a first batch are checked."""

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; arguments of the constructor may be set anew, and are converted and checked as there."""
        value = _CONVERTERS[name](value) if name in _CONVERTERS else value
        device = self.temperature.multiplier.device if "temperature" in self._modules else None
        super().__setattr__(name, value)
        if name in ("kd_loss", "task_loss"):
            check_ignore_index(self.kd_loss, getattr(self, "task_loss", None))
        if name == "teacher":
            self.looked_at = False
            self.teacher_temperatures = nn.ModuleList(self._teaching.temperatures)
            self._teaching.check_loss(self.kd_loss)
            if len(self.layers) and self.teacher is not None:
                self.teacher.network()  # raises where there is none
        if device is not None and name in ("teacher", "temperature"):  # set after a move
            self.temperature.to(device)
            self._teaching.to(device)

    @property
    def class_dim(self) -> int:
        """The class dimension of the logits, as the distillation loss has it."""
        return getattr(self.kd_loss, "class_dim", -1)

    @property
    def ignore_index(self) -> int | None:
        """The target value of positions that do not count, as the distillation loss has it."""
        return getattr(self.kd_loss, "ignore_index", -100)

    @property
    def task_ignore_index(self) -> int:
        """The target value of positions without a label: ``ignore_index``, or −100 where distillation ignores none."""
        return -100 if self.ignore_index is None else self.ignore_index

    @property
    def _teaching(self) -> Teacher:
        return _NO_TEACHER if self.teacher is None else self.teacher

    def _keep(self, output: DistillationOutput) -> DistillationOutput:
        if self.keeps_output and self.training:
            self.last_output = output
        return output

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "last_output": None}  # because a copy of a graph is an error

    def policies(self) -> dict[str, TemperaturePolicy]:
        """Return all temperature policies by their names as submodules.

        Those are the policy of the logits, those of an ensemble's teachers that have one of their own, and those of the
        layers.
        """
        named = {"temperature": self.temperature}
        for index, policy in enumerate(self.teacher_temperatures):
            named[f"teacher_temperatures.{index}"] = cast(TemperaturePolicy, policy)
        for index, term in enumerate(self.layers):
            if term.temperature is not None:
                named[f"layers.{index}.temperature"] = term.temperature
        return named

    @property
    def batch_keys(self) -> tuple[str | int, ...]:
        """The parts of the batch that the temperature reads, for ``extra``: keys of a mapping, or positions."""
        return tuple(dict.fromkeys(key for policy in self.policies().values() for key in policy.batch_keys))

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._teaching._apply(fn)
        return self

    @override
    def extra_repr(self) -> str:
        off = "" if self.kd_enabled else " (off)"
        return f"teacher={self.teacher!r}, kd_weight={self.kd_weight}{off}, task_weight={self.task_weight}"
