"""The rule by which a temperature follows a validation metric, without trainer or policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from kd_lightning.callbacks.common import Mode, count_checks, mean_over_ranks

Direction = Literal["decrease", "increase", "keep"]

_LEAST_MOVE = 1e-3
"""A ratio closer to 1 is no move, because at a bound it is float32 rounding."""


class TemperatureRange(NamedTuple):
    """The temperatures of a batch: means over its samples, for student and teacher in each loss term.

    Attributes:
        mean: The student's mean, averaged over the terms.
        coldest: The smallest of all means.
        hottest: The largest of all means.
    """

    mean: float
    coldest: float
    hottest: float

    def __mul__(self, ratio: float) -> TemperatureRange:  # pyright: ignore[reportIncompatibleMethodOverride]
        return TemperatureRange(self.mean * ratio, self.coldest * ratio, self.hottest * ratio)


def agree(ranks: Sequence[tuple[float, TemperatureRange]]) -> tuple[float, TemperatureRange]:
    """Return the metric and the temperatures that all ranks use, independent of the ranks' order."""
    temperatures = [temperature for _, temperature in ranks]
    return mean_over_ranks([value for value, _ in ranks]), TemperatureRange(
        mean=mean_over_ranks([t.mean for t in temperatures]),
        coldest=min(t.coldest for t in temperatures),
        hottest=max(t.hottest for t in temperatures),
    )


class Move(NamedTuple):
    """A factor on the temperature, and the reason for it."""

    ratio: float
    reason: str


@dataclass
class AdaptiveState:
    """The counters of :class:`AdaptiveRule`, with values oriented so that larger is better."""

    best: float | None = None
    reference: float | None = None
    flat_checks: int = 0
    low_checks: int = 0
    cooldown_left: int = 0


