"""Policies that look at nothing but training progress."""

from __future__ import annotations

import math
from collections.abc import Callable

from typing_extensions import override

from kd_lightning.functional import Temperature
from kd_lightning.schedules import Progress, Schedule
from kd_lightning.temperature.base import TemperaturePolicy
from kd_lightning.temperature.signals import Signals

__all__ = ["ConstantTemperature", "ScheduledTemperature"]


class ConstantTemperature(TemperaturePolicy):
    """The same temperature for teacher and student throughout, :math:`T_s = T_t = T`.

    The baseline to beat: in a comparison over temperatures 1 to 40 no adaptive method was consistently better than a
    shared constant (arXiv 2603.02430).

    Args:
        value: T, between ``min_temperature`` and ``max_temperature``. 4 is usual on CIFAR-100, 1 to 2 on ImageNet and
            for language models.
        min_temperature: Lower bound, see :class:`TemperaturePolicy`.
        max_temperature: Upper bound.

    Raises:
        ValueError: The value is not a finite number within the bounds.

    Source: G. Hinton, O. Vinyals, J. Dean, 2015, arXiv 1503.02531.

    Example:
        >>> import torch
        >>> policy = ConstantTemperature(4.0)
        >>> policy(Signals(torch.zeros(2, 3), torch.zeros(2, 3))).student
        tensor([4.])
    """

    reads_logits = False

    def __init__(self, value: float = 4.0, *, min_temperature: float = 0.05, max_temperature: float = 100.0) -> None:
        super().__init__(min_temperature=min_temperature, max_temperature=max_temperature)
        if not (math.isfinite(value) and min_temperature <= value <= max_temperature):
            raise ValueError(
                f"temperature must be a positive, finite number within the policy's bounds [{min_temperature:g}, "
                f"{max_temperature:g}], got {value}. Usual values lie between 1 and 20; the bounds are arguments."
            )
        self.value = float(value)

    @override
    def compute(self, signals: Signals) -> Temperature:
        temperature = signals.full(self.value)
        return Temperature(student=temperature, teacher=temperature)

    @override
    def extra_repr(self) -> str:
        return ", ".join(filter(None, (f"value={self.value:g}", super().extra_repr())))


class ScheduledTemperature(TemperaturePolicy):
    r"""A schedule's value for teacher and student, :math:`T_s = T_t = v(\text{progress})`.

    Args:
        schedule: A :class:`Schedule`, or any function from :class:`Progress` to a positive number. Values outside the
            bounds are clamped to them: a floor for a decay.
        min_temperature: Lower bound, see :class:`TemperaturePolicy`.
        max_temperature: Upper bound.

    Raises:
        TypeError: The schedule is not callable.
        ValueError: On the call, if the schedule gives a value that is not positive and finite.

    Example:
        >>> import torch
        >>> from kd_lightning.temperature import LinearSchedule, Progress
        >>> policy = ScheduledTemperature(LinearSchedule(init_value=10.0, end_value=2.0))
        >>> policy(Signals(torch.zeros(2, 3), torch.zeros(2, 3), progress=Progress(step=1, max_steps=4))).student
        tensor([8.])
    """

    reads_logits = False

    def __init__(
        self,
        schedule: Schedule | Callable[[Progress], float],
        *,
        min_temperature: float = 0.05,
        max_temperature: float = 100.0,
    ) -> None:
        super().__init__(min_temperature=min_temperature, max_temperature=max_temperature)
        if not callable(schedule) or isinstance(schedule, type):
            raise TypeError(f"schedule must be a function from Progress to a number, got {schedule!r}.")
        self.schedule = schedule

    @override
    def compute(self, signals: Signals) -> Temperature:
        value = self.schedule(signals.progress)
        if not 0 < value < math.inf:  # NaN fails too; torch.compile cannot trace math.isfinite here
            raise ValueError(
                f"a temperature schedule must give positive, finite values, but {self.schedule} gave {value} at "
                f"{signals.progress}."
            )
        temperature = signals.full(value)
        return Temperature(student=temperature, teacher=temperature)

    @override
    def extra_repr(self) -> str:
        return ", ".join(filter(None, (f"schedule={self.schedule}", super().extra_repr())))
