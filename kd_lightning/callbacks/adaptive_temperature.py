"""A temperature that follows a validation metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from kd_lightning.callbacks.common import (
    Mode,
    count_checks,
    find_holder,
    is_validation_check,
    mean_over_ranks,
    read_metric,
)
from kd_lightning.modules.replicas import gather
from kd_lightning.temperature import TemperaturePolicy

__all__ = ["AdaptiveRule", "AdaptiveTemperature", "Direction", "Move", "TemperatureRange", "agree", "return_ratio"]

Direction = Literal["decrease", "increase", "keep"]

_LEAST_MOVE = 1e-3
"""A ratio closer to 1 is no move: what is left before a bound, or float32 rounding at it."""


class TemperatureRange(NamedTuple):
    """The temperatures of a batch: the mean over its samples, for student and teacher, in each term.

    Attributes:
        mean: The student's, averaged over the terms.
        coldest: The smallest of all these means.
        hottest: The largest.
    """

    mean: float
    coldest: float
    hottest: float

    def __mul__(self, ratio: float) -> TemperatureRange:  # pyright: ignore[reportIncompatibleMethodOverride]
        return TemperatureRange(self.mean * ratio, self.coldest * ratio, self.hottest * ratio)


def agree(ranks: Sequence[tuple[float, TemperatureRange]]) -> tuple[float, TemperatureRange]:
    """Return the metric and the temperatures that all ranks use, from each rank's, in whatever order."""
    temperatures = [temperature for _, temperature in ranks]
    return mean_over_ranks([value for value, _ in ranks]), TemperatureRange(
        mean=mean_over_ranks([t.mean for t in temperatures]),
        coldest=min(t.coldest for t in temperatures),
        hottest=max(t.hottest for t in temperatures),
    )


class Move(NamedTuple):
    """What to do: multiply the temperature by ``ratio``, because of ``reason``."""

    ratio: float
    reason: str


@dataclass
class _State:
    best: float | None = None
    reference: float | None = None
    flat_checks: int = 0
    low_checks: int = 0
    cooldown_left: int = 0


class AdaptiveRule:
    r"""When to move the temperature, as a state machine over metric values; :class:`AdaptiveTemperature` has the words.

    With values oriented so that larger is better, :math:`\delta(x)` being ``degrade_delta`` or
    :math:`\text{degrade\_delta} \cdot |x|`, at each check with value :math:`v`:

    * :math:`v > \text{best} + \text{min\_delta}`: the new best and reference; nothing else happens.
    * :math:`v < \text{reference} - \delta(\text{reference})`, ``degrade_patience`` checks in a row: degradation.
    * :math:`v \ge \text{best} - \delta(\text{best})`, ``patience`` checks in a row: plateau.

    A move makes its value :math:`v` the reference, until there is a new best. A direction of ``"keep"``, or a bound
    that leaves no room, makes no move and so leaves the reference alone.

    Args: as :class:`AdaptiveTemperature`, which checks them.

    Example:
        >>> rule = AdaptiveRule(monitor="val_acc", mode="max", factor=0.5, patience=2, min_delta=0.0,
        ...                     degrade_delta=0.02, delta_mode="rel", on_plateau="decrease", on_degrade="increase",
        ...                     degrade_patience=1, cooldown=0)
        >>> temperature = TemperatureRange(4.0, 4.0, 4.0)
        >>> [rule.check(value, temperature, low=1.0, high=20.0) for value in (0.90, 0.89, 0.80, 0.80)]
        [None, None, Move(ratio=2.0, reason='val_acc 0.8 below 0.9 − 0.018 for 1 check'), None]
    """

    def __init__(
        self,
        *,
        monitor: str,
        mode: Mode,
        factor: float,
        patience: int,
        min_delta: float,
        degrade_delta: float,
        delta_mode: Literal["rel", "abs"],
        on_plateau: Direction,
        on_degrade: Direction,
        degrade_patience: int,
        cooldown: int,
    ) -> None:
        self.monitor = monitor
        self.factor = factor
        self.patience = patience
        self.min_delta = min_delta
        self.degrade_delta = degrade_delta
        self.delta_mode = delta_mode
        self.on_plateau = on_plateau
        self.on_degrade = on_degrade
        self.degrade_patience = degrade_patience
        self.cooldown = cooldown
        self._sign = 1.0 if mode == "max" else -1.0
        self.state = _State()

    def check(
        self, value: float, temperature: TemperatureRange, low: float, high: float, counting: bool = True
    ) -> Move | None:
        """Take one value of the metric in.

        Args:
            value: Finite.
            temperature: Of the last training batch.
            low: Lower bound of the coldest temperature.
            high: Upper bound of the hottest temperature.
            counting: False while warming up: the best is kept, and nothing is counted.
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
        # never past a bound, and never against the direction where the policy itself is outside of the bounds
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
    """Return the ratio that brings the temperature back into the bounds by undoing part of the multiplier.

    A schedule goes on after a move: 3 · 0.5 may have been within bounds, and 1 · 0.5 is not. Nothing beyond a
    multiplier of 1 is asked for: bounds hold back the moves, not the policy.

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


