"""Bad settings of the callback that holds distillation's share of the gradient."""

import math

from kd_lightning.callbacks import GradientShare
from tests.unit.bad_input.case import Case


def target(value: float) -> Case:
    return Case(
        f"share of the gradient {value}",
        lambda: GradientShare(value),
        ValueError,
        f"target is distillation's share of the gradient, between 0 and 1, got {value}. For the ends set kd_weight or "
        "task_weight to 0.",
    )


def decay(value: float) -> Case:
    return Case(
        f"decay {value}",
        lambda: GradientShare(decay=value),
        ValueError,
        f"decay must lie in [0, 1), got {value}: with 1 the weight would never move.",
    )


CASES = [*map(target, (0.0, 1.0, -0.5, math.nan)), *map(decay, (1.0, -0.1, math.nan))]
