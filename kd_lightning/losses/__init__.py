"""Distillation losses as modules: a constructor and one call into :mod:`kd_lightning.functional`."""

from kd_lightning.losses.logits import KDLoss

__all__ = ["KDLoss"]
