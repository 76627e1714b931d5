"""Ranking of candidates by a metric over several seeds, shared by the temperature finder and the sweep."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, Protocol, TypeVar

from kd_lightning.functional.rows import check_option
from kd_lightning.functional.temperature import is_number

Mode = Literal["min", "max"]


class _HasScores(Protocol):
    @property
    def scores(self) -> Sequence[float]: ...


class Scored:
    """A candidate of a search, whose ``scores`` are the metric's values, one for each seed."""

    @property
    def mean(self: _HasScores) -> float:
        """Return the mean over the seeds; NaN if a score is NaN or missing."""
        return mean_and_std(self.scores)[0]

    @property
    def std(self: _HasScores) -> float:
        """Return the standard deviation over the seeds; NaN for fewer than two scores."""
        return mean_and_std(self.scores)[1]


class _Ranked(Protocol):
    @property
    def mean(self) -> float: ...


RankedT = TypeVar("RankedT", bound=_Ranked)


def rank(candidates: Iterable[RankedT], mode: Mode) -> list[RankedT]:
    """Sort candidates by their mean score, the best first, and drop those whose mean is not finite."""
    sign = -1.0 if mode == "max" else 1.0
    return sorted((c for c in candidates if math.isfinite(c.mean)), key=lambda candidate: sign * candidate.mean)


