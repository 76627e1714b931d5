"""Distillation losses as modules: a constructor and one call into :mod:`kd_lightning.functional`."""

from kd_lightning.losses.logits import (
    BernoulliKDLoss,
    DISTLoss,
    DKDLoss,
    FusedLinearKDLoss,
    JSDLoss,
    KDLoss,
    LogitLoss,
    MSELogitsLoss,
    MultiTemperatureKDLoss,
    NKDLoss,
    ReverseKDLoss,
    SoftCrossEntropyLoss,
    TotalVariationLoss,
)
from kd_lightning.losses.task import CrossEntropyLoss

__all__ = [
    "BernoulliKDLoss",
    "CrossEntropyLoss",
    "DISTLoss",
    "DKDLoss",
    "FusedLinearKDLoss",
    "JSDLoss",
    "KDLoss",
    "LogitLoss",
    "MSELogitsLoss",
    "MultiTemperatureKDLoss",
    "NKDLoss",
    "ReverseKDLoss",
    "SoftCrossEntropyLoss",
    "TotalVariationLoss",
]
