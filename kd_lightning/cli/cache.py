"""Filling a teacher's cache with the trainer's processes, each of which writes a file of its own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from typing_extensions import override

from kd_lightning.modules import DistillationModule
from kd_lightning.teachers import TeacherCache
from kd_lightning.teachers.indexed import HasRows, split_index


def check_shard(num_shards: int, shard: int | None) -> None:
    """Raise unless both are left out, or the shard is one of ``num_shards``."""
    if num_shards < 1 or (num_shards > 1) != (shard is not None) or not 0 <= (shard or 0) < num_shards:
        raise ValueError(
            f"--num_shards says into how many parts a build is divided and --shard which one this is, from 0, got "
            f"num_shards={num_shards} and shard={shard}. Give both, such as --num_shards 8 --shard "
            "$SLURM_ARRAY_TASK_ID; neither puts the parts together."
        )


def fill_caches(
    trainer: Trainer, module: DistillationModule, loaders: Sequence[DataLoader[Any]], num_shards: int, shard: int | None
) -> None:
    """Compute the rows that the caches of the module's teacher lack, merge the files of shards, and verify.

    Args:
        trainer: Runs the prediction; each of its processes takes a part of the rows.
        module: The module, whose teacher has caches.
        loaders: Loaders of the data, of which those are cached that read from ``teacher.index(dataset)``.
        num_shards: Number of builds that share the work. With more than one, files are left to be merged.
        shard: Which of them this is, from 0.
    """
    parts = [part for cache in module.teacher.caches for part in cache.parts]
    indexed = [loader for loader in loaders if isinstance(getattr(loader, "dataset", None), HasRows)]
    if trainer.world_size > 1 and any(isinstance(loader.dataset, IterableDataset) for loader in indexed):
        raise ValueError(
            f"cache-teacher cannot tell which of {trainer.world_size} processes gets which samples of a stream. Give "
            "--trainer.devices=1, and share the work by --num_shards and --shard: each job reads the whole stream and "
            "computes its own ids."
        )
    builder = _CacheBuilder(module, parts, indexed, num_shards, shard or 0)
    if trainer.world_size == 1:
        builder.take_rows()
    if any(len(part.missing()) for part in parts):
        trainer.predict(builder, return_predictions=False)
    for part in parts:
        part.leave_shard()
    if not trainer.is_global_zero:
        return
    if num_shards > 1:
        print(f"Shard {shard} of {num_shards} is filled. After the last: kd-lightning cache-teacher without --shard.")
        return
    for part in parts:
        part.merge()
        part.verify()
        print(part)
        if rest := len(part.missing()):
            warnings.warn(
                f"{rest} rows of the cache {part.path} are not filled, because their samples did not come: is the "
                "stream's count larger than the number of its ids, or limit_predict_batches set?",
                stacklevel=2,
            )


class _CacheBuilder(LightningModule):
    """A module that predicts with the teacher of another, which fills the teacher's caches."""

    def __init__(
        self,
        module: DistillationModule,
        parts: Sequence[TeacherCache],
        loaders: Sequence[DataLoader[Any]],
        num_shards: int,
        shard: int,
    ) -> None:
        super().__init__()
        self.module = module
        self.parts = parts
        self.loaders = loaders
        self.num_shards = num_shards
        self.shard = shard

    @override
    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1:  # only now there are all ranks
            self.take_rows(self.trainer)

    def take_rows(self, trainer: Trainer | None = None) -> None:
        """Take the rows of this process, a shard for each of a trainer's ranks, after merging an earlier build."""
        rank, ranks = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        if self.num_shards == 1 and rank == 0:
            for part in self.parts:
                part.merge()
        if trainer is not None:
            trainer.strategy.barrier()
        if self.num_shards * ranks > 1:
            for part in self.parts:
                part.take_shard(self.shard * ranks + rank, self.num_shards * ranks)

    @override
    def predict_dataloader(self) -> list[DataLoader[Any]]:
        return [loader for each in self.loaders if (loader := self._rest(each)) is not None]

    def _rest(self, loader: DataLoader[Any]) -> DataLoader[Any] | None:
        dataset = loader.dataset
        assert isinstance(dataset, HasRows)
        parts = [part for part in self.parts if part.first == dataset.first]
        missing = np.unique(np.concatenate([part.missing() for part in parts]))
        if not len(missing) and self.trainer.world_size == 1:
            return None
        rows = dataset.some(missing if len(missing) else np.array(parts[0].rows[:1]))  # because each rank needs a batch
        sampler = None  # of a stream
        if not isinstance(rows, IterableDataset):  # else Lightning divides the rows
            sampler = DistributedSampler(rows, num_replicas=1, rank=0, shuffle=False)
        return DataLoader(
            rows,
            batch_size=loader.batch_size,
            sampler=sampler,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            worker_init_fn=loader.worker_init_fn,  # which may divide a stream among workers
        )

    @override
    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Tensor:
        batch, rows = split_index(batch)
        teacher = self.module.teacher
        assert teacher is not None
        return teacher.logits(self.module.unpack(batch)[0], rows, self.module.extract_logits)

    @override
    def on_predict_end(self) -> None:
        self.trainer.strategy.barrier()  # because rank 0 merges what all have written
