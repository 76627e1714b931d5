"""Helpers of the callbacks: the run's Distiller, the monitored metric, and means over ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from kd_lightning._lightning import callbacks_of
from kd_lightning.distiller import Distiller
from kd_lightning.functional.temperature import check_number
from kd_lightning.modules.readings import has_validation
from kd_lightning.modules.run import HoldsDistiller
from kd_lightning.ranking import Mode, check_counts, check_mode, check_name


def find_holder(trainer: Trainer, pl_module: LightningModule) -> HoldsDistiller | None:
    """Return the module or callback of this library that distils; None for a Distiller in a module of one's own."""
    return next((each for each in (pl_module, *callbacks_of(trainer)) if isinstance(each, HoldsDistiller)), None)


def find_distiller(trainer: Trainer, pl_module: LightningModule) -> Distiller:
    """Return the run's Distiller."""
    holder = find_holder(trainer, pl_module)
    if holder is not None:
        return holder.distiller
    for child in pl_module.children():
        if isinstance(child, Distiller):
            return child
    raise TypeError(
        f"found no Distiller in this run: neither {type(pl_module).__name__} nor a callback has one. Train a "
        "DistillationModule, add a DistillationCallback, or give your LightningModule one: "
        "self.distiller = Distiller(...)."
    )


def is_validation_check(trainer: Trainer) -> bool:
    """Return True if a validation that ends now belongs to training: no sanity check, no ``validate``."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def read_metric(trainer: Trainer, monitor: str, owner: object) -> float:
    """Return the monitored metric's last value on this rank, which may be NaN."""
    metrics = trainer.callback_metrics
    if monitor not in metrics:
        raise RuntimeError(
            f"{type(owner).__name__} follows the metric {monitor!r}, which was not logged. There are: "
            f"{', '.join(sorted(metrics)) or 'none'}. Set monitor to one of them."
        )
    return metrics[monitor].squeeze().item()


def check_following(monitor: str, mode: Mode, patience: int, min_delta: float) -> None:
    """Raise if the arguments of a callback that follows a metric are of another type or outside their ranges."""
    check_name(monitor, mode)
    check_mode(monitor, mode)
    check_counts(patience=patience)
    check_number("min_delta", min_delta)
    if not 0 <= min_delta < math.inf:
        raise ValueError(f"min_delta must be finite and not negative, got {min_delta}.")


def check_validates(trainer: Trainer, owner: object) -> None:
    """Raise if a run does not validate, for a callback that follows a metric of it."""
    check_has_validation(trainer, owner)
    every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
    if every is not None and epochs is not None and 0 < epochs < every:
        raise MisconfigurationException(
            f"{type(owner).__name__} follows a metric of validation, but this run ends before its first: "
            f"check_val_every_n_epoch={every} is above max_epochs={epochs}. Lower it, or leave the callback out."
        )


def check_has_validation(trainer: Trainer, owner: object) -> None:
    """Raise if a run has no validation, for a callback that validates in its own time."""
    if not has_validation(trainer):
        raise MisconfigurationException(
            f"{type(owner).__name__} follows a metric of validation, but this run has none. Give fit validation data, "
            "the module a validation_step, and the Trainer limit_val_batches above 0; or leave the callback out."
        )


def mean_over_ranks(values: Sequence[float]) -> float:
    """Return the mean, independent of the order: exactly the value if all are equal, NaN if one is not finite.

    Example:
        >>> mean_over_ranks([0.1, 0.1, 0.1]), mean_over_ranks([0.1, float("inf")])
        (0.1, nan)
    """
    if not all(math.isfinite(value) for value in values):
        return math.nan
    mean = math.fsum(value / len(values) for value in values)
    return min(max(mean, min(values)), max(values))


def count_checks(count: int) -> str:
    """Return ``1 check``, ``2 checks`` and so on."""
    return f"{count} check" if count == 1 else f"{count} checks"
