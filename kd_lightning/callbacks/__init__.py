"""Callbacks that distil into any module, and that move, watch, search and check the temperature of a run."""

from kd_lightning.callbacks.adaptive_temperature import AdaptiveTemperature
from kd_lightning.callbacks.distillation_callback import DistillationCallback
from kd_lightning.callbacks.early_stop_distillation import EarlyStopDistillation
from kd_lightning.callbacks.gradient_share import GradientShare
from kd_lightning.callbacks.metric_names import MetricNames
from kd_lightning.callbacks.replica_consistency import ReplicaConsistency
from kd_lightning.callbacks.skip_non_finite import SkipNonFinite
from kd_lightning.callbacks.temperature_finder import TemperatureFinder
from kd_lightning.callbacks.temperature_monitor import TemperatureMonitor

__all__ = [
    "AdaptiveTemperature",
    "DistillationCallback",
    "EarlyStopDistillation",
    "GradientShare",
    "MetricNames",
    "ReplicaConsistency",
    "SkipNonFinite",
    "TemperatureFinder",
    "TemperatureMonitor",
]
