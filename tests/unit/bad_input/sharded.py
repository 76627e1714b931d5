"""Bad ways to shard a teacher or a student."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from kd_lightning import FrozenTeacher, ShardedDistillationModule
from kd_lightning.teachers import Sharded, TeacherCache
from tests.unit.bad_input.case import Case


def teacher(blocks: Any, **options: Any) -> Callable[[], object]:
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    for parameter in network.parameters():
        parameter.data.mul_(9.0)  # stands for training
    return lambda: FrozenTeacher(network, placement=Sharded(blocks), **options)


NO_BLOCKS = (
    "blocks must name at least one class or module, such as 'LlamaDecoderLayer' or 'model.layers', or be a positive "
    "number of parameters, got {!r}."
)
TYPE = "blocks must be the name of a class or of a module, several of them, or a number of parameters, got {!r}."
CASES = [
    Case("a student without such blocks",
         lambda: ShardedDistillationModule(blocks="Blok", student=nn.Sequential(nn.Linear(2, 2))), ValueError,
         "Sequential has no module or class 'Blok' to shard. Its classes are Linear, Sequential."),
    Case("a student with blocks of no name", lambda: ShardedDistillationModule(blocks="", student=nn.Linear(2, 2)),
         ValueError, NO_BLOCKS.format("")),
    Case("no blocks", lambda: Sharded([]), ValueError, NO_BLOCKS.format([])),
    Case("an empty name of blocks", lambda: Sharded(""), ValueError, NO_BLOCKS.format("")),
    Case("blocks of no parameters", lambda: Sharded(0), ValueError, NO_BLOCKS.format(0)),
    Case("a number among the names of blocks", lambda: Sharded(["Linear", 3]), TypeError,  # pyright: ignore
         TYPE.format(["Linear", 3])),
    Case("True as blocks", lambda: Sharded(True), TypeError, TYPE.format(True)),
    Case("None as blocks", lambda: Sharded(None), TypeError, TYPE.format(None)),  # pyright: ignore
    Case("blocks that the network has not", teacher("Blok"), ValueError,
         "Sequential has no module or class 'Blok' to shard. Its classes are Linear, Sequential."),
    Case("blocks smaller than any", teacher(5), ValueError,
         "Sequential has no part of several modules with at most 5 parameters. Give a greater number, or the name of a "
         "class or module."),
    Case("a sharded teacher that is compiled", teacher("Linear", compile=True), ValueError,
         "placement=Sharded(blocks='Linear') gathers weights while the network runs, which neither a program nor a "
         "compiled network allows: give the network itself, without compile."),
    Case("a sharded teacher with a cache", teacher("Linear", cache=TeacherCache(Path("cache.bin"))), ValueError,
         "placement=Sharded(blocks='Linear') runs the teacher on all ranks at once, but a rank whose samples are in "
         "the cache does not run it, and the others would wait. Fill the cache first with a teacher that is whole, "
         "such as placement='offload', or leave out the cache."),
]  # fmt: skip
