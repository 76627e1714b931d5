"""The weights of an ensemble's teachers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from kd_lightning.functional.ensemble import confidence_weights, entropy_weights
from kd_lightning.functional.temperature import compute_dtype
from kd_lightning.schedules import ConstantSchedule, Progress, Schedule, as_schedule
from kd_lightning.temperature.signals import Signals

Confidence: TypeAlias = Literal["confidence", "entropy"]


class MemberWeights:
    """The weights of an ensemble's teachers: the same in all rows, by schedules, or by row, from their logits.

    The arguments are those of :class:`~kd_lightning.TeacherEnsemble` and the number of its teachers.
    """

    rule: Confidence | None = None
    """The rule of weights by row; None for schedules."""

    def __init__(
        self, given: Sequence[float | Schedule | Callable[[Progress], float]] | Confidence | None, count: int
    ) -> None:
        self.count = count
        self.schedules: list[Callable[[Progress], float]] = []
        if isinstance(given, str):
            if given not in get_args(Confidence):
                raise ValueError(f"weights must be a list, 'confidence', 'entropy' or None, got {given!r}.")
            self.rule = given
        elif given is not None:
            self.schedules = [as_schedule(weight) for weight in given]
        check_one_for_each("weights", self.schedules, count)
        if all(isinstance(weight, ConstantSchedule) for weight in self.schedules):
            self.at(Progress())

    def at(self, progress: Progress) -> list[float]:
        """Return each teacher's weight at this progress, 1 in sum; equal weights for a rule by row."""
        if not self.schedules:
            return [1 / self.count] * self.count
        weights = [weight(progress) for weight in self.schedules]
        total = sum(weights)
        if not (all(weight >= 0 for weight in weights) and 0 < total < math.inf):
            raise ValueError(
                f"teachers' weights must be finite, not negative and not all 0, but {self.schedules} gave {weights} at "
                f"{progress}. Only their ratios count."
            )
        return [weight / total for weight in weights]

    def shares(self, logits: Sequence[Tensor], weights: list[float], known: Tensor | None, signals: Signals) -> Tensor:
        """Return the weights by row, ``(K, …, 1)``, or ``(K, 1)`` where they are the same in all rows.

        Args:
            logits: One ``(…, C)`` for each teacher.
            weights: The result of :meth:`at`.
            known: ``(K, …, 1)``, True where a teacher knows the row; None: everywhere.
            signals: Of the batch, for its targets.
        """
        if self.rule is not None and (valid := signals.valid) is not None:  # because a masked row may hold NaN
            logits = [z.masked_fill(~valid.unsqueeze(-1), 0.0) for z in logits]
        if self.rule == "entropy":
            return entropy_weights(logits, known)
        if self.rule == "confidence":
            targets = signals.class_targets
            if targets is None:
                given = signals.targets
                received = "none" if given is None else f"{given.dtype} {tuple(given.shape)}"
                raise ValueError(
                    "weights='confidence' compares each teacher with the label: it needs class indices as targets in "
                    f"the shape {tuple(logits[0].shape[:-1])}, got {received}. weights='entropy' needs none."
                )
            return confidence_weights(logits, targets, known)
        dtype = compute_dtype(logits[0])
        shares = torch.stack([logits[0].new_full((1,), weight, dtype=dtype) for weight in weights])
        if known is None:
            return shares
        shares = shares.view(-1, *[1] * logits[0].dim()) * known
        return shares / shares.sum(0)

    def __repr__(self) -> str:
        return repr(self.rule) if self.rule else str(self.schedules or None)


def check_one_for_each(name: str, given: Sequence[object], count: int) -> None:
    """Raise if there are some of them, but not one for each teacher."""
    if given and len(given) != count:
        raise ValueError(f"there are {count} teachers but {len(given)} {name}: give one for each.")
