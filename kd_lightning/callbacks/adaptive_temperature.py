"""Moving the temperature by a validation metric."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from kd_lightning._lightning import state_key
from kd_lightning.callbacks.adaptive_rule import (
    AdaptiveRule,
    AdaptiveState,
    Direction,
    Move,
    TemperatureRange,
    agree,
    return_ratio,
)
from kd_lightning.callbacks.common import (
    Mode,
    check_following,
    check_validates,
    count_checks,
    find_distiller,
    is_validation_check,
    read_metric,
)
from kd_lightning.functional.rows import check_option
from kd_lightning.functional.temperature import check_number
from kd_lightning.modules.between_ranks import gather
from kd_lightning.ranking import check_counts, moves_with_temperature, steady_metrics
from kd_lightning.temperature import TemperaturePolicy


class AdaptiveTemperature(Callback):
    """A callback that moves the temperature when a validation metric stagnates or falls.

    *Plateau*: for ``patience`` validation checks the metric does not exceed the best by more than ``min_delta``, and
    stays within ``degrade_delta`` of it: T × factor. *Degradation*: for ``degrade_patience`` checks the metric is below
    its reference by more than ``degrade_delta``: T ÷ factor. The reference is the best, and after a move the value at
    that move until there is a new best, so that one drop causes one move. :class:`AdaptiveRule` has the equations.

    The callback moves the policy's ``multiplier``, so it works with every policy. A check is a validation in ``fit``,
    several per epoch with ``val_check_interval``; the sanity check and ``validate`` do not count. All ranks decide
    alike, by the metric's mean over ranks, also without ``sync_dist``. Each move is logged with its reason::

        val_acc 0.912 not above 0.915 for 2 checks: temperature × 0.8 → 3.2

    *Bounds.* ``min_temperature`` and ``max_temperature``, and the policy's own, hold for the means of the last training
    batch: a move takes neither the lower of student's and teacher's mean below the one, nor the higher above the other.
    Single samples may lie outside; the policy's own bounds hold for each. A move that would cross a bound ends at it.
    If a schedule later carries a moved temperature across a bound, the next check undoes that part of the multiplier.

    *Resuming* makes the same moves as a run without interruption, except that Lightning omits a validation if the
    checkpoint was written between it and the training step before. Write checkpoints at the end of validation
    (``ModelCheckpoint(monitor=...)``), or at steps without one.

    Args:
        monitor: A metric that is logged in validation; not ``val_loss`` or ``val_kd_loss``, which change with the
            temperature itself. ``val_task_loss`` does not.
        mode: ``"max"`` if larger is better, ``"min"`` if smaller.
        factor: Factor in (0, 1), by which ``"decrease"`` multiplies T and ``"increase"`` divides it.
        patience: Checks without improvement that make a plateau.
        min_delta: A change must exceed this to be an improvement; absolute, as in Lightning's ``EarlyStopping``.
        degrade_delta: Distance below the best that still counts as noise. An accuracy p on n samples has a standard
            error of √(p(1 − p)/n), 0.01 for p = 0.9 and n = 1000: use twice that or more.
        delta_mode: ``"rel"``: ``degrade_delta`` is a part of the best or reference value; ``"abs"``: it is absolute.
        on_plateau: ``"decrease"``, ``"increase"`` or ``"keep"``.
        on_degrade: ``"decrease"``, ``"increase"`` or ``"keep"``.
        degrade_patience: Checks in a row that make a degradation.
        cooldown: Checks after a move in which nothing is counted.
        min_temperature: Lower bound; None: the policy's own alone.
        max_temperature: Upper bound; None: the policy's own alone.
        warmup_epochs: Epochs at the start in which only the best is updated.
        verbose: Whether to report checks without a move too.

    Raises:
        ValueError: If an argument is outside its range.
        MisconfigurationException: If the run has no validation.
        RuntimeError: If the metric was not logged; the message names the logged metrics.
        TypeError: If an argument is of another type, or if the run has no Distiller.

    State: the counters and moves, per *monitor, mode, on_plateau, on_degrade*; a resumed run with another of these
    resets the counters. The multiplier is the policy's state.

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
        check_following(monitor, mode, patience, min_delta)
        for name, value in (("factor", factor), ("degrade_delta", degrade_delta)):
            check_number(name, value)
        check_option("delta_mode", delta_mode, ("rel", "abs"))
        check_option("on_plateau", on_plateau, get_args(Direction))
        check_option("on_degrade", on_degrade, get_args(Direction))
        if not 0 < factor < 1:
            raise ValueError(
                f"factor must lie in (0, 1), got {factor}. To heat on a plateau set on_plateau='increase', which "
                "divides by it."
            )
        check_counts(degrade_patience=degrade_patience)
        check_counts(least=0, cooldown=cooldown, warmup_epochs=warmup_epochs)
        if not 0 <= degrade_delta < (1 if delta_mode == "rel" else math.inf):
            raise ValueError(
                f"degrade_delta must lie in [0, 1) as a part (delta_mode='rel'), or be finite and not negative "
                f"(delta_mode='abs'), got {degrade_delta} with delta_mode={delta_mode!r}."
            )
        for name, value in (("min_temperature", min_temperature), ("max_temperature", max_temperature)):
            if value is not None:
                check_number(name, value)
        low = 0.0 if min_temperature is None else min_temperature
        high = math.inf if max_temperature is None else max_temperature
        if not 0 <= low < high or (min_temperature is not None and low == 0):  # NaN fails too
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
        self.moves: list[tuple[int, float, str]] = []
        """Training step, ratio and reason of each move."""
        self._last_batch: tuple[list[Tensor], list[Tensor], Tensor] | None = None
        self._temperature: TemperatureRange | None = None
        self._warned_of_nan = False

    @property
    @override
    def state_key(self) -> str:
        return state_key(
            self, monitor=self.monitor, mode=self.mode, on_plateau=self.rule.on_plateau, on_degrade=self.rule.on_degrade
        )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_validates(trainer, self)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        distiller = find_distiller(trainer, pl_module)
        distiller.keeps_output = True
        policy = distiller.temperature
        low, high = self._bounds(policy)
        if low >= high:
            raise ValueError(
                f"min_temperature={self.min_temperature} and max_temperature={self.max_temperature} leave no room "
                f"within the policy's own bounds, [{policy.min_temperature:g}, {policy.max_temperature:g}]."
            )
        if moves_with_temperature(self.monitor):
            rank_zero_warn(
                f"AdaptiveTemperature follows {self.monitor}, which moves with the temperature: each move looks like a "
                f"change of the student. Follow {steady_metrics(self.monitor)}."
            )

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        distiller = find_distiller(trainer, pl_module)
        if distiller.last_output is not None:  # tensors, so that only a check needs a host sync
            terms = distiller.last_output.temperatures
            multiplier = distiller.temperature.multiplier.clone()
            self._last_batch = [t.student.detach() for t in terms], [t.teacher.detach() for t in terms], multiplier

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_validation_check(trainer):
            return
        policy = find_distiller(trainer, pl_module).temperature
        low, high = self._bounds(policy)
        multiplier = policy.multiplier.item()
        here = read_metric(trainer, self.monitor, self), self._read_temperature() * multiplier
        value, temperature = agree(gather(trainer, here))

        back = return_ratio(temperature, multiplier, low, high)
        if back != 1:
            left = f"the temperature {temperature.mean:.4g}, moved earlier, has left [{low:.4g}, {high:.4g}]"
            temperature = self._move(trainer, policy, temperature, Move(back, left))
        if math.isnan(value):
            self._warn_of_nan()
            return
        move = self.rule.check(value, temperature, low, high, counting=trainer.current_epoch >= self.warmup_epochs)
        if move is not None:
            self._move(trainer, policy, temperature, move)
        elif self.verbose:
            flat, low_checks = self.rule.state.flat_checks, self.rule.state.low_checks
            rank_zero_info(
                f"{self.monitor} {value:.4g}: temperature stays {temperature.mean:.4g} (flat for {count_checks(flat)}, "
                f"degraded for {count_checks(low_checks)})"
            )

    def _move(
        self, trainer: Trainer, policy: TemperaturePolicy, temperature: TemperatureRange, move: Move
    ) -> TemperatureRange:
        """Make a move, record and report it, and return the temperature after it."""
        moved = temperature * move.ratio
        ratio = f"× {move.ratio:.3g}" if move.ratio < 1 else f"÷ {1 / move.ratio:.3g}"
        reason = f"{move.reason}: temperature {ratio} → {moved.mean:.4g}"
        policy.multiplier.mul_(move.ratio)
        self.moves.append((trainer.global_step, move.ratio, reason))
        rank_zero_info(reason)
        return moved

    def replicated_state(self) -> dict[str, Any]:
        """Return the state that must be the same on every rank."""
        return vars(self.rule.state)

    def _bounds(self, policy: TemperaturePolicy) -> tuple[float, float]:
        return (
            max(policy.min_temperature, self.min_temperature or 0.0),
            min(policy.max_temperature, self.max_temperature or math.inf),
        )

    def _read_temperature(self) -> TemperatureRange:
        """Return the last training batch's temperatures, divided by the multiplier at that time."""
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
                "AdaptiveTemperature saw no temperature before this validation: no training step has called the "
                "Distiller in train mode. Call self.distiller(...) in training_step."
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
        return {
            **vars(self.rule.state),
            "temperature": None if temperature is None else list(temperature),
            "moves": list(self.moves),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        known = vars(AdaptiveState())
        self.rule.state = AdaptiveState(**{name: value for name, value in state_dict.items() if name in known})
        self.moves = list(state_dict.get("moves", ()))
        temperature = state_dict.get("temperature")
        self._temperature = None if temperature is None else TemperatureRange(*temperature)
