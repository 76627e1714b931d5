"""A cache of teacher logits: computed once, then read from a memory map."""

from __future__ import annotations

import contextlib
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kd_lightning.functional.sparse import TeacherTarget
from kd_lightning.teachers.cache_file import Bytes, RowNumbers
from kd_lightning.teachers.cache_rows import DTYPES, RowCodec
from kd_lightning.teachers.cache_shards import StoredRows
from kd_lightning.teachers.indexed import IndexedDataset, input_fingerprints
from kd_lightning.teachers.streams import IndexedStream, StreamWithIds

_PART = 40  # bits of a row number below those that tell its part
_SAME_TEACHER = 0.1  # relative error of a row, because bfloat16 gives 0.01 and another input or teacher about 1


class TeacherCache(StoredRows):
    r"""Un-tempered teacher logits by sample, in a memory map: ``FrozenTeacher(network, checkpoint, cache=...)``.

    The teacher's forward pass is usually most of the cost of a training step. The teacher computes the rows that the
    cache lacks and the cache stores them: the first epoch fills the cache, or ``kd-lightning cache-teacher`` fills it
    ahead. Logits are stored before any temperature, so every policy stays valid. New rows are rounded like stored rows,
    so training gives the same bits with a cold and with a warm cache.

    A cache belongs to one teacher, one dataset and one transform. A file of another teacher, dataset or transform, a
    truncated file and a damaged file each raise an error that names the cause. Each process compares a row with its
    checksum at the first read, and the first batch of stored rows with the teacher's own logits.

    Validation data have a part of their own, ``index(dataset, part="val")``, in a file beside the first:
    ``teacher.val.cache`` beside ``teacher.cache``. Under ``augmentation`` their samples are drawn once.

    The file holds a header (4096 bytes, JSON and CRC-32), a CRC-32 of 4 bytes for each row, the rows, and a flag byte
    for each row: 2C + 5 bytes per sample and slot for float16. A row is written whole, under a lock, before its flag is
    set, so a killed build resumes, and processes of one machine may share a file. Machines must not write to one file
    over a network: build the file ahead, or give each machine its own.

    Args:
        path: Path of the file. The first written row creates the file and its parent folders.
        dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``. A logit that is too large for the type is an error.
        top_k: Store the k largest logits and spread the remaining mass (at T = 1) evenly over the other classes. Meant
            for large vocabularies and refused below 1,000 classes, because a temperature brings the tail back. A
            warning reports the error on the first rows. None stores all logits. Of tokens ``(B, L, V)`` store k
            log-probabilities and that of the rest, made at ``temperature``: 4k + 2 bytes a token in float16 (6k + 2
            above 65,536 classes). They are read as :class:`~kd_lightning.functional.Sparse` targets with
            ``tail="bucket"``, without a ``(B, L, V)`` tensor, and another temperature in the loss is an error. A
            teacher that gives such targets itself needs the ``top_k`` and ``temperature`` of those: they are stored as
            given, in 6k + 2 bytes, and keep their tail.
        augmentation: How to treat a dataset whose samples differ from fetch to fetch. None refuses the dataset.
            ``"fixed"`` draws each sample once, the same in every epoch. ``"replay"`` draws each sample ``slots`` times;
            epoch e takes slot e mod ``slots``; see :class:`~kd_lightning.teachers.IndexedDataset`.
        slots: Draws per sample, at least 2 for ``"replay"``, else 1. The file grows in proportion.
        seed: Seed of the draws.
        temperature: The teacher's temperature in the loss, for the ``top_k`` of tokens and for given targets; other
            logits are stored before any temperature.
        max_length: Of tokens ``(B, L, V)`` whose batches are padded to their longest sample: the positions of the
            longest sample of all, for which each row has room. Stored are the positions that the inputs'
            ``attention_mask`` (or ``decoder_attention_mask``) names, and their number, in 4 bytes. Padded positions
            come back without an opinion: logits of 0, or a uniform distribution. None: all samples have one length.

    Raises:
        ValueError: If an argument is outside its range; later, if the file is damaged or belongs to another run, if
            samples are random and ``augmentation`` is None, or if logits are not finite or too large.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from kd_lightning import FrozenTeacher
        >>> network = nn.Linear(4, 3)
        >>> _ = network.weight.data.mul_(3.0)  # stands for training
        >>> teacher = FrozenTeacher(network, cache=TeacherCache(tempfile.mkdtemp() + "/teacher.cache"))
        >>> data = teacher.index(TensorDataset(torch.randn(8, 4), torch.arange(8) % 3))
        >>> for (inputs, targets), index in DataLoader(data, batch_size=4, shuffle=True):
        ...     logits = teacher.logits(inputs, index)
        >>> teacher.cache
        TeacherCache(...teacher.cache, 8 of 8 rows, 11 bytes each)
    """

    def __init__(
        self,
        path: str | Path,
        dtype: Literal["float16", "bfloat16", "float32"] = "float16",
        top_k: int | None = None,
        augmentation: Literal["fixed", "replay"] | None = None,
        slots: int = 1,
        seed: int = 0,
        temperature: float = 1.0,
        max_length: int | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}. None stores all logits.")
        if not 0 < temperature < float("inf") or (top_k is None and temperature != 1):
            raise ValueError(
                f"temperature is that of the top_k of tokens, positive and finite, got {temperature!r} with "
                f"top_k={top_k}. All logits are stored before any temperature."
            )
        if max_length is not None and max_length < 1:
            raise ValueError(
                f"max_length is the length of the longest sample, 1 or more, got {max_length}. None: all samples have "
                "one length."
            )
        if augmentation not in (None, "fixed", "replay"):
            raise ValueError(f"augmentation must be None, 'fixed' or 'replay', got {augmentation!r}.")
        if not (slots >= 2 if augmentation == "replay" else slots == 1):
            raise ValueError(
                f"slots must be at least 2 with augmentation='replay' and 1 without, got {slots} with "
                f"{augmentation!r}. One draw of each sample is augmentation='fixed'."
            )
        super().__init__(path, slots)
        self.dtype: Literal["float16", "bfloat16", "float32"] = dtype
        self.top_k = top_k
        self.temperature = temperature
        self.max_length = max_length
        self._codec = RowCodec(dtype, top_k, temperature, max_length)
        self.augmentation = augmentation
        self.seed = seed
        self.dataset: Any = None
        self._compared = False
        self._epoch = 0
        self._others: dict[str, TeacherCache] = {}  # parts beside the training data

    # ---- teacher and dataset ---------------------------------------------------------------------------------------

    def index(
        self, dataset: Any, teacher: str, collate_fn: Callable[[Any], Any] | None = None, part: str = "train"
    ) -> IndexedDataset:
        """Wrap a dataset so that each sample carries its row, and open the cache for it; see :meth:`Teacher.index`.

        Args:
            dataset: A map-style dataset, an :class:`IndexedDataset` from another cache's ``index``, or a
                :class:`~kd_lightning.teachers.streams.StreamWithIds`.
            teacher: The teacher's fingerprint.
            collate_fn: See :class:`IndexedDataset`.
            part: Name of the data: ``"train"``, or that of other data, which are kept in a file of their own.
        """
        if part != "train":
            return self._part(part).index(dataset, teacher, collate_fn)
        if isinstance(dataset, StreamWithIds):
            return self._index_stream(dataset, teacher, collate_fn)
        slots = None if self.augmentation is None else self.slots
        if not isinstance(dataset, IndexedDataset):
            dataset = IndexedDataset(dataset, slots, self.seed, collate_fn, self.first)
        elif (dataset.slots, dataset.seed) != (slots, self.seed):
            raise ValueError(
                f"caches of one dataset must agree on its augmentation, but {self.path} has {slots} slots and seed "
                f"{self.seed}, another one {dataset.slots} and {dataset.seed}."
            )
        self._use(dataset, len(dataset), teacher, *input_fingerprints(dataset))
        if self not in dataset.caches:
            dataset.caches.append(self)
        return dataset

    def _index_stream(self, stream: StreamWithIds, teacher: str, collate_fn: Callable[[Any], Any] | None) -> Any:
        if self.augmentation is not None:
            raise ValueError(
                f"augmentation={self.augmentation!r} draws a sample by its number, which a stream does not allow. "
                "Leave it out, and augment before the samples are written."
            )
        indexed = IndexedStream(stream, self.first, collate_fn)
        self._use(indexed, stream.count, teacher, indexed.fingerprint(), "of a stream")
        return indexed

    def _use(self, dataset: IndexedDataset | IndexedStream, count: int, teacher: str, data: str, inputs: str) -> None:
        """Open the file of these data."""
        identity = {
            "teacher": teacher,
            "data": data,
            "inputs": inputs,
            "samples": count,
            "augmentation": self.augmentation,
            "slots": self.slots,
            "seed": self.seed,
            "dtype": self.dtype,
            "top_k": self.top_k if self.temperature == 1 else f"{self.top_k} at T = {self.temperature:g}",
            "max_length": self.max_length,
            "byteorder": sys.byteorder,
        }
        if self._identity not in (None, identity):
            raise ValueError(
                f"the cache {self.path} is in use for another teacher or dataset. A cache is of one: make another "
                "TeacherCache, with a path of its own, or name the part: teacher.index(dataset, part='val')."
            )
        self.dataset, self._identity, self._compared = dataset, identity, False
        self.leave_shard()
        self.set_epoch(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Select the slot of replayed augmentation; see :meth:`IndexedDataset.set_epoch`."""
        self._epoch = epoch
        if self.dataset is not None:
            self.dataset.set_epoch(epoch)

    # ---- rows ------------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> tuple[TeacherCache, ...]:
        """The caches of the training data and of each other part in use."""
        return (self, *self._others.values())

    def _part(self, name: str) -> TeacherCache:
        if name not in self._others:
            path = self.path.with_name(f"{self.path.stem}.{name}{self.path.suffix}")
            augmentation = None if self.augmentation is None else "fixed"
            options = (self.dtype, self.top_k, augmentation, 1, self.seed, self.temperature, self.max_length)
            part = TeacherCache(path, *options)
            part.first = (zlib.crc32(name.encode()) % 2**22 + 1) << _PART
            self._others[name] = part
        return self._others[name]

    @property
    def complete(self) -> bool:
        """True if all rows of all parts in use are written, and compared with the teacher."""
        return all(part._compared and part._file is not None and part._file.whole for part in self.parts)

    def logits(
        self,
        rows: Tensor,
        compute: Callable[[], TeacherTarget] | None,
        device: torch.device | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the logits of these rows as float32; compute and store the rows that are missing.

        Of tokens and with ``top_k``, and of a teacher that gives them, Sparse targets.

        Args:
            rows: Row numbers ``(B,)``, best on the CPU: on another device they cost a host sync.
            compute: Function that returns the teacher's logits of the whole batch: ``(B, C)``, or ``(B, ...)`` with one
                shape for all rows; or Sparse targets of ``top_k`` classes. None: the cache must have the rows.
            device: Device of the result, by default the CPU. The copy is asynchronous.
            inputs: The batch's inputs by name, of which a cache with ``max_length`` reads the padding mask.

        Raises:
            TypeError: If ``rows`` is no tensor.
            RuntimeError: If :meth:`index` has not been called.
            FileNotFoundError: If a row is missing and there is no ``compute``.
            ValueError: If a row does not match its checksum, if a row number is out of range, if the teacher's own
                logits differ from the stored logits, or if they cannot be stored.
        """
        if not isinstance(rows, Tensor):
            raise TypeError(
                f"the rows of a batch are a tensor (B,), got {type(rows).__name__}. Give the loader a batch_size, "
                "since batch_size=None leaves samples as they are."
            )
        numbers = rows.cpu().numpy()
        if numbers.size and numbers[0] >> _PART != self.first >> _PART:
            return self._of_row(int(numbers[0])).logits(rows, compute, device, inputs)
        identity, numbers = self._in_use(), numbers - self.first
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < identity["samples"] * self.slots:
            raise ValueError(
                f"the cache {self.path} has rows 0 to {identity['samples'] * self.slots - 1}, got {numbers.max()}: the "
                "batch is of another dataset."
            )
        new = np.ones(len(numbers), bool) if self._file is None else self._file.are_missing(numbers)
        if compute is None and new.any():
            raise FileNotFoundError(
                f"the cache {self.path} lacks row {numbers[new][0]}, and the teacher that would compute it is absent. "
                f"Give its checkpoint, or complete the cache where it is: kd-lightning cache-teacher.{self.unmerged()}"
            )
        if compute is not None and (new.any() or not self._compared):
            if new.any():
                self._warn_of_shards()
            self._keep(numbers, compute(), inputs)
        assert self._file is not None
        return self._codec.decode(self._file.read(numbers), self._file.shape, device, inputs)

    def _keep(self, rows: RowNumbers, computed: TeacherTarget, inputs: Mapping[str, Any] | None) -> None:
        """Write the teacher's logits of the rows that are missing, and compare those of the others."""
        encoded, shape = self._codec.encode(computed, inputs), self._codec.shape(computed)
        if self._file is None:
            self._codec.warn_of_top_k(computed, encoded, inputs)
            self._file = self._create(shape, encoded.shape[1])
        if shape != self._file.shape:
            raise ValueError(
                f"the cache {self.path} has rows of shape {tuple(self._file.shape)}, but the teacher gives "
                f"{tuple(shape)}. Delete the file to build it anew; batches padded to their longest sample need "
                "TeacherCache(..., max_length=...)."
            )
        new = self._file.are_missing(rows)  # read again, because another process may have written rows
        if not new.all():
            self._compare(rows[~new], encoded[~new])
            self._compared = True
        self._file.write(rows[new], encoded[new])

    def _of_row(self, row: int) -> TeacherCache:
        """Return the part that a row number tells, or raise if it is not in use."""
        for part in self._others.values():
            if row >> _PART == part.first >> _PART:
                return part
        raise RuntimeError(
            f"the cache {self.path} does not know the data of row {row}: wrap them first, "
            "DataLoader(teacher.index(dataset, part=...), ...)."
        )

    def read_ahead(self, rows: list[int]) -> None:
        """Bring rows that are written into memory and compare them with their checksums, where their samples are made.

        The training process then finds them in the page cache, and verified if it forked the loader's worker.
        """
        if self._file is None and self._shard is None:
            self._file = self._open(self.path)
        if self._file is not None and self._shard is None:
            numbers = np.array(rows) - self.first
            with contextlib.suppress(ValueError):  # because the training process reads the row and raises
                there = numbers[~self._file.are_missing(numbers)]
                self._file.request(there)
                self._file.read(there)

    def _compare(self, rows: RowNumbers, computed: Bytes) -> None:
        """Raise if the teacher's logits of this batch differ from the stored ones, as after MixUp on the batch."""
        assert self._file is not None
        shape, stored = self._file.shape, self._file.read(rows)
        error = torch.cat(
            [self._codec.error(have[None], want[None], shape) for have, want in zip(stored, computed, strict=True)]
        )
        worst = int(error.argmax())
        if error[worst] > _SAME_TEACHER:
            raise ValueError(
                f"the cache {self.path} does not have what the teacher says of this batch: row {rows[worst]} is "
                f"{error[worst]:.0%} off. Is the batch changed after the dataset (MixUp, augmentation on the device), "
                "or are its indices of another dataset? Make such changes in the dataset, or train without a cache."
            )

    def __repr__(self) -> str:
        if self._identity is None:
            return f"{type(self).__name__}({self.path})"
        rows = self._identity["samples"] * self.slots
        if self._file is None:
            return f"{type(self).__name__}({self.path}, 0 of {rows} rows)"
        written = np.count_nonzero(self._file.flags)
        return f"{type(self).__name__}({self.path}, {written} of {rows} rows, {self.row_bytes} bytes each)"
