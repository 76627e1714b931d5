"""Schedules: functions from :class:`Progress` to a number, for temperatures and for loss weights.

Any ``Callable[[Progress], float]`` will do; the ones here are frozen dataclasses, so that they print, compare, pickle
and can be written in YAML.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Literal, get_args

from typing_extensions import override

from kd_lightning.progress import Progress, Unit

__all__ = [
    "ConstantSchedule",
    "CosineSchedule",
    "CyclicSchedule",
    "ExponentialSchedule",
    "JoinedSchedule",
    "LinearSchedule",
    "Progress",
    "Schedule",
    "StepSchedule",
    "Unit",
    "as_schedule",
    "value_at",
    "weight_at",
]


class Schedule(ABC):
    """A function of training progress, ``schedule(progress) -> float``.

    Subclass it to write your own for use in YAML; in Python any function will do.
    """

    @abstractmethod
    def __call__(self, progress: Progress) -> float:
        """Return the value at this point of training."""


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """The same value throughout.

    Attributes:
        value: The value; finite and not negative.

    Example:
        >>> ConstantSchedule(4.0)(Progress(step=7))
        4.0
    """

    value: float

    def __post_init__(self) -> None:
        _check_values(self, "value")

    @override
    def __call__(self, progress: Progress) -> float:
        return float(self.value)


@dataclass(frozen=True)
class _Ramp(Schedule):
    """A way from one value to another, which ends at a share of the run."""

    init_value: float
    end_value: float
    until: float = 1.0

    def __post_init__(self) -> None:
        _check_values(self, "init_value", "end_value")
        if not 0 < self.until <= 1:
            raise ValueError(f"until must be a share of the run in (0, 1], got {self.until!r}.")

    def _share(self, progress: Progress) -> float:
        return min(progress.fraction / self.until, 1.0)


@dataclass(frozen=True)
class LinearSchedule(_Ramp):
    r"""A straight line, then flat: :math:`v = v_0 + (v_1 - v_0) \min(f / u, 1)` with the fraction :math:`f` of the run.

    Attributes:
        init_value: :math:`v_0`, at the start.
        end_value: :math:`v_1`, from ``until`` on.
        until: :math:`u`, the share of the run after which ``end_value`` is reached; in (0, 1].

    Source: loss and temperature schedule ``linear`` of MaxText's distillation.

    Example:
        >>> schedule = LinearSchedule(init_value=10.0, end_value=2.0, until=0.5)
        >>> [schedule(Progress(step=step, max_steps=100)) for step in (0, 25, 50, 100)]
        [10.0, 6.0, 2.0, 2.0]
    """

    @override
    def __call__(self, progress: Progress) -> float:
        fraction = self._share(progress)
        return self.init_value + (self.end_value - self.init_value) * fraction


@dataclass(frozen=True)
class CosineSchedule(_Ramp):
    r"""Half a cosine, flat at both ends: :math:`v = v_1 + (v_0 - v_1) \, \tfrac12 (1 + \cos(\pi \min(f / u, 1)))`.

    Attributes:
        init_value: :math:`v_0`, at the start.
        end_value: :math:`v_1`, from ``until`` on.
        until: :math:`u`, the share of the run after which ``end_value`` is reached; in (0, 1].

    Source: I. Loshchilov, F. Hutter, "SGDR", ICLR 2017, arXiv 1608.03983 (for the learning rate).

    Example:
        >>> schedule = CosineSchedule(init_value=8.0, end_value=2.0)
        >>> [round(schedule(Progress(step=step, max_steps=100)), 6) for step in (0, 50, 100)]
        [8.0, 5.0, 2.0]
    """

    @override
    def __call__(self, progress: Progress) -> float:
        fraction = self._share(progress)
        return self.end_value + (self.init_value - self.end_value) * 0.5 * (1.0 + math.cos(math.pi * fraction))


@dataclass(frozen=True)
class ExponentialSchedule(Schedule):
    r"""Decay on a log scale: :math:`v = \max(v_1, v_0 \, q^{n})` with :math:`n` the epochs or steps so far.

    ``factor=0.1`` divides by 10 each time, ``factor=0.01`` by 100. A factor above 1 rises, and ``end_value`` is then
    the ceiling.

    Attributes:
        init_value: :math:`v_0`; positive.
        factor: :math:`q`; positive.
        end_value: :math:`v_1`, the floor (the ceiling of a rise); positive.
        unit: What is counted: ``"epoch"`` or ``"step"``.

    Example:
        >>> schedule = ExponentialSchedule(init_value=20.0, factor=0.1, end_value=1.0)
        >>> [schedule(Progress(epoch=epoch)) for epoch in (0, 1, 2)]
        [20.0, 2.0, 1.0]
    """

    init_value: float
    factor: float = 0.1
    end_value: float = 1.0
    unit: Unit = "epoch"

    def __post_init__(self) -> None:
        _check_values(self, "init_value", "factor", "end_value", positive=True)
        _check_unit(self.unit)
        if (self.factor < 1 and self.end_value > self.init_value) or (
            self.factor > 1 and self.end_value < self.init_value
        ):
            raise ValueError(
                f"ExponentialSchedule with factor={self.factor:g} moves away from end_value={self.end_value:g} when it "
                f"starts at init_value={self.init_value:g}: a factor below 1 needs end_value <= init_value, one above "
                "1 end_value >= init_value."
            )

    @override
    def __call__(self, progress: Progress) -> float:
        count = progress.count(self.unit)
        if count == 0 or self.factor == 1:
            return float(self.init_value)
        # in log space, because factor ** count overflows for long runs
        there = (math.log(self.end_value) - math.log(self.init_value)) / math.log(self.factor)
        return float(self.end_value) if count >= there else self.init_value * self.factor**count


@dataclass(frozen=True)
class StepSchedule(Schedule):
    r"""A staircase: :math:`v = v_0 \, q^{m}` with :math:`m` the number of milestones reached.

    Attributes:
        init_value: :math:`v_0`; not negative.
        milestones: Epochs or steps at which the value is multiplied, rising.
        factor: :math:`q`; positive.
        unit: What the milestones count: ``"epoch"`` or ``"step"``.

    Example:
        >>> schedule = StepSchedule(init_value=8.0, milestones=(10, 20), factor=0.5)
        >>> [schedule(Progress(epoch=epoch)) for epoch in (0, 9, 10, 20)]
        [8.0, 8.0, 4.0, 2.0]
    """

    init_value: float
    milestones: Sequence[int]
    factor: float = 0.5
    unit: Unit = "epoch"

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        _check_values(self, "init_value")
        _check_values(self, "factor", positive=True)
        _check_rising("milestones", self.milestones)
        _check_unit(self.unit)

    @override
    def __call__(self, progress: Progress) -> float:
        return self.init_value * self.factor ** _reached(self.milestones, progress.count(self.unit))


@dataclass(frozen=True)
class CyclicSchedule(Schedule):
    r"""From one value to the other and back, over and over.

    With the phase :math:`\phi = (n \bmod P) / P`: ``"cosine"``
    :math:`v = v_1 + (v_0 - v_1) \, \tfrac12 (1 + \cos 2 \pi \phi)`, ``"triangle"``
    :math:`v = v_1 + (v_0 - v_1) \, |1 - 2 \phi|`.

    Attributes:
        init_value: :math:`v_0`, at the start of each cycle.
        end_value: :math:`v_1`, in the middle of each cycle.
        period: :math:`P`, epochs or steps in a cycle; positive.
        shape: ``"cosine"`` or ``"triangle"``.
        unit: What the period counts: ``"epoch"`` or ``"step"``.

    Source: cosine oscillation of a temperature: A. Kukleva et al., "Temperature Schedules for Self-Supervised
    Contrastive Methods on Long-Tail Data", ICLR 2023, arXiv 2303.13664.

    Example:
        >>> schedule = CyclicSchedule(init_value=2.0, end_value=6.0, period=4)
        >>> [round(schedule(Progress(epoch=epoch)), 6) for epoch in range(5)]
        [2.0, 4.0, 6.0, 4.0, 2.0]
    """

    init_value: float
    end_value: float
    period: int
    shape: Literal["cosine", "triangle"] = "cosine"
    unit: Unit = "epoch"

    def __post_init__(self) -> None:
        _check_values(self, "init_value", "end_value")
        _check_values(self, "period", positive=True)
        _check_unit(self.unit)
        if self.shape not in ("cosine", "triangle"):
            raise ValueError(f"shape must be 'cosine' or 'triangle', got {self.shape!r}.")

    @override
    def __call__(self, progress: Progress) -> float:
        phase = (progress.count(self.unit) % self.period) / self.period
        wave = 0.5 * (1.0 + math.cos(2 * math.pi * phase)) if self.shape == "cosine" else abs(1.0 - 2.0 * phase)
        return self.end_value + (self.init_value - self.end_value) * wave


@dataclass(frozen=True)
class JoinedSchedule(Schedule):
    """One schedule after the other, such as a warm-up and then a decay.

    Each part sees its own segment as a whole run: a cosine that begins at epoch 5 spans epochs 5 to the end.

    Attributes:
        schedules: The parts in order; at least one.
        boundaries: Where each further part begins, rising; one fewer than the parts.
        unit: What the boundaries count: ``"epoch"`` or ``"step"``.

    Example:
        >>> warm_up, decay = LinearSchedule(1.0, 8.0), CosineSchedule(8.0, 2.0)
        >>> schedule = JoinedSchedule([warm_up, decay], boundaries=[10])
        >>> [round(schedule(Progress(epoch=epoch, max_epochs=30)), 6) for epoch in (0, 5, 10, 20, 30)]
        [1.0, 4.5, 8.0, 5.0, 2.0]
    """

    schedules: Sequence[Schedule | Callable[[Progress], float]]
    boundaries: Sequence[int]
    unit: Unit = "epoch"

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedules", tuple(self.schedules))
        boundaries = check_boundaries("JoinedSchedule", "schedules", len(self.schedules), self.boundaries, self.unit)
        object.__setattr__(self, "boundaries", boundaries)

    @override
    def __call__(self, progress: Progress) -> float:
        part, within = part_at(self.boundaries, progress, self.unit)
        return self.schedules[part](within)


def part_at(boundaries: Sequence[int], progress: Progress, unit: Unit) -> tuple[int, Progress]:
    """Return which part of a run is on, and the progress within it as if it were a whole run."""
    part = _reached(boundaries, progress.count(unit))
    begin = boundaries[part - 1] if part else 0
    end = boundaries[part] if part < len(boundaries) else None
    return part, progress.segment(begin, end, unit)


def _reached(milestones: Sequence[int], count: int) -> int:
    """Return the number of milestones reached (torch.compile cannot trace bisect)."""
    return sum(count >= milestone for milestone in milestones)


def check_boundaries(owner: str, parts: str, num_parts: int, boundaries: Sequence[int], unit: str) -> tuple[int, ...]:
    """Return the boundaries between parts as a tuple, checked.

    Raises:
        ValueError: If the boundaries do not rise, are not one fewer than the parts, or have an unknown unit.
    """
    _check_rising("boundaries", boundaries)
    _check_unit(unit)
    if num_parts != len(boundaries) + 1:
        raise ValueError(
            f"{owner} needs one boundary between each two {parts}, got {num_parts} {parts} and {len(boundaries)} "
            "boundaries."
        )
    return tuple(boundaries)


def as_schedule(value: float | Callable[[Progress], float], name: str = "schedule") -> Callable[[Progress], float]:
    """Turn a number into a :class:`ConstantSchedule`; leave a schedule, or any function, as it is.

    Args:
        value: The number or schedule.
        name: Name of the argument, for messages.

    Raises:
        TypeError: If the value is neither a number nor a function.
        ValueError: If the number is negative or not finite.

    Example:
        >>> as_schedule(0.9)
        ConstantSchedule(value=0.9)
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        return ConstantSchedule(value if isinstance(value, int) else float(value))
    if callable(value) and not isinstance(value, type):
        return value
    hint = " Pass an instance, not the class." if isinstance(value, type) else ""
    raise TypeError(f"{name} must be a number or a schedule (Progress → number), got {value!r}.{hint}")


