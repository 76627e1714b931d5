"""The teacher's cache in a run of Lightning: which rows of it a batch has, and which epoch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from kd_lightning._lightning import datamodule_of
from kd_lightning.distiller import Distiller
from kd_lightning.teachers import TeacherCache
from kd_lightning.teachers.indexed import index_training, split_index


class CachedRows:
    """The rows of the batch at hand in the teacher's cache, and the cache's epoch.

    Args:
        distiller: The Distiller of the run.
    """

    def __init__(self, distiller: Distiller) -> None:
        self.distiller = distiller
        self.rows: Tensor | None = None
        """The rows of the batch at hand; None where the teacher has no cache."""

    @property
    def caches(self) -> Sequence[TeacherCache]:
        """The caches of the teacher and its members; none without a teacher."""
        teacher = self.distiller.teacher
        return () if teacher is None else teacher.caches

    def index(self, trainer: Trainer) -> None:
        """Have the data module's batches name their rows in the teacher's cache."""
        teacher = self.distiller.teacher
        index_training(datamodule_of(trainer), teacher.index if teacher is not None and self.caches else None)

    def start_epoch(self, trainer: Trainer) -> None:
        """Select the slot of the epoch, and release a teacher whose caches have every row. A collective."""
        self.set_epoch(trainer.current_epoch)
        teacher = self.distiller.teacher
        if teacher is None or not self.caches:
            return
        whole = all(cache.complete for cache in self.caches)
        if trainer.strategy.reduce_boolean_decision(whole):  # so that the ranks stay alike
            teacher.release()

    def set_epoch(self, epoch: int) -> None:
        """Select the slot of an epoch."""
        for cache in self.caches:
            cache.set_epoch(epoch)

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Select the slot of a resumed fit, whose loader workers fetch batches before training starts."""
        if "loops" in checkpoint:
            loop = checkpoint["loops"]["fit_loop"]
            epochs = loop["epoch_progress"]["current"]
            done = loop["epoch_loop.batch_progress"]["is_last_batch"]
            self.set_epoch(epochs["ready" if done else "processed"])

    def take_rows(self, batch: Any, predicting: bool = False) -> Any:
        """Return the batch without its rows, which stay on the host: on the device, reading them would sync."""
        batch, self.rows = split_index(batch)
        if self.rows is None and self.distiller.teacher is not None and not predicting:
            self.rows = self.distiller.teacher.rows(batch)
        return batch

    def check_rows(self, rows: Tensor | None) -> None:
        """Raise if a training batch does not name its rows and the teacher has a cache."""
        if rows is None and self.caches:
            raise ValueError(
                "the teacher has a cache, but the training batch does not say which samples it has: make the loader of "
                "teacher.index(dataset), or give the teacher no cache."
            )
