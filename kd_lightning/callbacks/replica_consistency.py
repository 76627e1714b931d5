"""A check that the temperature is the same on every rank."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from kd_lightning._lightning import callbacks_of
from kd_lightning.callbacks.common import find_distiller, find_holder
from kd_lightning.modules.between_ranks import check_replicas, distiller_state
from kd_lightning.ranking import check_counts


class ReplicaConsistency(Callback):
    """A check that stops the run when its ranks differ.

    Every ``every_n_steps`` optimiser steps, and at the end of training, ranks compare hashes of the policies'
    parameters and buffers (``multiplier`` among them), of the losses' weights, of ``kd_enabled``, of the teacher's
    checksum, and of the counters of :class:`AdaptiveTemperature` and :class:`EarlyStopDistillation`.
    :class:`~kd_lightning.DistillationModule` and :class:`DistillationCallback` compare all but the counters at the
    start of each epoch. Without a check, ranks differ silently once a policy keeps a statistic of its own batches
    without reducing it, or once code changes a buffer on one rank.

    The comparison synchronises host, device and ranks, so it is not made in every step. A single process skips it.

    Args:
        every_n_steps: Optimiser steps between comparisons.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.
        RuntimeError: If the ranks differ; the message names the tensors and the ranks.
        TypeError: If the run has no Distiller.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ReplicaConsistency(50)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        super().__init__()
        check_counts(every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self._checked_step = 0

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != self._checked_step:  # once per optimiser step
            self._checked_step = step
            self.check(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(trainer, pl_module)

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the ranks. Every rank must call this, because it is a collective."""
        if trainer.world_size == 1:
            return
        holder = find_holder(trainer, pl_module)
        distiller = find_distiller(trainer, pl_module)
        state = distiller_state(distiller, None if holder is None else holder.progress)
        for callback in callbacks_of(trainer):
            counters = getattr(callback, "replicated_state", None)
            if counters is not None:
                state |= {f"{callback.state_key}.{name}": value for name, value in counters().items()}
        check_replicas(trainer, state)
