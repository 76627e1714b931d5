"""Ending distillation when it stops helping, while training continues."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from kd_lightning._lightning import state_key
from kd_lightning.callbacks.common import (
    Mode,
    check_following,
    check_validates,
    count_checks,
    find_distiller,
    find_holder,
    is_validation_check,
    mean_over_ranks,
    read_metric,
)
from kd_lightning.modules.between_ranks import gather
from kd_lightning.temperature import Progress


class EarlyStopDistillation(Callback):
    """A callback that turns the distillation term off when a validation metric stops improving.

    After ``patience`` validation checks without an improvement the Distiller's ``kd_enabled`` becomes False:
    ``kd_weight`` is 0 from the next step on, also after resuming. The task loss continues to train, because a much
    stronger teacher can harm a student in the late phase (J. H. Cho, B. Hariharan, 2019, "On the efficacy of knowledge
    distillation").

    The task term keeps its weight, so with ``task_weight=0.1`` the loss becomes a tenth of the task loss, which with
    SGD acts as a lower learning rate. The teacher still runs, for the metrics that compare it with the student.

    A check is a validation in ``fit``; the sanity check and ``validate`` do not count. All ranks decide alike, by the
    metric's mean over ranks. A metric that is not finite is no check and causes one warning.

    Args:
        monitor: A metric that is logged in validation; not ``val_loss`` or ``val_kd_loss``, which contain the
            distillation term.
        patience: Checks without improvement.
        mode: ``"max"`` if larger is better, ``"min"`` if smaller.
        min_delta: A change must exceed this to be an improvement.
        verbose: Whether to report improvements too.

    Raises:
        ValueError: If an argument is outside its range.
        MisconfigurationException: If the run has no validation.
        RuntimeError: If the metric was not logged; the message names the logged metrics.
        TypeError: If an argument is of another type, or if the run has no Distiller.

    State: the counters, per *monitor, mode*. ``kd_enabled`` is the Distiller's state.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = EarlyStopDistillation(monitor="val_acc", patience=5)
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        monitor: str = "val_acc",
        patience: int = 3,
        mode: Mode = "max",
        min_delta: float = 0.0,
        verbose: bool = False,
    ) -> None:
        super().__init__()
        check_following(monitor, mode, patience, min_delta)
        self.monitor = monitor
        self.patience = patience
        self.mode: Mode = mode
        self.min_delta = min_delta
        self.verbose = verbose
        self.best: float | None = None
        self.wait_count = 0
        self.stopped_step: int | None = None
        self._warned: set[str] = set()

    @property
    @override
    def state_key(self) -> str:
        return state_key(self, monitor=self.monitor, mode=self.mode)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_validates(trainer, self)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        distiller = find_distiller(trainer, pl_module)
        if self.stopped_step is not None:  # because a user's module does not restore it
            distiller.kd_enabled = False

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        distiller = find_distiller(trainer, pl_module)
        if not is_validation_check(trainer) or not distiller.kd_enabled:
            return
        value = mean_over_ranks(gather(trainer, read_metric(trainer, self.monitor, self)))
        if math.isnan(value):
            self._warn_once(f"{self.monitor} is not finite: EarlyStopDistillation counts no check while that is so.")
            return
        sign = 1.0 if self.mode == "max" else -1.0
        if self.best is None or sign * value > sign * self.best + self.min_delta:
            self.best, self.wait_count = value, 0
            if self.verbose:
                rank_zero_info(f"{self.monitor} improved to {value:.4g}: distillation goes on")
            return
        self.wait_count += 1
        if self.wait_count < self.patience:
            return
        holder = find_holder(trainer, pl_module)
        if distiller.task_weight(Progress() if holder is None else holder.progress) == 0:
            self._warn_once(
                "EarlyStopDistillation leaves distillation on: task_weight is 0, so nothing would be left to learn."
            )
            return
        distiller.kd_enabled = False
        self.stopped_step = trainer.global_step
        relation = "above" if self.mode == "max" else "below"
        rank_zero_info(
            f"{self.monitor} {value:.4g} not {relation} {self.best:.4g} for {count_checks(self.wait_count)}: "
            f"distillation off from step {self.stopped_step}, the task loss trains on"
        )

    def replicated_state(self) -> dict[str, Any]:
        """Return the state that must be the same on every rank."""
        return self.state_dict()

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(message)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "wait_count": self.wait_count, "stopped_step": self.stopped_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict.get("best")
        self.wait_count = state_dict.get("wait_count", 0)
        self.stopped_step = state_dict.get("stopped_step")