class AdaptiveTemperature(Callback):
    """Moves the temperature when a validation metric stands still or falls.

    *Plateau*: no improvement over the best by more than ``min_delta`` for ``patience`` validation checks, the metric
    staying within ``degrade_delta`` of the best: T × factor. *Degradation*: the metric falls below its reference by
    more than ``degrade_delta`` for ``degrade_patience`` checks: T ÷ factor. The reference is the best, and after a move
    the value at that move, until there is a new best: one drop gives one move, not one per check, whatever the metric
    does on its way back, and jitter under the best is a plateau. :class:`AdaptiveRule` has it in symbols.

    What is moved is the policy's ``multiplier``, so every policy follows, scheduled, per-sample and learned ones
    included. A check is a validation in ``fit``, several per epoch with ``val_check_interval``; the sanity check and
    ``validate`` change nothing. All ranks take the same decision, on the metric's mean over ranks, so that a metric
    logged without ``sync_dist`` does no harm. Each move is told with its reason::

        val_acc 0.912 not above 0.915 for 2 checks: temperature × 0.8 → 3.2

    *Bounds.* ``min_temperature`` and ``max_temperature``, and the policy's own, hold for the means of the last training
    batch: the colder of student's and teacher's mean temperature must not be moved below the one, nor the hotter above
    the other (single samples, of a per-sample policy, may lie outside of them; the policy's own bounds hold for each).
    A move that would cross a bound ends at it; at a bound the multiplier stays as it is. Where a schedule
    later carries a moved temperature across a bound, the next check takes back that part of the multiplier.

    *Resuming* makes the moves that the run without interruption makes. Lightning sets the limit: a checkpoint written
    between a training step and the validation due after that step loses this validation, and with it a check. Write
    checkpoints at the end of validation (``ModelCheckpoint(monitor=...)``), or at steps with no validation due.

    Args:
        monitor: A metric that is logged in validation. Do not take ``val_loss`` or ``val_kd_loss``: they move with the
            temperature itself. ``val_task_loss`` does not.
        mode: ``"max"`` if larger is better, ``"min"`` if smaller.
        factor: In (0, 1). ``"decrease"`` multiplies T by it, ``"increase"`` divides.
        patience: Checks without improvement that make a plateau.
        min_delta: An improvement is larger than this; absolute, as in Lightning's ``EarlyStopping``.
        degrade_delta: How far under the best is still jitter. An accuracy p on n samples has a standard error of
            √(p(1 − p)/n), 0.01 for p = 0.9 and n = 1000: take two of them or more.
        delta_mode: ``"rel"``: ``degrade_delta`` is a part of the best (or reference) value; ``"abs"``: in its units.
        on_plateau: ``"decrease"``, ``"increase"`` or ``"keep"``.
        on_degrade: ``"decrease"``, ``"increase"`` or ``"keep"``.
        degrade_patience: Checks in a row that make a degradation.
        cooldown: Checks after a move in which nothing is counted.
        min_temperature: Lower bound; None: the policy's own alone.
        max_temperature: Upper bound; None: the policy's own alone.
        warmup_epochs: Epochs at the start in which nothing is counted; the best is kept.
        verbose: Tell also what checks without a move saw.

    Raises:
        ValueError: An argument outside its range.
        RuntimeError: The metric was not logged; names those there are.
        TypeError: No Distiller in this run.

    State: the counters, per *monitor, mode, on_plateau, on_degrade*, in which several instances may differ; after a
    change of one of them a resumed run starts counting anew. The multiplier itself is the policy's state.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = AdaptiveTemperature(monitor="val_acc", factor=0.8, patience=2, min_temperature=1.0)
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        monitor: str = "val_acc",
        mode: Mode = "max",
        factor: float = 0.8,
        patience: int = 2,
        min_delta: float = 0.0,
        degrade_delta: float = 0.02,
        delta_mode: Literal["rel", "abs"] = "rel",
        on_plateau: Direction = "decrease",
        on_degrade: Direction = "increase",
        degrade_patience: int = 1,
        cooldown: int = 0,
        min_temperature: float | None = None,
        max_temperature: float | None = None,
        warmup_epochs: int = 0,
        verbose: bool = False,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("mode", mode, ("min", "max")),
            ("delta_mode", delta_mode, ("rel", "abs")),
            ("on_plateau", on_plateau, get_args(Direction)),
            ("on_degrade", on_degrade, get_args(Direction)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
        if not 0 < factor < 1:
            raise ValueError(
                f"factor must lie in (0, 1), got {factor}. To heat on a plateau set on_plateau='increase', which "
                "divides by it."
            )
        for name, value, least in (
            ("patience", patience, 1),
            ("degrade_patience", degrade_patience, 1),
            ("cooldown", cooldown, 0),
            ("warmup_epochs", warmup_epochs, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}.")
        if not (math.isfinite(min_delta) and min_delta >= 0):
            raise ValueError(f"min_delta must be finite and not negative, got {min_delta}.")
        if not 0 <= degrade_delta < (1 if delta_mode == "rel" else math.inf):
            raise ValueError(
                f"degrade_delta must lie in [0, 1) as a part (delta_mode='rel'), or be finite and not negative "
                f"(delta_mode='abs'), got {degrade_delta} with delta_mode={delta_mode!r}."
            )
        low = 0.0 if min_temperature is None else min_temperature
        high = math.inf if max_temperature is None else max_temperature
        if low >= high or high <= 0 or (min_temperature is not None and low <= 0):
            raise ValueError(
                f"bounds must satisfy 0 < min_temperature < max_temperature, got min_temperature={min_temperature}, "
                f"max_temperature={max_temperature}."
            )
        self.monitor = monitor
        self.mode: Mode = mode
        self.min_temperature = min_temperature
        self.max_temperature = max_temperature
        self.warmup_epochs = warmup_epochs
        self.verbose = verbose
        self.rule = AdaptiveRule(
            monitor=monitor,
            mode=mode,
            factor=factor,
            patience=patience,
            min_delta=min_delta,
            degrade_delta=degrade_delta,
            delta_mode=delta_mode,
            on_plateau=on_plateau,
            on_degrade=on_degrade,
            degrade_patience=degrade_patience,
            cooldown=cooldown,
        )
        self._last_batch: tuple[list[Tensor], list[Tensor], Tensor] | None = None
        self._temperature: TemperatureRange | None = None
        self._warned_of_nan = False

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            monitor=self.monitor, mode=self.mode, on_plateau=self.rule.on_plateau, on_degrade=self.rule.on_degrade
        )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        policy = find_holder(trainer, pl_module).distiller.temperature
        low, high = self._bounds(policy)
        if low >= high:
            raise ValueError(
                f"min_temperature={self.min_temperature} and max_temperature={self.max_temperature} leave no room "
                f"within the policy's own bounds, [{policy.min_temperature:g}, {policy.max_temperature:g}]."
            )
        if self.monitor in ("val_loss", "val_kd_loss"):
            rank_zero_warn(
                f"AdaptiveTemperature follows {self.monitor}, which moves with the temperature: each move looks like a "
                "change of the student. Follow val_acc or val_task_loss."
            )

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        holder = find_holder(trainer, pl_module)
        if holder.last_output is not None:  # kept as tensors: the host reads them at the next check, not before
            terms = holder.last_output.temperatures
            multiplier = holder.distiller.temperature.multiplier.clone()
            self._last_batch = [t.student.detach() for t in terms], [t.teacher.detach() for t in terms], multiplier

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_validation_check(trainer):
            return
        policy = find_holder(trainer, pl_module).distiller.temperature
        low, high = self._bounds(policy)
        multiplier = policy.multiplier.item()
        here = read_metric(trainer, self.monitor, self), self._read_temperature() * multiplier
        value, temperature = agree(gather(trainer, here))

        back = return_ratio(temperature, multiplier, low, high)
        if back != 1:
            policy.multiplier.mul_(back)
            rank_zero_info(
                f"the temperature {temperature.mean:.4g}, moved earlier, has left [{low:.4g}, {high:.4g}]: "
                f"{_says_ratio(back)} → {temperature.mean * back:.4g}"
            )
            temperature *= back
        if math.isnan(value):
            self._warn_of_nan()
            return
        move = self.rule.check(value, temperature, low, high, counting=trainer.current_epoch >= self.warmup_epochs)
        if move is not None:
            policy.multiplier.mul_(move.ratio)
            rank_zero_info(f"{move.reason}: {_says_ratio(move.ratio)} → {temperature.mean * move.ratio:.4g}")
        elif self.verbose:
            flat, low_checks = self.rule.state.flat_checks, self.rule.state.low_checks
            rank_zero_info(
                f"{self.monitor} {value:.4g}: temperature stays {temperature.mean:.4g} (flat for {count_checks(flat)}, "
                f"degraded for {count_checks(low_checks)})"
            )

    def replicated_state(self) -> dict[str, Any]:
        """Return the state that must be the same on every rank."""
        return vars(self.rule.state)

    def _bounds(self, policy: TemperaturePolicy) -> tuple[float, float]:
        return (
            max(policy.min_temperature, self.min_temperature or 0.0),
            min(policy.max_temperature, self.max_temperature or math.inf),
        )

    def _read_temperature(self) -> TemperatureRange:
        """Return the last training batch's temperatures over their multiplier, which callbacks may have moved since."""
        if self._last_batch is not None:
            student, teacher, multiplier = self._last_batch
            means = torch.stack([side.mean() for side in (*student, *teacher)]) / multiplier
            values = means.tolist()
            self._temperature = TemperatureRange(
                math.fsum(values[: len(student)]) / len(student), min(values), max(values)
            )
            self._last_batch = None
        if self._temperature is None:
            raise RuntimeError(
                "AdaptiveTemperature saw no temperature before this validation: what has the Distiller must keep the "
                "training batch's output in `last_output` until on_train_batch_end, as DistillationModule does."
            )
        return self._temperature

    def _warn_of_nan(self) -> None:
        if not self._warned_of_nan:
            self._warned_of_nan = True
            rank_zero_warn(
                f"{self.monitor} is not finite: AdaptiveTemperature leaves the temperature as it is, and counts no "
                "check, while that is so. This is said once."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        temperature = self._read_temperature() if self._last_batch is not None else self._temperature
        return {**vars(self.rule.state), "temperature": None if temperature is None else list(temperature)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        known = vars(_State())
        self.rule.state = _State(**{name: value for name, value in state_dict.items() if name in known})
        temperature = state_dict.get("temperature")
        self._temperature = None if temperature is None else TemperatureRange(*temperature)


def _says_ratio(ratio: float) -> str:
    return f"temperature × {ratio:.3g}" if ratio < 1 else f"temperature ÷ {1 / ratio:.3g}"
