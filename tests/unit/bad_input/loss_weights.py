"""Weights within losses, options of losses, their targets, and schedules that reach 0 as a temperature."""

import math
from collections.abc import Callable
from typing import Any

import torch

from kd_lightning import Distiller, functional, losses, schedules
from kd_lightning.temperature import ScheduledTemperature
from tests.unit.bad_input.case import Case

LOGITS = torch.arange(10.0).reshape(2, 5)
LABELS = torch.tensor([1, 4])
NOT_A_WEIGHT = [-1.0, math.nan, math.inf]
WEIGHTS: list[tuple[Any, str]] = [
    (losses.DKDLoss, "alpha"),
    (losses.DKDLoss, "beta"),
    (losses.NKDLoss, "gamma"),
    (losses.DISTLoss, "beta"),
    (losses.DISTLoss, "gamma"),
]
FUNCTIONS: list[tuple[Any, str]] = [
    (functional.dkd_loss, "alpha"),
    (functional.dkd_loss, "beta"),
    (functional.nkd_loss, "gamma"),
    (functional.dist_loss, "beta"),
    (functional.dist_loss, "gamma"),
]
UNSPLIT: list[Any] = [functional.kd_loss, functional.reverse_kd_loss, functional.jsd_loss, functional.dist_loss]


def call(make: Callable[..., object], **options: Any) -> Callable[[], object]:
    return lambda: make(**options)


def of_logits(loss: Callable[..., object], **options: Any) -> Callable[[], object]:
    return lambda: loss(LOGITS, LOGITS + 1, 2.0, **options)


CASES = [
    *(
        Case(f"{loss.__name__} with {name} of {weight}", call(loss, **{name: weight}), ValueError,
             f"{name} must be finite and not negative, got {weight}.")
        for loss, name in WEIGHTS for weight in NOT_A_WEIGHT
    ),
    *(
        Case(f"{loss.__name__} with {name} of {word!r}", call(loss, **{name: word}), TypeError,
             f"{name} must be a number, got {word!r}.")
        for loss, name in WEIGHTS for word in ("much", None, True)
    ),
    *(
        Case(f"{loss.__name__} with {name} of -1", of_logits(loss, targets=LABELS, **{name: -1.0}), ValueError,
             f"{name} must be finite and not negative, got -1.0.")
        for loss, name in FUNCTIONS
    ),
    Case("DKD of nothing", call(losses.DKDLoss, alpha=0, beta=0), ValueError,
         "alpha and beta are both 0, which trains nothing. Give one of them a weight."),
    Case("DIST of nothing", call(losses.DISTLoss, beta=0, gamma=0), ValueError,
         "beta and gamma are both 0, which trains nothing. Give one of them a weight."),
    Case("relations of nothing", call(losses.RelationalLoss, distance_weight=0, angle_weight=0), ValueError,
         "distance_weight and angle_weight are both 0, which trains nothing. Give one of them a weight."),
    *(
        Case(f"torchdistill with {name} of -0.5", call(losses.KDLoss, convention="torchdistill", **{name: -0.5}),
             ValueError, f"{name} must be finite and not negative, got -0.5.")
        for name in ("alpha", "beta")
    ),
    Case("torchdistill with alpha of 1.5", call(losses.KDLoss, convention="torchdistill", alpha=1.5), ValueError,
         "alpha must be at most 1 where beta is left to be 1 − alpha, got alpha=1.5. Give both."),
    *(
        Case(f"{loss.__name__} of class 9 of 5", of_logits(loss, targets=torch.tensor([9, 9])), ValueError,
             "targets must be class indices from 0 to 4, or ignore_index=-100 where there is no label, got 9. Return "
             "such targets from unpack_batch(batch), or give the losses the ignore_index of the data.")
        for loss in UNSPLIT
    ),
    *(
        Case(f"{loss.__name__} with a mask", of_logits(loss, mask=torch.tensor([True, False])), TypeError,
             "a loss between logits got an unexpected keyword argument 'mask': its options are class_dim, "
             "ignore_index, num_items, reduction, scale, targets. A mask of the positions that count goes to targets, "
             "as a boolean tensor.")
        for loss in (*UNSPLIT[:3], functional.skew_kd_loss, functional.multi_temperature_kd_loss)
    ),
    *(
        Case(f"temperature of {schedule}", call(Distiller, teacher=None, temperature=schedule), ValueError,
             f"a temperature schedule must give positive, finite values, but {schedule} has {name}=0. Usual "
             "temperatures lie between 1 and 20.")
        for schedule, name in (
            (schedules.CosineSchedule(0, 2), "init_value"),
            (schedules.LinearSchedule(2, 0), "end_value"),
            (schedules.CyclicSchedule(2, 0, period=4), "end_value"),
            (schedules.StepSchedule(0, (3,)), "init_value"),
            (schedules.ConstantSchedule(0), "value"),
            (schedules.JoinedSchedule([schedules.ConstantSchedule(3), schedules.LinearSchedule(0, 2)], [4]),
             "init_value"),
        )
    ),
    Case("scheduled temperature of 0", call(ScheduledTemperature, schedule=schedules.CosineSchedule(0, 2)), ValueError,
         "a temperature schedule must give positive, finite values, but CosineSchedule(init_value=0, end_value=2, "
         "until=1.0) has init_value=0. Usual temperatures lie between 1 and 20."),
]  # fmt: skip
