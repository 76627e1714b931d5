"""Bad settings of the temperatures by largest logit, energy and group, and batches that do not fit."""

from __future__ import annotations

import math
from typing import Any

import torch

from kd_lightning.temperature import EnergyTemperature, GroupTemperature, MaxLogitTemperature, Signals
from tests.unit.bad_input.case import Case

ZEROS = torch.zeros(3, 2)


def ratio(value: float) -> Case:
    return Case(
        f"ratio of {value}",
        lambda: MaxLogitTemperature(value),
        ValueError,
        f"ratio is the largest logit after the division by T and must be positive and finite, got {value}. 3.5 makes "
        "T = 4 of a logit of 14.",
    )


def share(value: float) -> Case:
    return Case(
        f"share of {value}",
        lambda: EnergyTemperature(share=value),
        ValueError,
        f"share is the part of the batch that has high energy, in [0, 1], got {value}.",
    )


def column(name: str, extra: dict[str, Any], error: type[Exception], message: str, **options: Any) -> Case:
    policy = GroupTemperature("source", {"web": 2.0, 3: 4.0}, **options)
    return Case(f"group column: {name}", lambda: policy(Signals(ZEROS, ZEROS, extra=extra)), error, message)


UNUSABLE = (
    "the groups in 'source' must be a tensor of whole numbers, or a list of strings or whole numbers, got {}. Have the "
    "collate function make one of them."
)
UNKNOWN = (
    "GroupTemperature knows the groups 'web', 3 of 'source' and has no default, got {}. Name its temperature, or give "
    "a default."
)
CASES = [
    *map(ratio, (0.0, -1.0, math.inf, math.nan)),
    *map(share, (-0.1, 1.1, math.nan)),
    Case(
        "energy's share and threshold",
        lambda: EnergyTemperature(share=0.5, threshold=-2.0),
        ValueError,
        "a share ranks each batch and a threshold does not, got share=0.5 and threshold=-2.0. Give one of them.",
    ),
    Case(
        "energy's threshold is no number",
        lambda: EnergyTemperature(threshold=math.nan),
        ValueError,
        "threshold is an energy, a finite number such as a quantile of EnergyTemperature.energy(logits), got nan.",
    ),
    Case(
        "energy's temperature outside the bounds",
        lambda: EnergyTemperature(low_energy=500.0),
        ValueError,
        "EnergyTemperature: low_energy must be a temperature within the policy's bounds [0.05, 100], got 500.0. Usual "
        "values lie between 1 and 20; the bounds are the arguments min_temperature and max_temperature.",
    ),
    Case(
        "no groups",
        lambda: GroupTemperature("source", {}),
        ValueError,
        "temperatures must name a temperature for each group, such as {'math': 1.0, 'chat': 4.0}, got {}.",
    ),
    Case(
        "group's temperature outside the bounds",
        lambda: GroupTemperature("source", {"web": 0.0}),
        ValueError,
        "GroupTemperature: the temperature of 'web' must be a temperature within the policy's bounds [0.05, 100], got "
        "0.0. Usual values lie between 1 and 20; the bounds are the arguments min_temperature and max_temperature.",
    ),
    column(
        "missing",
        {"origin": [1, 2, 3]},
        ValueError,
        "GroupTemperature reads 'source' of the batch, which has no such part. Have the dataset and its collate "
        "function put it there, or call the Distiller with extra={'source': …}; the logits of layers have no groups.",
    ),
    column("a tensor of floats", {"source": torch.zeros(3)}, TypeError, UNUSABLE.format("a tensor of torch.float32")),
    column("one string", {"source": "web"}, TypeError, UNUSABLE.format("str")),
    column("a number", {"source": 3}, TypeError, UNUSABLE.format("int")),
    column("an unknown string", {"source": ["web", "book", "web"]}, ValueError, UNKNOWN.format("'book'")),
    column("an unknown number", {"source": torch.tensor([3, 3, 4])}, ValueError, UNKNOWN.format("another")),
    column(
        "of another length",
        {"source": ["web"]},
        ValueError,
        "the groups in 'source' must have the shape (3,), one per sample, or (3,), one per position, got (1,).",
    ),
]
