"""Policies that look at nothing but training progress, and the conversion of what a user may write to a policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from torch import nn
from typing_extensions import Unpack, override

from kd_lightning.functional import Temperature
from kd_lightning.functional.temperature import check_number, is_number
from kd_lightning.schedules import Progress, Schedule, value_at
from kd_lightning.temperature.base import Bounds, TemperaturePolicy
from kd_lightning.temperature.signals import Signals


class ConstantTemperature(TemperaturePolicy):
    """The same temperature for teacher and student throughout, :math:`T_s = T_t = T`.

    The baseline to beat: in a comparison over temperatures 1 to 40 no adaptive method was consistently better than a
    shared constant (arXiv 2603.02430).

    Args:
        value: T, between ``min_temperature`` and ``max_temperature``. 4 is usual on CIFAR-100, 1 to 2 on ImageNet and
            for language models.
        bounds: See :class:`TemperaturePolicy`.

    Raises:
        ValueError: If the value is not a finite number within the bounds.

    Source: G. Hinton, O. Vinyals, J. Dean, 2015, arXiv 1503.02531.

    Example:
        >>> import torch
        >>> policy = ConstantTemperature(4.0)
        >>> policy(Signals(torch.zeros(2, 3), torch.zeros(2, 3))).student
        tensor([4.])
    """

    reads_logits = False

    def __init__(self, value: float = 4.0, **bounds: Unpack[Bounds]) -> None:
        super().__init__(**bounds)
        check_number("temperature", value)
        if not (math.isfinite(value) and self.min_temperature <= value <= self.max_temperature):
            raise ValueError(
                f"temperature must be a positive, finite number within the policy's bounds [{self.min_temperature:g}, "
                f"{self.max_temperature:g}], got {value}. Usual values lie between 1 and 20; the bounds are arguments."
            )
        self.value = float(value)

    @override
    def compute(self, signals: Signals) -> Temperature:
        temperature = signals.full(self.value)
        return Temperature(student=temperature, teacher=temperature)


class ScheduledTemperature(TemperaturePolicy):
    r"""A schedule's value for teacher and student, :math:`T_s = T_t = v(\text{progress})`.

    Args:
        schedule: A :class:`Schedule`, or any function from :class:`Progress` to a positive number. Values outside the
            bounds are clamped to them: a floor for a decay.
        bounds: See :class:`TemperaturePolicy`.

    Raises:
        TypeError: If the schedule is not callable; on the call, if it gives no number.
        ValueError: If the schedule starts or ends at 0; on the call, if it gives a value that is not positive and
            finite.

    Example:
        >>> import torch
        >>> from kd_lightning.temperature import LinearSchedule, Progress
        >>> policy = ScheduledTemperature(LinearSchedule(init_value=10.0, end_value=2.0))
        >>> policy(Signals(torch.zeros(2, 3), torch.zeros(2, 3), progress=Progress(step=1, max_steps=4))).student
        tensor([8.])
    """

    reads_logits = False

    def __init__(self, schedule: Schedule | Callable[[Progress], float], **bounds: Unpack[Bounds]) -> None:
        super().__init__(**bounds)
        if not callable(schedule) or isinstance(schedule, type):
            raise TypeError(f"schedule must be a function from Progress to a number, got {schedule!r}.")
        _check_positive(schedule, schedule)
        self.schedule = schedule

    @override
    def compute(self, signals: Signals) -> Temperature:
        value = value_at(self.schedule, signals.progress)
        if not 0 < value < math.inf:  # NaN fails too; torch.compile cannot trace math.isfinite here
            raise ValueError(
                f"a temperature schedule must give positive, finite values, but {self.schedule} gave {value} at "
                f"{signals.progress}. Usual temperatures lie between 1 and 20."
            )
        temperature = signals.full(value)
        return Temperature(student=temperature, teacher=temperature)


def _check_positive(schedule: object, whole: object) -> None:
    """Raise if a schedule, or a part of a joined one, starts or ends at 0, where no temperature is."""
    for part in getattr(schedule, "schedules", ()):
        _check_positive(part, whole)
    zeros = [name for name in ("value", "init_value", "end_value") if getattr(schedule, name, None) == 0]
    if zeros:
        raise ValueError(
            f"a temperature schedule must give positive, finite values, but {whole} has {zeros[0]}=0. Usual "
            "temperatures lie between 1 and 20."
        )


ScheduleLike: TypeAlias = float | Schedule | Callable[[Progress], float]
TemperatureLike: TypeAlias = float | Schedule | TemperaturePolicy
AnyTemperature: TypeAlias = TemperatureLike | Callable[[Progress], float]


def as_policy(temperature: float | Callable[[Progress], float] | TemperaturePolicy) -> TemperaturePolicy:
    """Turn what a user may write for a temperature into a policy.

    Args:
        temperature: A number → :class:`ConstantTemperature`; a schedule, or any function from :class:`Progress` to a
            number → :class:`ScheduledTemperature`; a policy → itself.

    Raises:
        TypeError: If the argument is none of these, or a policy whose constructor leaves out that of its base class.

    Example:
        >>> as_policy(4.0)
        ConstantTemperature(value=4)
        >>> from kd_lightning.temperature import CosineSchedule
        >>> as_policy(CosineSchedule(init_value=8.0, end_value=1.0))
        ScheduledTemperature(schedule=CosineSchedule(init_value=8.0, end_value=1.0, until=1.0))
    """
    if isinstance(temperature, TemperaturePolicy):
        if "_modules" not in vars(temperature):
            raise TypeError(f"{type(temperature).__name__}.__init__ does not call super().__init__(). Call it first.")
        return temperature
    if is_number(temperature):
        return ConstantTemperature(float(temperature))
    if callable(temperature) and not isinstance(temperature, (type, nn.Module)):
        return ScheduledTemperature(temperature)
    received = temperature.__name__ if isinstance(temperature, type) else type(temperature).__name__
    raise TypeError(
        f"temperature must be a number, a schedule (Progress → number) or a TemperaturePolicy, got {received}."
        + (" Pass an instance, not the class." if isinstance(temperature, type) else "")
    )
