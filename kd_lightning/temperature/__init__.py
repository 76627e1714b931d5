"""Every way of setting the temperature, one module per axis."""

from kd_lightning.functional import Temperature
from kd_lightning.schedules import (
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
from kd_lightning.temperature.asymmetric import AsymmetricTemperature, TransformedTeacherTemperature
from kd_lightning.temperature.base import TemperaturePolicy
from kd_lightning.temperature.class_wise import ClassFrequencyTemperature, CorrectWrongTemperature
from kd_lightning.temperature.combined import JoinedTemperature, MultiTemperature, ProductTemperature
from kd_lightning.temperature.dynamic import CapacityTemperature, LossGapTemperature
from kd_lightning.temperature.energy import EnergyTemperature
from kd_lightning.temperature.group import DepthTemperature, GroupTemperature
from kd_lightning.temperature.learnable import InstanceTemperature, LearnableTemperature
from kd_lightning.temperature.logit_spread import (
    LogitStandardization,
    LogitStdTemperature,
    MaxLogitTemperature,
    SharpnessTemperature,
)
from kd_lightning.temperature.sample_wise import (
    ConfidenceTemperature,
    DisagreementTemperature,
    EntropyTemperature,
    TargetConfidenceTemperature,
)
from kd_lightning.temperature.scheduled import ConstantTemperature, ScheduledTemperature, TemperatureLike, as_policy
from kd_lightning.temperature.signals import Signals
from kd_lightning.temperature.token_wise import TokenDifficultyTemperature

__all__ = [
    "AsymmetricTemperature",
    "CapacityTemperature",
    "ClassFrequencyTemperature",
    "ConfidenceTemperature",
    "ConstantSchedule",
    "ConstantTemperature",
    "CorrectWrongTemperature",
    "CosineSchedule",
    "CyclicSchedule",
    "DepthTemperature",
    "DisagreementTemperature",
    "EnergyTemperature",
    "EntropyTemperature",
    "ExponentialSchedule",
    "GroupTemperature",
    "InstanceTemperature",
    "JoinedSchedule",
    "JoinedTemperature",
    "LearnableTemperature",
    "LinearSchedule",
    "LogitStandardization",
    "LogitStdTemperature",
    "LossGapTemperature",
    "MaxLogitTemperature",
    "MultiTemperature",
    "ProductTemperature",
    "Progress",
    "Schedule",
    "ScheduledTemperature",
    "SharpnessTemperature",
    "Signals",
    "StepSchedule",
    "TargetConfidenceTemperature",
    "Temperature",
    "TemperatureLike",
    "TemperaturePolicy",
    "TokenDifficultyTemperature",
    "TransformedTeacherTemperature",
    "as_policy",
]
