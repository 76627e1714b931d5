"""Metrics that are better the smaller they are, in the mode ``"max"``, which is the default."""

from collections.abc import Callable
from typing import Any

from kd_lightning.callbacks import AdaptiveTemperature, EarlyStopDistillation, TemperatureFinder
from kd_lightning.sweep import sweep
from tests.unit.bad_input.case import Case


def following(callback: Callable[..., object], monitor: str) -> Callable[[], object]:
    return lambda: callback(monitor=monitor)


def swept() -> object:
    return sweep("missing.yaml", temperatures=[2.0], kd_weights=[0.5], monitor="val_task_loss")


FOLLOWING: list[Any] = [AdaptiveTemperature, EarlyStopDistillation, TemperatureFinder]
MESSAGE = "a smaller {} is better, but mode='max' takes its worst value for the best. Set mode='min'."

CASES = [
    *(
        Case(f"{callback.__name__} of the largest {monitor}", following(callback, monitor), ValueError,
             MESSAGE.format(monitor))
        for callback in FOLLOWING
        for monitor in ("val_task_loss", "val/task_loss", "val_perplexity", "val_calibration_error", "ValLossMean")
    ),
    *(
        Case(f"{callback.__name__} of the largest val_loss", following(callback, "val_loss"), ValueError,
             MESSAGE.format("val_loss"))
        for callback in FOLLOWING[:2]
    ),
    Case("sweep of the largest val_task_loss", swept, ValueError, MESSAGE.format("val_task_loss")),
]  # fmt: skip
