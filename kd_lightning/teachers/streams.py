"""Streams whose samples carry an id, which names their row in a teacher cache."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset
from typing_extensions import override

from kd_lightning.teachers.indexed import HasRows, Indexed
from kd_lightning.teachers.weights import hashed


class StreamWithIds:
    """A stream of samples with ids for :meth:`FrozenTeacher.index <kd_lightning.FrozenTeacher.index>`.

    The order of the samples does not matter, nor how they are divided among ranks and workers. The first pass fills the
    cache, or ``kd-lightning cache-teacher``, which reads the stream to its end. A stream has no samples to look at
    beforehand, so that only the comparison of the first stored batch with the teacher detects random augmentation or
    another transform.

    Args:
        dataset: An ``IterableDataset``, or any iterable of samples.
        key: Where a sample has its id (key of a mapping, or position in a tuple), or a function from a sample to its
            id. Ids are integers from 0 to ``count`` − 1.
        count: Number of ids. The file has room for all.
        name: A text that identifies the data and their version, which the cache's file must match.

    Raises:
        ValueError: If ``count`` is below 1 or the name is empty; in a pass, if an id is not an integer in range.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader
        >>> from kd_lightning import FrozenTeacher, TeacherCache
        >>> network = nn.Linear(2, 3)
        >>> _ = network.weight.data.mul_(9.0)  # stands for training
        >>> teacher = FrozenTeacher(network, cache=TeacherCache(tempfile.mkdtemp() + "/teacher.cache"))
        >>> samples = [{"id": i, "x": torch.full((2,), float(i))} for i in (2, 0, 1)]
        >>> data = teacher.index(StreamWithIds(samples, key="id", count=3, name="counting, v1"))
        >>> for batch, rows in DataLoader(data, batch_size=2):
        ...     print(rows.tolist(), tuple(teacher.logits(batch["x"], rows).shape))
        [2, 0] (2, 3)
        [1] (1, 3)
    """

    def __init__(self, dataset: Iterable[Any], key: Hashable | Callable[[Any], int], count: int, name: str) -> None:
        if count < 1:
            raise ValueError(f"count is the number of ids of a stream, 1 or more, got {count}.")
        if not name:
            raise ValueError("name identifies a stream's data, such as 'laion, shards 0 to 99, v2', got ''.")
        self.dataset = dataset
        self.key = key
        self.count = count
        self.name = name

    def row(self, sample: Any) -> int:
        """Return the id of a sample, or raise if it is not an integer in range."""
        try:
            found: Any = self.key(sample) if callable(self.key) else sample[self.key]
            number = int(found)
        except (KeyError, IndexError, TypeError, ValueError):
            keys = f" with {', '.join(map(str, sample))}" if isinstance(sample, Mapping) else ""
            what = type(sample).__name__ + keys
            raise ValueError(
                f"a stream's sample must have an integer id under key={self.key!r}, got {what}. Name the key, or give "
                "a function from a sample to its id; a stream of batches must leave batching to the loader."
            ) from None
        if not 0 <= number < self.count or number != found:
            raise ValueError(f"a stream's ids are integers from 0 to count - 1 = {self.count - 1}, got {found}.")
        return number


class IndexedStream(HasRows, IterableDataset[Any]):
    """A stream whose samples carry their row in a teacher cache, as an :class:`IndexedDataset`'s do."""

    slots = None

    def __init__(self, stream: StreamWithIds, first: int, collate_fn: Callable[[Any], Any] | None = None) -> None:
        super().__init__(first, collate_fn)
        self.stream = stream

    def __iter__(self) -> Iterator[Indexed]:
        for sample in self.stream.dataset:
            yield Indexed(sample, self.first + self.stream.row(sample))  # pyright: ignore[reportArgumentType]  (one row)

    def __len__(self) -> int:
        """Return the stream's own length, from which a trainer knows its steps.

        Raises:
            TypeError: If the stream has no length.
        """
        return len(self.stream.dataset)  # pyright: ignore[reportArgumentType]

    @override
    def some(self, rows: NDArray[np.int64]) -> IterableDataset[Indexed]:
        return _SomeOfStream(self, rows)

    def fingerprint(self) -> str:
        """Return the hash of the name and the number of ids."""
        return hashed(f"{self.stream.count} {self.stream.name}")

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to a stream that shuffles by it."""
        pass_on = getattr(self.stream.dataset, "set_epoch", None)
        if callable(pass_on):
            pass_on(epoch)


class _SomeOfStream(IterableDataset[Indexed]):
    """The samples of a stream whose rows are wanted."""

    def __init__(self, stream: IndexedStream, rows: NDArray[np.int64]) -> None:
        self.stream = stream
        self.wanted = np.zeros(stream.stream.count, bool)
        self.wanted[rows - stream.first] = True

    def __iter__(self) -> Iterator[Indexed]:
        return (sample for sample in self.stream if self.wanted[sample.rows - self.stream.first])
