"""Shards of a cache that are not merged where its rows are needed."""

import tempfile
from pathlib import Path

import torch

from kd_lightning import FrozenTeacher
from kd_lightning.teachers import TeacherCache
from tests.helpers import make_network
from tests.unit.bad_input.case import Case

CACHE = Path(tempfile.mkdtemp()) / "teacher.cache"
WEIGHTS = CACHE.with_name("teacher.pt")
SHARDS = (
    "Shards that are not merged lie beside it (teacher.cache.1-of-2), and their rows do not count: merge them with "
    "kd-lightning cache-teacher, with the same configuration and without --shard."
)


def _with_a_shard() -> TeacherCache:
    cache = TeacherCache(CACHE)
    cache.index([0, 1, 2, 3], "teacher")
    cache.take_shard(1, 2)
    cache.logits(torch.tensor([2, 3]), lambda: torch.zeros(2, 3))
    cache.leave_shard()
    return cache


CASES = [
    Case(
        "rows without a teacher",
        lambda: _with_a_shard().logits(torch.tensor([3]), None),
        FileNotFoundError,
        f"the cache {CACHE} lacks row 3, and the teacher that would compute it is absent. Give its checkpoint, or "
        f"complete the cache where it is: kd-lightning cache-teacher. {SHARDS}",
    ),
    Case(
        "a teacher whose weights are absent",
        lambda: (_with_a_shard(), FrozenTeacher(make_network(), WEIGHTS, cache=TeacherCache(CACHE)).load()),
        FileNotFoundError,
        f"the teacher's weights {WEIGHTS} are absent, and the cache {CACHE} lacks rows. {SHARDS}",
    ),
]
