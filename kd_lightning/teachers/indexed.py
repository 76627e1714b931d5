"""Datasets whose samples carry their row in a teacher cache and whose augmentation can be replayed."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from typing_extensions import override

if TYPE_CHECKING:
    from kd_lightning.teachers.cache import TeacherCache

_PROBES = 32  # samples that are hashed to distinguish datasets and transforms


class Indexed(NamedTuple):
    """A batch, and the row of each of its samples in a teacher cache."""

    batch: Any
    rows: Tensor


def split_index(batch: Any) -> tuple[Any, Tensor | None]:
    """Return the dataset's own batch, and the batch's rows or None.

    Example:
        >>> split_index(Indexed("batch", torch.tensor([3, 1])))
        ('batch', tensor([3, 1]))
        >>> split_index("batch")
        ('batch', None)
    """
    return (batch.batch, batch.rows) if isinstance(batch, Indexed) else (batch, None)


class HasRows:
    """Base class of data whose samples carry their row in a cache, from row ``first``.

    Args:
        first: The first row.
        collate_fn: Function that collates samples, by default torch's.
    """

    def __init__(self, first: int, collate_fn: Callable[[Any], Any] | None) -> None:
        self.first = first
        self._collate_fn = default_collate if collate_fn is None else collate_fn

    def some(self, rows: NDArray[np.int64]) -> Dataset[Any]:
        """Return the samples of these rows, of any slot, for instance those missing in a cache."""
        raise NotImplementedError

    def collate(self, samples: Any) -> Indexed:
        """Collate samples with the data's own function, and add their rows."""
        rows = torch.tensor([sample.rows for sample in samples])
        return Indexed(self._collate_fn([sample.batch for sample in samples]), rows)


class IndexedDataset(HasRows, Dataset[Any]):
    r"""A dataset whose samples carry their row in a teacher cache: :math:`\text{slot} \cdot N + \text{index}`.

    Rows of another part than the training data begin at ``first``, so that they tell their part.

    With ``slots``, random augmentation is replayed: before a sample is fetched, the global generators of torch, Python
    and NumPy are seeded with a hash of (``seed``, row), and their states are restored afterwards. Epoch e draws all
    samples in slot e mod ``slots``, so each sample has ``slots`` versions, the same in every run (the idea of Shen &
    Xing 2022, FKD, arXiv 2112.01528, whose files store the crops). The row travels with the sample, so the student's
    input and the cached logits match in any worker and order.

    :meth:`FrozenTeacher.index <kd_lightning.FrozenTeacher.index>` creates this dataset.

    Args:
        dataset: Any map-style dataset, with or without ``__getitems__``.
        slots: Versions of each sample. None leaves the dataset's random numbers alone.
        seed: Seed of the replayed augmentation.
        collate_fn: Function that collates samples of ``dataset``, by default torch's. With another function, pass
            :meth:`collate` to the loader.
        first: The first row.

    Raises:
        TypeError: If the dataset has no length or no ``[index]``.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> data = IndexedDataset(TensorDataset(torch.tensor([[0.5], [1.5], [2.5]])))
        >>> [x], rows = next(iter(DataLoader(data, batch_size=3, sampler=[2, 0, 1])))
        >>> x.flatten(), rows
        (tensor([2.5000, 0.5000, 1.5000]), tensor([2, 0, 1]))
    """

    def __init__(
        self,
        dataset: Any,
        slots: int | None = None,
        seed: int = 0,
        collate_fn: Callable[[Any], Any] | None = None,
        first: int = 0,
    ) -> None:
        super().__init__(first, collate_fn)
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise TypeError(
                f"a teacher cache needs samples with numbers, but {type(dataset).__name__} has no len() or no [index]. "
                "Give a map-style dataset, or kd_lightning.teachers.streams.StreamWithIds(dataset, key, count, name) "
                "where samples carry an id."
            )
        self.dataset = dataset
        self.slots = slots
        self.seed = seed
        self.caches: list[TeacherCache] = []
        """The caches whose rows a loader's workers read ahead."""
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # because persistent workers must see changes

    def set_epoch(self, epoch: int) -> None:
        """Select the slot of an epoch.

        Call this before each epoch, like ``DistributedSampler.set_epoch``; ``DistillationModule`` does so itself.
        """
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    @override
    def __getitem__(self, index: int) -> Indexed:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> _Samples:
        slot = int(self._epoch) % self.slots if self.slots else 0
        return self.fetch([self.first + slot * len(self) + index for index in indices])

    def fetch(self, rows: list[int]) -> _Samples:
        """Return the samples of these rows, of any slot."""
        for cache in self.caches:
            cache.read_ahead(rows)
        indices = [(row - self.first) % len(self) for row in rows]
        if self.slots is None:
            return _Samples(_items(self.dataset, indices), rows)
        seeds = [_mix(self.seed, row - self.first) for row in rows]
        samples = []
        with kept_generators():
            if hasattr(self.dataset, "replay") and (batch := self.dataset.replay(indices, seeds)) is not None:
                return _Samples(batch, rows)  # because this library's datasets replay a whole batch at once
            for index, seed in zip(indices, seeds, strict=True):
                seed_generators(seed)
                samples += _items(self.dataset, [index])
        return _Samples(samples, rows)

    @override
    def some(self, rows: NDArray[np.int64]) -> Rows:
        return Rows(self, rows)

    @override
    def collate(self, samples: Any) -> Indexed:
        if isinstance(samples, _Samples):
            return Indexed(self._collate_fn(samples.samples), torch.tensor(samples.rows))
        return super().collate(samples)


