"""Paired differences between arms: the choice of learning rates, standard errors, and Holm's correction."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from scipy.special import stdtr

from benchmarks.atlas.arms import CONSTANTS
from benchmarks.atlas.rows import Arm, Rows, Scores, Setting
from benchmarks.atlas.tasks import TASKS

K = TypeVar("K", bound=Hashable)


class Chosen(NamedTuple):
    """A finished arm at the learning rate that validation chooses: test score by seed, and mean validation score."""

    rate: float
    tests: dict[int, float]
    val: float


class Difference(NamedTuple):
    """A mean paired difference, its standard error, and the two-sided p-value of Student's t."""

    mean: float
    error: float
    p: float


Results = dict[Setting, dict[Arm, Chosen]]


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Compare two arms seed by seed.

    Raises:
        ValueError: If the arms do not have the same seeds, or fewer than two.
    """
    if ours.keys() != theirs.keys() or len(ours) < 2:
        raise ValueError(f"paired arms need the same seeds, two or more, got {sorted(ours)} and {sorted(theirs)}.")
    gains = [ours[seed] - theirs[seed] for seed in sorted(ours)]
    mean, error = statistics.mean(gains), statistics.stdev(gains) / math.sqrt(len(gains))
    if error == 0:
        return Difference(mean, error, 1.0 if mean == 0 else 0.0)
    return Difference(mean, error, 2 * float(stdtr(len(gains) - 1, -abs(mean) / error)))


def holm(values: Sequence[float]) -> list[float]:
    """Return the p-values that Holm's step-down procedure adjusts for their number."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda index: values[index])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted


def reliable(differences: Mapping[K, Difference]) -> set[K]:
    """Return the differences with p < 0.05 after Holm's correction for all of them."""
    adjusted = holm([difference.p for difference in differences.values()])
    return {key for key, p in zip(differences, adjusted, strict=True) if p < 0.05}


def chosen(rows: Rows, which: str) -> Results:
    """Return each finished arm at its learning rate; ``which`` is last or best."""
    groups: dict[tuple[Setting, Arm], dict[float, dict[int, Scores]]] = defaultdict(dict)
    for key, scores in rows.items():
        groups[key.setting, key.arm].setdefault(key.rate, {})[key.seed] = scores
    result: Results = defaultdict(dict)
    for (setting, arm), rates in groups.items():
        task = TASKS[setting.task]
        if set(rates) != set(task.rates[setting.optimizer]) or any(len(seeds) < task.seeds for seeds in rates.values()):
            continue
        means = {
            rate: statistics.mean(getattr(scores, f"val_{which}") for scores in seeds.values())
            for rate, seeds in rates.items()
        }
        rate = max(means, key=lambda rate: means[rate])
        tests = {seed: getattr(scores, f"test_{which}") for seed, scores in rates[rate].items()}
        result[setting][arm] = Chosen(rate, tests, means[rate])
    return result


def best_constant(arms: Mapping[Arm, Chosen]) -> Arm | None:
    """Return the constant temperature and weight of the highest mean validation score; None if none is finished."""
    return max((arm for arm in CONSTANTS if arm in arms), key=lambda arm: arms[arm].val, default=None)


def against_constant(results: Results, policies: Sequence[Arm]) -> dict[tuple[Setting, Arm], Difference]:
    """Return each finished policy's difference from the best constant of its setting."""
    differences = {}
    for setting, arms in results.items():
        best = best_constant(arms)
        for arm in policies if best else ():
            if best and arm in arms:
                differences[setting, arm] = paired(arms[arm].tests, arms[best].tests)
    return differences
