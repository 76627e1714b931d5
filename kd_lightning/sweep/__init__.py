"""Sweeps over temperature and weight: many runs of one configuration, compared by validation, tested once."""

from kd_lightning.sweep.results import SweepCell, SweepResult, SweepRun
from kd_lightning.sweep.search import sweep

__all__ = ["SweepCell", "SweepResult", "SweepRun", "sweep"]
