"""Weights that are in two of the blocks that are sharded."""

from typing import Any

from torch import nn

from kd_lightning import FrozenTeacher, ShardedDistillationModule
from kd_lightning.teachers import Sharded
from tests.unit.bad_input.case import Case


def tied() -> nn.Module:
    network = nn.Sequential(nn.Embedding(3, 3), nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 3))
    network[2].weight = network[0].weight
    for parameter in network.parameters():
        parameter.data.mul_(9.0)  # stands for training
    return network


MESSAGE = (
    "'0.weight' and '2.weight' of Sequential are one weight, which cannot be sharded in two blocks. Leave the modules "
    "of both out of the blocks, or name a module around them."
)
BLOCKS: list[Any] = [["1", "2"], ["0", "2"], "Embedding"]
CASES = [
    *(Case(f"a teacher's weight in two of the blocks {blocks}",
           lambda blocks=blocks: FrozenTeacher(tied(), placement=Sharded(blocks)), ValueError, MESSAGE)
      for blocks in BLOCKS),
    Case("a student's weight in two blocks",
         lambda: ShardedDistillationModule(blocks=["1", "0"], student=tied()), ValueError, MESSAGE),
]  # fmt: skip