def value_at(schedule: Callable[[Progress], float], progress: Progress) -> float:
    """Return a schedule's value at this point of training.

    Raises:
        TypeError: If the value is no number.
    """
    value = schedule(progress)
    if isinstance(value, (int, float)):
        return value
    if not isinstance(value, Real):
        raise TypeError(
            f"a schedule must return a number, but {schedule} returned {value!r} ({type(value).__name__}) at "
            f"{progress}. Return a float; a tensor becomes one by float(tensor)."
        )
    return float(value)


def weight_at(schedule: Callable[[Progress], float], progress: Progress, name: str) -> float:
    """Return a loss weight at this point of training.

    Raises:
        TypeError: If the schedule gives a value that is no number.
        ValueError: If the schedule gives a value that is negative or not finite.
    """
    weight = value_at(schedule, progress)
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"{name} must be finite and not negative, but {schedule} gave {weight} at {progress}.")
    return weight


def _check_values(schedule: object, *names: str, positive: bool = False) -> None:
    for name in names:
        value = getattr(schedule, name)
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (positive and value == 0):
            rule = "positive" if positive else "not negative"
            raise ValueError(f"{type(schedule).__name__}: {name} must be a finite number, {rule}, got {value!r}.")


def _check_unit(unit: str) -> None:
    if unit not in get_args(Unit):
        raise ValueError(f"unit must be 'epoch' or 'step', got {unit!r}.")


def _check_rising(name: str, values: Sequence[int]) -> None:
    if any(value < 1 for value in values) or any(a >= b for a, b in pairwise(values)):
        raise ValueError(f"{name} must be positive and strictly rising, got {list(values)}.")