@dataclass(kw_only=True)
class AdaptiveRule:
    r"""The rule of :class:`AdaptiveTemperature`: a state machine over metric values that returns moves.

    With values oriented so that larger is better, :math:`\delta(x)` being ``degrade_delta`` or
    :math:`\text{degrade\_delta} \cdot |x|`, at each check with value :math:`v`:

    * :math:`v > \text{best} + \text{min\_delta}`: the new best and reference, and no move.
    * :math:`v < \text{reference} - \delta(\text{reference})`, ``degrade_patience`` checks in a row: degradation.
    * :math:`v \ge \text{best} - \delta(\text{best})`, ``patience`` checks in a row: plateau.

    After a move its value :math:`v` is the reference until there is a new best. The direction ``"keep"``, or a bound
    that leaves no room, makes no move and keeps the reference.

    The arguments are those of :class:`AdaptiveTemperature`, which checks them.

    Example:
        >>> rule = AdaptiveRule(monitor="val_acc", mode="max", factor=0.5, patience=2, min_delta=0.0,
        ...                     degrade_delta=0.02, delta_mode="rel", on_plateau="decrease", on_degrade="increase",
        ...                     degrade_patience=1, cooldown=0)
        >>> temperature = TemperatureRange(4.0, 4.0, 4.0)
        >>> [rule.check(value, temperature, low=1.0, high=20.0) for value in (0.90, 0.89, 0.80, 0.80)]
        [None, None, Move(ratio=2.0, reason='val_acc 0.8 below 0.9 − 0.018 for 1 check'), None]
    """

    monitor: str
    mode: Mode
    factor: float
    patience: int
    min_delta: float
    degrade_delta: float
    delta_mode: Literal["rel", "abs"]
    on_plateau: Direction
    on_degrade: Direction
    degrade_patience: int
    cooldown: int
    state: AdaptiveState = field(default_factory=AdaptiveState)

    @property
    def _sign(self) -> float:
        return 1.0 if self.mode == "max" else -1.0

    def check(
        self, value: float, temperature: TemperatureRange, low: float, high: float, counting: bool = True
    ) -> Move | None:
        """Update the counters with a value of the metric, and return the move that follows, if any.

        Args:
            value: A finite value of the metric.
            temperature: The temperatures of the last training batch.
            low: Lower bound of the coldest temperature.
            high: Upper bound of the hottest temperature.
            counting: False during the warm-up, in which only the best is updated.
        """
        state, now = self.state, self._sign * value
        if state.best is None or state.reference is None or now > state.best + self.min_delta:
            state.best = state.reference = now
            state.flat_checks = state.low_checks = 0
            state.cooldown_left = max(0, state.cooldown_left - 1)
            return None
        if not counting or state.cooldown_left > 0:
            state.flat_checks = state.low_checks = 0
            state.cooldown_left = max(0, state.cooldown_left - 1)
            return None

        degraded = now < state.reference - self._delta(state.reference)
        flat = now >= state.best - self._delta(state.best)
        state.low_checks = state.low_checks + 1 if degraded else 0
        state.flat_checks = state.flat_checks + 1 if flat else 0
        if degraded and state.low_checks >= self.degrade_patience:
            direction, reason = self.on_degrade, self._says_degraded(value)
        elif flat and state.flat_checks >= self.patience:
            direction, reason = self.on_plateau, self._says_flat(value)
        else:
            return None

        wanted = {"decrease": self.factor, "increase": 1 / self.factor, "keep": 1.0}[direction]
        # not past a bound, and not against the direction if the policy itself lies outside the bounds
        ratio = max(wanted, min(1.0, low / temperature.coldest))
        ratio = min(ratio, max(1.0, high / temperature.hottest))
        if abs(ratio - 1) < _LEAST_MOVE:
            return None
        state.reference = now
        state.flat_checks = state.low_checks = 0
        state.cooldown_left = self.cooldown
        return Move(ratio, reason)

    def _delta(self, value: float) -> float:
        return self.degrade_delta * abs(value) if self.delta_mode == "rel" else self.degrade_delta

    def _says_flat(self, value: float) -> str:
        assert self.state.best is not None
        relation, margin = ("above", " + ") if self._sign > 0 else ("below", " − ")
        margin = f"{margin}{self.min_delta:.4g}" if self.min_delta else ""
        best = self._sign * self.state.best
        return (
            f"{self.monitor} {value:.4g} not {relation} {best:.4g}{margin} for {count_checks(self.state.flat_checks)}"
        )

    def _says_degraded(self, value: float) -> str:
        assert self.state.reference is not None
        relation, margin = ("below", "−") if self._sign > 0 else ("above", "+")
        reference, delta = self._sign * self.state.reference, self._delta(self.state.reference)
        return (
            f"{self.monitor} {value:.4g} {relation} {reference:.4g} {margin} {delta:.3g} for "
            f"{count_checks(self.state.low_checks)}"
        )


def return_ratio(temperature: TemperatureRange, multiplier: float, low: float, high: float) -> float:
    """Return the ratio that moves the temperature back into the bounds by undoing part of the multiplier.

    A schedule can carry a moved temperature across a bound: 3 · 0.5 may be within bounds, and 1 · 0.5 is not. The ratio
    undoes no more than the multiplier, because the bounds limit the moves and not the policy.

    Example:
        >>> return_ratio(TemperatureRange(0.5, 0.5, 0.5), multiplier=0.5, low=0.8, high=20.0)
        1.6
        >>> return_ratio(TemperatureRange(0.5, 0.5, 0.5), multiplier=1.0, low=0.8, high=20.0)
        1.0
    """
    if multiplier < 1 and temperature.coldest < low:
        ratio = min(low / temperature.coldest, 1 / multiplier)
    elif multiplier > 1 and temperature.hottest > high:
        ratio = max(high / temperature.hottest, 1 / multiplier)
    else:
        ratio = 1.0
    return ratio if abs(ratio - 1) >= _LEAST_MOVE else 1.0