def mean_and_std(scores: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation; NaN where scores are too few or not finite.

    Example:
        >>> mean_and_std([1.0, 3.0]), mean_and_std([2.0])
        ((2.0, 1.4142135623730951), (2.0, nan))
    """
    mean = statistics.fmean(scores) if scores else math.nan
    return mean, statistics.stdev(scores) if len(scores) > 1 and math.isfinite(mean) else math.nan


def show(scores: Sequence[float]) -> str:
    """Format scores as ``mean ± std``, a single score as the mean, and no scores as a dash.

    Example:
        >>> show([0.8, 0.9]), show([0.8]), show([])
        ('0.8500 ± 0.0707', '0.8000', '–')
    """
    mean, std = mean_and_std(scores)
    return "–" if not scores else f"{mean:.4f}" if len(scores) == 1 else f"{mean:.4f} ± {std:.4f}"


@dataclass(frozen=True)
class Lead:
    """A candidate's lead over another one that was trained with the same seeds.

    Attributes:
        amount: Difference of the mean scores, positive where the candidate is better.
        error: Standard error of the paired differences; NaN for a single seed.
        seeds: Number of seeds.

    Example:
        >>> Lead.of([0.9, 0.8, 0.9], [0.7, 0.7, 0.6], "max").describe("temperature 2")
        'it leads temperature 2 by 0.2000 ± 0.0577 (standard error over 3 paired seeds): more than two standard errors'
        >>> Lead.of([0.9], [0.7], "min").describe("temperature 2")
        'it trails temperature 2 by 0.2000 on one seed: seeds=3 shows how noisy that is'
    """

    amount: float
    error: float
    seeds: int

    @classmethod
    def of(cls, scores: Sequence[float], others: Sequence[float], mode: Mode) -> Lead:
        """Compare the scores of two candidates, seed by seed."""
        pairs = [score - other for score, other in zip(scores, others, strict=True)]
        error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
        amount = statistics.fmean(scores) - statistics.fmean(others)  # the sign agrees with the ranking by means
        return cls(amount if mode == "max" else -amount, error, len(pairs))

    @property
    def worth(self) -> str:
        """Return whether the lead exceeds two standard errors, in words."""
        if self.seeds < 3:
            return "too few to tell"
        return "more than two standard errors" if abs(self.amount) > 2 * self.error else "within the noise"

    def describe(self, other: str, more_seeds: str = "seeds=3") -> str:
        """Return a clause with the amount, its standard error and its worth; ``more_seeds`` is what trains more."""
        lead = f"it {'trails' if self.amount < 0 else 'leads'} {other} by {abs(self.amount):.4f}"
        if self.seeds == 1:
            return f"{lead} on one seed: {more_seeds} shows how noisy that is"
        return f"{lead} ± {self.error:.4f} (standard error over {self.seeds} paired seeds): {self.worth}"


def candidate_name(value: float, kd_weight: float | None, unit: str = "temperature") -> str:
    """Return the name of a candidate, whose weight is None where all candidates have the same.

    Example:
        >>> candidate_name(4.0, 0.9), candidate_name(0.5, None, "multiplier")
        ('temperature 4, kd_weight 0.9', 'multiplier 0.5')
    """
    return f"{unit} {value:.4g}" + ("" if kd_weight is None else f", kd_weight {kd_weight:.4g}")


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format rows of equal length as lines with right-aligned columns.

    Example:
        >>> align([["a", "bcd"], ["10", "2"]])
        [' a  bcd', '10    2']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def check_monitor(monitor: str, mode: Mode, chooser: str) -> None:
    """Raise if a metric cannot choose a temperature: one of the test set, or a loss with the distillation term.

    ``chooser`` is the subject of the message.
    """
    check_name(monitor, mode)
    if re.search(r"(\b|_)test", monitor):
        raise ValueError(
            f"{chooser} does not choose on the test set, got monitor={monitor!r}: what was chosen on it can no longer "
            "be measured on it. Take the metric's validation twin."
        )
    if moves_with_temperature(monitor):
        raise ValueError(
            f"{monitor} changes with the temperature itself, so it cannot choose one. Take {steady_metrics(monitor)}."
        )
    check_mode(monitor, mode)


def check_name(monitor: str, mode: Mode) -> None:
    """Raise if a metric has no name, or a mode is neither ``"min"`` nor ``"max"``."""
    if not isinstance(monitor, str) or not monitor:
        raise TypeError(f"monitor must be the name of a logged metric, such as 'val_acc', got {monitor!r}.")
    check_option("mode", mode, ("min", "max"))


def check_mode(monitor: str, mode: Mode) -> None:
    """Raise if a metric that is better the smaller it is, by its name, is maximised."""
    if mode == "max" and smaller_is_better(monitor):
        raise ValueError(
            f"a smaller {monitor} is better, but mode='max' takes its worst value for the best. Set mode='min'."
        )


def smaller_is_better(monitor: str) -> bool:
    """Return True if a metric is a loss, an error or a perplexity, by its name."""
    return re.search("loss|error|perplexity", monitor.lower()) is not None


def moves_with_temperature(monitor: str) -> bool:
    """Return True if a metric contains the distillation term, by its name under any :class:`MetricNames`.

    Example:
        >>> [name for name in ("val_loss", "val/kd_loss", "val/task_loss", "loss/val") if moves_with_temperature(name)]
        ['val_loss', 'val/kd_loss', 'loss/val']
    """
    return re.search(r"\bval[_\W]*(kd_)?loss$|\b(kd_)?loss[_\W]*val$", monitor) is not None


def steady_metrics(monitor: str) -> str:
    """Return which metrics to take in place of one that moves with the temperature, under the same names.

    Example:
        >>> steady_metrics("val/kd_loss")
        'val/acc or val/task_loss'
    """
    return " or ".join(re.sub("(kd_)?loss", name, monitor) for name in ("acc", "task_loss"))


def checked_temperatures(name: str, values: Iterable[float]) -> list[float]:
    """Return the values as floats, or raise if one is not positive and finite, or stands twice."""
    return _checked(name, values, "positive, finite numbers", lambda value: 0 < value < math.inf)


def checked_weights(name: str, values: Iterable[float]) -> list[float]:
    """Return the values as floats, or raise if one is negative or not finite, or stands twice."""
    return _checked(name, values, "finite numbers from 0 up", lambda value: 0 <= value < math.inf)


def _checked(name: str, values: Iterable[float], kind: str, allowed: Callable[[float], bool]) -> list[float]:
    items = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [None]
    if not all(is_number(item) for item in items):
        raise TypeError(f"{name} must be one or more {kind}, got {values!r}.")
    numbers = [float(item) for item in items if item is not None]
    if not numbers or not all(map(allowed, numbers)):
        raise ValueError(f"{name} must be one or more {kind}, got {values!r}.")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{name} must differ from each other, got {values!r}: name each once.")
    return numbers


def check_counts(*, least: int = 1, **counts: int) -> None:
    """Refuse counts that are no whole numbers, or are below the least."""
    for name, count in counts.items():
        if not isinstance(count, Integral) or isinstance(count, bool):
            raise TypeError(f"{name} must be a whole number, {least} or more, got {count!r}.")
        if count < least:
            raise ValueError(f"{name} must be {least} or more, got {count}.")