class _Samples(Sequence[Indexed]):
    """A sequence of samples that keeps a whole fetched batch for :meth:`IndexedDataset.collate`."""

    def __init__(self, samples: Any, rows: list[int]) -> None:
        self.samples = samples
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: Any) -> Any:
        return Indexed(self.samples[position], self.rows[position])  # pyright: ignore[reportArgumentType]  (one row)


def index_training(datamodule: object, index: Callable[..., Any] | None) -> None:
    """Have a data module index its data, if it has a method ``index_training(index)``.

    The method makes the training loader of ``index(dataset, collate)``, with its ``collate``, and a validation loader
    of ``index(dataset, collate, part="val")`` or of the dataset as it is; None: as without a cache.
    """
    method = getattr(datamodule, "index_training", None)
    if callable(method):
        method(index)


class Rows(Dataset[Any]):
    """A subset of an :class:`IndexedDataset`, given by rows of any slot."""

    def __init__(self, dataset: IndexedDataset, rows: Sequence[int] | NDArray[np.int64]) -> None:
        self.dataset = dataset
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @override
    def __getitem__(self, position: int) -> Indexed:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> _Samples:
        return self.dataset.fetch([int(self.rows[position]) for position in positions])


def _items(dataset: Any, indices: list[int]) -> Any:
    if callable(getattr(dataset, "__getitems__", None)):
        return dataset.__getitems__(indices)
    return [dataset[index] for index in indices]


# ---- random numbers ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """Restore the global generators of torch (CPU), Python and NumPy on exit."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002  (because transforms use it)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch (CPU), Python and NumPy."""
    torch.default_generator.manual_seed(seed)  # because torch.manual_seed seeds the devices, too
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def _mix(seed: int, row: int) -> int:
    """Return a 63-bit hash of seed and row, the same on every platform (splitmix64; Steele, Lea & Flood 2014)."""
    x = (seed * 0xD1342543DE82EF95 + (row + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return (x ^ x >> 31) >> 1


# ---- fingerprints ------------------------------------------------------------------------------------------------


def input_fingerprints(dataset: IndexedDataset) -> tuple[str, str]:
    """Hash the data and the transformed inputs, from 32 samples spread over the dataset.

    The first hash covers the number of samples, the dataset's own ``fingerprint()`` if it has one, and the integers and
    text in the samples (labels, tokens). The second hash covers the samples' floating-point numbers. A sample that
    differs from fetch to fetch is an error.
    """
    count = len(dataset)
    indices = sorted({round(i * (count - 1) / (_PROBES - 1)) for i in range(_PROBES)}) if count else []
    found = []
    with kept_generators():
        for seed, order in ((1, 1), (2, -1), (3, 1)):
            seed_generators(seed)
            samples = dataset.fetch([dataset.first + index for index in indices[::order]])
            found.append([_hash_sample(samples[position].batch) for position in range(len(indices))][::order])
    unequal = [index for index, *hashes in zip(indices, *found, strict=True) if len(set(hashes)) > 1]
    if unequal and dataset.slots is None:
        raise ValueError(
            f"sample {unequal[0]} of {type(dataset.dataset).__name__} is another one each time it is fetched, as with "
            "random augmentation: the teacher's cached logits would belong to another image. Switch augmentation off; "
            "or TeacherCache(..., augmentation='fixed'), one draw for each sample, the same in every epoch; or "
            "augmentation='replay', slots=K for K draws of each, taken in turn."
        )
    if unequal:
        raise ValueError(
            f"sample {unequal[0]} of {type(dataset.dataset).__name__} cannot be replayed: it is another one each time, "
            "although torch, random and numpy.random were seeded alike. Does a transform have a generator of its own, "
            "or draw for a whole batch at once? Let it use the global ones, for each sample, or train without a cache."
        )
    data, inputs = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    own = getattr(dataset.dataset, "fingerprint", None)
    data.update(f"{count} {own() if callable(own) else ''}".encode())
    for whole, floating in found[0]:
        data.update(whole)
        inputs.update(floating)
    return data.hexdigest(), inputs.hexdigest()


def _hash_sample(sample: Any) -> tuple[bytes, bytes]:
    """Hash a sample's other values and its floating-point numbers separately."""
    digests = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)

    def walk(part: Any) -> None:
        if isinstance(part, Mapping):
            for key in part:
                digests[0].update(str(key).encode())
                walk(part[key])
        elif isinstance(part, (tuple, list)):
            for item in part:
                walk(item)
        elif isinstance(part, Tensor):
            digest = digests[part.is_floating_point()]
            digest.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(part, np.ndarray):
            walk(torch.from_numpy(np.ascontiguousarray(part)))
        elif isinstance(part, float):
            digests[1].update(part.hex().encode())
        else:
            digests[0].update(part.tobytes() if hasattr(part, "tobytes") else repr(part).encode())

    walk(sample)
    return digests[0].digest(), digests[1].digest()
