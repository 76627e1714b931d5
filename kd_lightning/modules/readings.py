"""What is logged, when, and under which names."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from kd_lightning._lightning import callbacks_of, log_interval
from kd_lightning.distiller import DistillationOutput


class TemperatureLogger(Callback):
    """A callback that logs the temperature, so that :func:`step_readings` leaves the temperature out."""


def is_logging_step(trainer: Trainer) -> bool:
    """Return True if the loggers write in this training step, or if the epoch ends with it.

    Other steps skip ``self.log``, because each call costs about a millisecond.
    """
    every = log_interval(trainer)
    return trainer.is_last_batch or (every > 0 and (trainer.global_step + 1) % every == 0)


def step_readings(trainer: Trainer, out: DistillationOutput) -> dict[str, Tensor]:
    """Return what a training step logs: the losses, and the temperature unless a :class:`TemperatureLogger` runs."""
    losses = {"kd_loss": out.kd_loss, "task_loss": out.task_loss}
    losses |= {f"layer_loss/{name}": loss for name, loss in out.layer_losses.items()}
    values = {metric_name(trainer, "train", name): loss.detach() for name, loss in losses.items()}
    if not any(isinstance(callback, TemperatureLogger) for callback in callbacks_of(trainer)):
        values |= out.readings()
    return {name: value.float() for name, value in values.items()}


def final_scores(trainer: Trainer) -> str | None:
    """Return how good student and teacher are in validation, in perplexity or accuracy; None if neither was logged."""
    logged = trainer.callback_metrics
    for key, digits in (("perplexity", 3), ("acc", 4)):
        student, teacher = (metric_name(trainer, "val", name) for name in (key, f"teacher_{key}"))
        if student in logged and teacher in logged:
            scores = f"{student}: student {logged[student]:.{digits}f}, teacher {logged[teacher]:.{digits}f}"
            if key == "perplexity":
                return scores
            return f"{scores} (agreement {logged[metric_name(trainer, 'val', 'agreement')]:.4f})"
    return None


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
    """Raise if a callback follows a metric of validation in a fit without validation, which Lightning passes over."""
    stage = metric_name(trainer, "val", "acc").removesuffix("acc")
    for callback in callbacks_of(trainer) if not has_validation(trainer) else ():
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor.startswith(stage):
            raise MisconfigurationException(
                f"{type(callback).__name__} follows {monitor}, a metric of validation, but this run has none. Give fit "
                "validation data and the Trainer limit_val_batches above 0; or let the callback follow train_loss."
            )
