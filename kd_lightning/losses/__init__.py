"""Distillation losses as modules: a constructor and one call into :mod:`kd_lightning.functional`."""

from kd_lightning.losses.logits import KDLoss
from kd_lightning.losses.task import CrossEntropyLoss

__all__ = ["CrossEntropyLoss", "KDLoss"]
