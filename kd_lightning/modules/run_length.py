"""The length of a fit in optimiser steps, for schedules that span the run."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import Dataset, IterableDataset

from kd_lightning._lightning import batches_done, callbacks_of


def check_batches(trainer: Trainer) -> None:
    """Raise if a fit has no batches, which Lightning passes over, or takes a dataset for a loader."""
    if trainer.num_training_batches == 0:
        raise ValueError(
            "fit trained on nothing: the training data has no batch. Give a dataset with samples; where it has fewer "
            "than batch_size, take a smaller batch_size or drop_last=False."
        )
    data = trainer.train_dataloader
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError(
            f"the training data is a {type(data).__name__}, a dataset, which gives single samples. Return batches: "
            "DataLoader(dataset, batch_size=64, shuffle=True)."
        )


class RunLength:
    """The number of optimiser steps of a fit, estimated anew at the start of each epoch.

    ``trainer.estimated_stepping_batches`` assumes that every epoch is like the first. Here an epoch counts with its own
    number of batches and its own gradient accumulation, so that in the last epoch the number is exact.
    """

    def __init__(self) -> None:
        self._epoch: int | None = None
        self._start = 0
        self._steps: int | None = None

    def steps(self, trainer: Trainer) -> int | None:
        """Return the optimiser steps of the whole fit, or None while their number is unknown."""
        limit = trainer.max_steps if trainer.max_steps >= 0 else None
        if trainer.sanity_checking:
            return limit  # no more, because the training loader is made after the sanity check
        if trainer.training and trainer.current_epoch != self._epoch:
            self._epoch, self._start, self._steps = trainer.current_epoch, trainer.global_step, _estimate(trainer)
        last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
        within = trainer.training and trainer.global_step > self._start  # before, is_last_batch is of the last epoch
        if last_epoch and within and trainer.is_last_batch and not math.isfinite(trainer.num_training_batches):
            return trainer.global_step + 1
        known = [steps for steps in (self._steps, limit) if steps is not None]
        return min(known, default=None)


def _estimate(trainer: Trainer) -> int | None:
    """Return the steps so far plus those to come, without regard to ``max_steps``; None if unknown."""
    epoch, epochs = trainer.current_epoch, trainer.max_epochs
    if epochs is None or epochs < 0:
        return None
    if not math.isfinite(batches := trainer.num_training_batches):  # a loader without length: as long as those before
        return round(trainer.global_step / epoch * epochs) if epoch else None
    accumulated = _accumulated(trainer, epoch)
    rest = math.ceil(batches / accumulated) - batches_done(trainer) // accumulated
    return (
        trainer.global_step
        + rest
        + sum(math.ceil(batches / _accumulated(trainer, e)) for e in range(epoch + 1, epochs))
    )


def _accumulated(trainer: Trainer, epoch: int) -> int:
    """Return the number of batches per optimiser step in an epoch."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches
