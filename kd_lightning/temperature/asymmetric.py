"""Policies that treat teacher and student differently."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from typing_extensions import override

from kd_lightning.functional import Temperature
from kd_lightning.temperature.base import Signals, TemperaturePolicy, as_policy
from kd_lightning.temperature.schedules import Progress, Schedule

__all__ = ["AsymmetricTemperature"]


class AsymmetricTemperature(TemperaturePolicy):
    """One policy for the student, another for the teacher: ``T_s`` of the first, ``T_t`` of the second.

    The gradient's size is ``scale / T_s``. With the loss's default scale ``T_s · T_t`` it is ``T_t``, so raising only
    the teacher's temperature raises the weight of distillation; ``scale="none"`` in the loss is how TTM and TRL train.

    Args:
        student: Number, schedule or policy for the student.
        teacher: The same for the teacher.
        min_temperature: Lower bound, see :class:`TemperaturePolicy`.
        max_temperature: Upper bound.

    Raises:
        TypeError: Not a number, schedule or policy.
        ValueError: On the call, if one of the policies gives several temperatures.

    Example:
        >>> import torch
        >>> policy = AsymmetricTemperature(student=1.0, teacher=4.0)
        >>> policy(Signals(torch.zeros(2, 3), torch.zeros(2, 3)))
        Temperature(student=tensor([1.]), teacher=tensor([4.]), scale=None)
    """

    def __init__(
        self,
        student: float | Schedule | TemperaturePolicy | Callable[[Progress], float] = 1.0,
        teacher: float | Schedule | TemperaturePolicy | Callable[[Progress], float] = 4.0,
        *,
        min_temperature: float = 0.05,
        max_temperature: float = 100.0,
    ) -> None:
        super().__init__(min_temperature=min_temperature, max_temperature=max_temperature)
        self.student = as_policy(student)
        self.teacher = as_policy(teacher)

    @override
    def compute(self, signals: Signals) -> Temperature:
        student, teacher = self.student(signals), self.teacher(signals)
        if not (isinstance(student, Temperature) and isinstance(teacher, Temperature)):
            raise ValueError(
                "AsymmetricTemperature joins policies of one temperature each, got one that gives several."
            )
        return Temperature(student=student.student, teacher=teacher.teacher)

    @override
    def transform(self, logits: Tensor) -> Tensor:
        return self.teacher.transform(self.student.transform(logits))
