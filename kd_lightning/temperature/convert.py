"""Conversion of a number, a schedule or a policy, as a user may write a temperature, to a policy."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import TypeAlias

from torch import nn

from kd_lightning.schedules import Progress, Schedule
from kd_lightning.temperature.base import TemperaturePolicy
from kd_lightning.temperature.scheduled import ConstantTemperature, ScheduledTemperature

TemperatureLike: TypeAlias = float | Schedule | TemperaturePolicy


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
    if isinstance(temperature, Real) and not isinstance(temperature, bool):
        return ConstantTemperature(float(temperature))
    if callable(temperature) and not isinstance(temperature, (type, nn.Module)):
        return ScheduledTemperature(temperature)
    received = temperature.__name__ if isinstance(temperature, type) else type(temperature).__name__
    raise TypeError(
        f"temperature must be a number, a schedule (Progress → number) or a TemperaturePolicy, got {received}."
        + (" Pass an instance, not the class." if isinstance(temperature, type) else "")
    )
