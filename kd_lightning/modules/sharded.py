"""The module that distils into a student whose weights are sharded over ranks."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import WeightAveraging
from torch.distributed.fsdp import FSDPModule
from typing_extensions import override

from kd_lightning._lightning import callbacks_of
from kd_lightning.modules.distillation import DistillationModule
from kd_lightning.teachers.sharded import Blocks, blocks_of, check_blocks, shard


class ShardedDistillationModule(DistillationModule):
    """A :class:`DistillationModule` whose student is sharded over the ranks of Lightning's ``ModelParallelStrategy``.

    Each rank holds its part of the student's weights, gradients and optimiser state (torch's FSDP2); the weights of a
    block are gathered while that block runs. Policies, losses and projectors stay whole on each rank. Under another
    strategy nothing is sharded. For another layout override ``configure_model`` of a :class:`DistillationModule`.

    Args:
        blocks: What is gathered at once, as for :class:`~kd_lightning.teachers.Sharded`, which shards a teacher.
        **options: Arguments of :class:`DistillationModule`.

    Raises:
        TypeError: If ``blocks`` is neither names nor a number.
        ValueError: If ``blocks`` is empty or not positive, or if the student has no such blocks; at fit, if the
            strategy has a tensor-parallel dimension, or if a callback averages weights, since it copies the student.

    Example:
        >>> from kd_lightning.models import CausalTransformer
        >>> from lightning.pytorch.strategies import ModelParallelStrategy
        >>> module = ShardedDistillationModule(
        ...     blocks="base_model.blocks", student=CausalTransformer(dim=32, depth=2), shift_labels=True
        ... )
        >>> strategy = ModelParallelStrategy(data_parallel_size=8, tensor_parallel_size=1)  # Trainer(strategy=strategy)
    """

    def __init__(self, blocks: Blocks, **options: Any) -> None:
        check_blocks(blocks)
        super().__init__(**options)
        blocks_of(self.student, blocks)  # raises if there are none
        self.blocks = blocks

    @override
    def configure_model(self) -> None:
        """Shard the student, the first time only."""
        mesh = self.device_mesh
        if mesh is None or isinstance(self.student, FSDPModule):
            return
        copies = [each for each in callbacks_of(self.trainer) if isinstance(each, WeightAveraging)]
        if copies:
            raise ValueError(
                f"{type(copies[0]).__name__} keeps a copy of the student, which FSDP2 does not allow for a sharded "
                "one. Leave it out, or train a whole student under another strategy, such as ddp."
            )
        if (ranks := mesh["tensor_parallel"].size()) > 1:
            raise ValueError(
                f"ShardedDistillationModule shards over data-parallel ranks, but the strategy has "
                f"tensor_parallel_size={ranks}. Set tensor_parallel_size=1, or override configure_model of a "
                "DistillationModule and parallelise the student there."
            )
        shard(self.student, self.blocks, mesh["data_parallel"])
        self._run.follow(self.student)  # here, because the strategy next moves a teacher that copies it to the device
