"""The names under which modules and callbacks log what belongs to a stage."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from kd_lightning._lightning import callbacks_of


class NamesMetrics(Callback):
    """A callback whose ``pattern`` names the metrics of a run."""

    pattern: str


def naming_callbacks(trainer: Trainer) -> list[NamesMetrics]:
    """Return the callbacks of the run that name metrics: a run within the run needs them too."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, NamesMetrics)]


def metric_name(trainer: Trainer | None, stage: str, name: str) -> str:
    """Return the name of a stage's metric, ``val_acc`` unless a callback of the run names metrics otherwise."""
    for callback in naming_callbacks(trainer) if trainer is not None else []:
        return callback.pattern.format(stage=stage, name=name)
    return f"{stage}_{name}"


def has_validation(trainer: Trainer) -> bool:
    """Return True if a fit validates, as far as is known: whether loaders are empty is known once they are made."""
    return trainer.enable_validation and (trainer.val_dataloaders is None or any(trainer.num_val_batches))


def check_monitors(trainer: Trainer) -> None:
    """Raise if a callback follows a metric of validation in a fit without validation, where Lightning writes nothing.

    Raises:
        MisconfigurationException: If a callback's ``monitor`` is a metric of validation, and there is none.
    """
    stage = metric_name(trainer, "val", "acc").removesuffix("acc")
    for callback in callbacks_of(trainer) if not has_validation(trainer) else ():
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor.startswith(stage):
            raise MisconfigurationException(
                f"{type(callback).__name__} follows {monitor}, a metric of validation, but this run has none. Give fit "
                "validation data and the Trainer limit_val_batches above 0; or let the callback follow train_loss."
            )
