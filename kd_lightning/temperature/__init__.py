"""Every way of setting the temperature, one module per axis."""

from kd_lightning.functional import Temperature
from kd_lightning.temperature.asymmetric import AsymmetricTemperature
from kd_lightning.temperature.base import Signals, TemperatureLike, TemperaturePolicy, as_policy
from kd_lightning.temperature.scheduled import ConstantTemperature, ScheduledTemperature
from kd_lightning.temperature.schedules import (
    ConstantSchedule,
    CosineSchedule,
    CyclicSchedule,
    ExponentialSchedule,
    JoinedSchedule,
    LinearSchedule,
    Progress,
    Schedule,
    StepSchedule,
)

__all__ = [
    "AsymmetricTemperature",
    "ConstantSchedule",
    "ConstantTemperature",
    "CosineSchedule",
    "CyclicSchedule",
    "ExponentialSchedule",
    "JoinedSchedule",
    "LinearSchedule",
    "Progress",
    "Schedule",
    "ScheduledTemperature",
    "Signals",
    "StepSchedule",
    "Temperature",
    "TemperatureLike",
    "TemperaturePolicy",
    "as_policy",
]
