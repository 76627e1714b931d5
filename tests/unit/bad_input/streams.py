"""Streams whose samples have no usable ids."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from kd_lightning.teachers import FunctionTeacher, IndexedDataset, TeacherCache
from kd_lightning.teachers.streams import StreamWithIds
from tests.unit.bad_input.case import Case


class _Endless(IterableDataset[Any]):
    """Has no length."""

    def __iter__(self) -> Iterator[Any]:
        yield from iter(int, 1)


def _row(sample: Any, key: Any = "id") -> int:
    return StreamWithIds([], key, 10, "ten").row(sample)


def _without_batches() -> object:
    teacher = FunctionTeacher(lambda x: x, name="as it is", cache=TeacherCache("never-written.cache"))
    data = teacher.index(StreamWithIds([{"id": 0, "x": torch.ones(3)}], "id", 1, "one"))
    [(sample, row)] = DataLoader(data, batch_size=None)
    return teacher.logits(sample["x"], row)


NO_ID = (
    "Name the key, or give a function from a sample to its id; a stream of batches must leave batching to the loader."
)
CASES = [
    Case(
        "no samples",
        lambda: StreamWithIds([], "id", 0, "none"),
        ValueError,
        "count is the number of ids of a stream, 1 or more, got 0.",
    ),
    Case(
        "no name",
        lambda: StreamWithIds([], "id", 10, ""),
        ValueError,
        "name identifies a stream's data, such as 'laion, shards 0 to 99, v2', got ''.",
    ),
    Case(
        "another key",
        lambda: _row({"x": 1, "y": 2}),
        ValueError,
        f"a stream's sample must have an integer id under key='id', got dict with x, y. {NO_ID}",
    ),
    Case(
        "too short a tuple",
        lambda: _row((1,), 2),
        ValueError,
        f"a stream's sample must have an integer id under key=2, got tuple. {NO_ID}",
    ),
    Case(
        "text",
        lambda: _row({"id": "a-1"}),
        ValueError,
        f"a stream's sample must have an integer id under key='id', got dict with id. {NO_ID}",
    ),
    Case(
        "a batch",
        lambda: _row({"id": torch.arange(2)}),
        ValueError,
        f"a stream's sample must have an integer id under key='id', got dict with id. {NO_ID}",
    ),
    Case(
        "a loader without batches",
        lambda: _without_batches(),
        TypeError,
        "the rows of a batch are a tensor (B,), got int. Give the loader a batch_size, since batch_size=None leaves "
        "samples as they are.",
    ),
    Case(
        "beyond the count",
        lambda: _row({"id": 10}),
        ValueError,
        "a stream's ids are integers from 0 to count - 1 = 9, got 10.",
    ),
    Case(
        "no integer",
        lambda: _row({"id": 1.5}),
        ValueError,
        "a stream's ids are integers from 0 to count - 1 = 9, got 1.5.",
    ),
    Case(
        "replayed augmentation",
        lambda: TeacherCache("a.cache", augmentation="fixed").index(StreamWithIds([], "id", 10, "ten"), "teacher"),
        ValueError,
        "augmentation='fixed' draws a sample by its number, which a stream does not allow. Leave it out, and augment "
        "before the samples are written.",
    ),
    Case(
        "a stream as it is",
        lambda: IndexedDataset(_Endless()),
        TypeError,
        "a teacher cache needs samples with numbers, but _Endless has no len() or no [index]. Give a map-style "
        "dataset, or kd_lightning.teachers.streams.StreamWithIds(dataset, key, count, name) where samples carry an id.",
    ),
]
