"""Arms of the atlas: a temperature with its weight, and the setting of each policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from benchmarks.atlas.rows import Arm
from kd_lightning.callbacks import AdaptiveTemperature
from kd_lightning.temperature import (
    AsymmetricTemperature,
    CapacityTemperature,
    ClassFrequencyTemperature,
    ConfidenceTemperature,
    CorrectWrongTemperature,
    CosineSchedule,
    DisagreementTemperature,
    EnergyTemperature,
    EntropyTemperature,
    InstanceTemperature,
    JoinedTemperature,
    LearnableTemperature,
    LogitStandardization,
    LogitStdTemperature,
    LossGapTemperature,
    MaxLogitTemperature,
    MultiTemperature,
    ProductTemperature,
    ScheduledTemperature,
    SharpnessTemperature,
    TargetConfidenceTemperature,
    TemperatureLike,
    TokenDifficultyTemperature,
    TransformedTeacherTemperature,
)

KD_WEIGHT, TASK_WEIGHT, ANCHOR = 0.9, 0.1, 4.0  # "equal" has kd_weight · T² = KD_WEIGHT · ANCHOR² at every T
NONE: Arm = ("none", 0.0)


def constants(*temperatures: float) -> list[Arm]:
    """Return the arms of constant temperatures with both weightings, which at the anchor are the same."""
    return [(rule, t) for t in temperatures for rule in ("fixed", "equal") if (rule, t) != ("equal", ANCHOR)]


CONSTANTS = constants(1.0, 2.0, 4.0, 8.0, 16.0)


class Run(NamedTuple):
    """What a policy may be built from."""

    classes: int
    counts: Tensor | None
    steps: int


class Policy(NamedTuple):
    """A policy's setting; what is not the class's default is in ``note``."""

    build: Callable[[Run], TemperatureLike]
    note: str = ""
    kd_weight: float = KD_WEIGHT


# Policies whose student trains at T = 1 without a factor T² have the gradient of T = 4: kd_weight · scale / T_s = 3.6.
_AT_ONE = KD_WEIGHT * ANCHOR
POLICIES = {
    "AdaptiveTemperature": Policy(lambda run: ANCHOR, "callback on T = 4, a check at each of the ten evaluations"),
    "AsymmetricTemperature": Policy(lambda run: AsymmetricTemperature(1.0, 4.0)),
    "CapacityTemperature": Policy(lambda run: CapacityTemperature(interval=run.steps // 20), "20 intervals in a run"),
    "ClassFrequencyTemperature rare_high": Policy(lambda run: ClassFrequencyTemperature(run.counts)),
    "ClassFrequencyTemperature rare_low": Policy(
        lambda run: ClassFrequencyTemperature(run.counts, direction="rare_low")
    ),
    "ConfidenceTemperature": Policy(lambda run: ConfidenceTemperature()),
    "CorrectWrongTemperature": Policy(lambda run: CorrectWrongTemperature(), "kd_weight 3.6", _AT_ONE),
    "DisagreementTemperature": Policy(lambda run: DisagreementTemperature()),
    "EnergyTemperature": Policy(lambda run: EnergyTemperature()),
    "EntropyTemperature": Policy(lambda run: EntropyTemperature()),
    "InstanceTemperature": Policy(lambda run: InstanceTemperature(run.classes)),
    "JoinedTemperature": Policy(
        lambda run: JoinedTemperature([4.0, EntropyTemperature()], [run.steps // 2], unit="step"),
        "T = 4, then EntropyTemperature from half-way on",
    ),
    "LearnableTemperature": Policy(lambda run: LearnableTemperature()),
    "LogitStandardization": Policy(lambda run: LogitStandardization()),
    "LogitStdTemperature": Policy(lambda run: LogitStdTemperature()),
    "LossGapTemperature": Policy(lambda run: LossGapTemperature()),
    "MaxLogitTemperature": Policy(lambda run: MaxLogitTemperature(3.5), "ratio 3.5"),
    "MultiTemperature": Policy(lambda run: MultiTemperature(), "kd_weight 0.18 for five terms", KD_WEIGHT / 5),
    "ProductTemperature": Policy(
        lambda run: ProductTemperature([EntropyTemperature(), CosineSchedule(1.5, 0.5)]),
        "EntropyTemperature × cosine from 1.5 to 0.5",
    ),
    "ScheduledTemperature 8 to 2": Policy(lambda run: ScheduledTemperature(CosineSchedule(8.0, 2.0)), "cosine"),
    "ScheduledTemperature 2 to 8": Policy(lambda run: ScheduledTemperature(CosineSchedule(2.0, 8.0)), "cosine"),
    "SharpnessTemperature": Policy(lambda run: SharpnessTemperature()),
    "TargetConfidenceTemperature": Policy(lambda run: TargetConfidenceTemperature()),
    "TokenDifficultyTemperature": Policy(lambda run: TokenDifficultyTemperature(base=4.0), "base 4"),
    "TransformedTeacherTemperature": Policy(lambda run: TransformedTeacherTemperature(), "kd_weight 3.6", _AT_ONE),
}
ADAPTIVE: dict[str, Callable[[], AdaptiveTemperature]] = {"AdaptiveTemperature": AdaptiveTemperature}
"""Policies whose multiplier a callback's rule moves at each evaluation."""
BALANCED: Sequence[Arm] = [(name, 0.0) for name in POLICIES if not name.startswith("ClassFrequency")]
"""Policies for classes of equal size, where a temperature by frequency is a constant."""


def weight_of(arm: Arm) -> float:
    """Return kd_weight of an arm with a teacher."""
    if arm[0] in POLICIES:
        return POLICIES[arm[0]].kd_weight
    return KD_WEIGHT * (ANCHOR / arm[1]) ** 2 if arm[0] == "equal" else KD_WEIGHT
