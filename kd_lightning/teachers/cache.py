"""The teacher's logits, computed once and read from a memory map ever after."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_lightning.teachers.indexed import IndexedDataset, input_fingerprints

try:
    import fcntl
except ImportError:  # Windows has no such locks: there only one process may write
    fcntl = None

__all__ = ["TeacherCache"]

_MAGIC = b"KDLCACHE"
_VERSION = 1
_HEADER = 4096  # bytes: magic, JSON, zeros, CRC-32 of all before it
_WRITTEN = 0xA5
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_LEAST_CLASSES_FOR_TOP_K = 1000
_SAME_TEACHER = 0.1  # relative error of a row; bfloat16 makes 0.01, another input or teacher about 1

Bytes = NDArray[np.uint8]
RowNumbers = NDArray[np.int64]


class TeacherCache:
    r"""Un-tempered teacher logits by sample, in a memory map: ``FrozenTeacher(network, checkpoint, cache=...)``.

    The teacher is usually most of the cost of a step. What the cache does not have yet the teacher computes and the
    cache keeps, so that the first epoch fills it, or ``kd-lightning cache-teacher`` does ahead. Logits are stored
    before any temperature: every policy stays valid. Training gives the same bits whether a row was there or is new,
    since new ones are rounded, too.

    A cache belongs to one teacher, one dataset and one transform, and says so: another teacher's, another dataset's, a
    truncated or a damaged file is an error that tells which. Every row is compared with its checksum when a process
    first reads it, and the first batch that is read with what the teacher itself says of it. Validation does without.

    The file: a header (4096 bytes, JSON and CRC-32), a CRC-32 of 4 bytes for each row, the rows, a flag byte for each
    row; that is 2C + 5 bytes a sample and slot for float16. Rows are written whole before their flag is set, under a
    lock, so that a build goes on where it was killed, and processes of one machine may share a file. Machines should
    not write to one file over a network: build it ahead, or give each its own.

    Args:
        path: The file; made when the first row is written, with the folders above it.
        dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``. A logit that is too large for it is an error.
        top_k: Store the k largest logits and spread the rest of the mass (at T = 1) evenly over the other classes. For
            large vocabularies only, refused below 1,000 classes: a temperature brings the tail back. Its error on the
            first rows is said in a warning. None: all logits.
        augmentation: What to do with a dataset that gives another sample each time. None: refuse it. ``"fixed"``: one
            draw for each sample, the same in every epoch. ``"replay"``: ``slots`` draws of each, taken in turn, epoch e
            that of slot e mod ``slots``; see :class:`~kd_lightning.teachers.IndexedDataset`.
        slots: Draws of each sample, at least 2 for ``"replay"``, else 1. The file grows with it.
        seed: Of the draws.

    Raises:
        ValueError: A value outside its range; later, a file that is not this run's or is damaged, random samples
            without ``augmentation``, logits that are not finite or too large.

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
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}. None stores all logits.")
        if augmentation not in (None, "fixed", "replay"):
            raise ValueError(f"augmentation must be None, 'fixed' or 'replay', got {augmentation!r}.")
        if not (slots >= 2 if augmentation == "replay" else slots == 1):
            raise ValueError(
                f"slots must be at least 2 with augmentation='replay' and 1 without, got {slots} with "
                f"{augmentation!r}. One draw of each sample is augmentation='fixed'."
            )
        self.path = Path(path)
        self.dtype = dtype
        self.top_k = top_k
        self.augmentation = augmentation
        self.slots = slots
        self.seed = seed
        self.dataset: IndexedDataset | None = None
        self._identity: dict[str, Any] | None = None
        self._file: _File | None = None
        self._compared = False
        self._epoch = 0

    # ---- what it is of ---------------------------------------------------------------------------------------------

    def index(self, dataset: Any, teacher: str, collate_fn: Callable[[Any], Any] | None = None) -> IndexedDataset:
        """Wrap a dataset so that its samples name their rows, and open the cache for it.

        Args:
            dataset: A map-style dataset, or an :class:`IndexedDataset` that another cache has made of one.
            teacher: The teacher's fingerprint.
            collate_fn: See :class:`IndexedDataset`.

        Raises:
            ValueError: The file is not of this teacher, dataset and transform, or is damaged; or the samples are
                random.
        """
        slots = None if self.augmentation is None else self.slots
        if not isinstance(dataset, IndexedDataset):
            dataset = IndexedDataset(dataset, slots, self.seed, collate_fn)
        elif (dataset.slots, dataset.seed) != (slots, self.seed):
            raise ValueError(
                f"caches of one dataset must agree on its augmentation, but {self.path} has {slots} slots and seed "
                f"{self.seed}, another one {dataset.slots} and {dataset.seed}."
            )
        data, inputs = input_fingerprints(dataset)
        identity = {
            "teacher": teacher,
            "data": data,
            "inputs": inputs,
            "samples": len(dataset),
            "augmentation": self.augmentation,
            "slots": self.slots,
            "seed": self.seed,
            "dtype": self.dtype,
            "top_k": self.top_k,
            "byteorder": sys.byteorder,
        }
        if self._identity not in (None, identity):
            raise ValueError(
                f"the cache {self.path} is in use for another teacher or dataset. A cache is of one: make another "
                "TeacherCache, with a path of its own. Validation data need none."
            )
        self.dataset, self._identity, self._compared = dataset, identity, False
        self._file = _File(self.path, identity) if self.path.exists() else None
        self.set_epoch(self._epoch)
        return dataset

    def set_epoch(self, epoch: int) -> None:
        """Choose the slot of replayed augmentation; see :meth:`IndexedDataset.set_epoch`."""
        self._epoch = epoch
        if self.dataset is not None:
            self.dataset.set_epoch(epoch)

    # ---- what it has -----------------------------------------------------------------------------------------------

    def missing(self) -> RowNumbers:
        """The rows that are not written yet."""
        if self._file is None:
            return np.arange(self._in_use()["samples"] * self.slots)
        return np.flatnonzero(self._file.flags == 0)

    def verify(self) -> None:
        """Compare every written row with its checksum.

        Raises:
            ValueError: A row is damaged.
        """
        if self._file is not None:
            for rows in np.array_split(np.flatnonzero(self._file.flags), max(len(self._file.flags) // 4096, 1)):
                self._file.read(rows)

    def logits(self, rows: Tensor, compute: Callable[[], Tensor], device: torch.device | None = None) -> Tensor:
        """The logits of these rows as float32: read, or computed and kept.

        Args:
            rows: Row numbers ``(B,)``, best on the CPU: elsewhere they are waited for.
            compute: Gives the teacher's logits of the whole batch, ``(B, C)`` or another fixed shape of a row.
            device: Where the result goes, without waiting for it; the CPU by default.

        Raises:
            ValueError: A row is damaged; or the teacher's own logits differ from those that were read.
        """
        identity, numbers = self._in_use(), rows.cpu().numpy()
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < identity["samples"] * self.slots:
            raise ValueError(
                f"the cache {self.path} has rows 0 to {identity['samples'] * self.slots - 1}, got {numbers.max()}: the "
                "batch is of another dataset."
            )
        new = np.ones(len(numbers), bool) if self._file is None else self._file.are_missing(numbers)
        if new.any() or not self._compared:
            computed = compute()
            encoded = self._encode(computed)
            shape = list(computed.shape[1:])
            if self._file is None:
                self._warn_of_top_k(computed, encoded)
                _File.create(self.path, identity, shape, encoded.shape[1])
                self._file = _File(self.path, identity)
                new = self._file.are_missing(numbers)  # another process may have been faster
            if shape != self._file.shape:
                raise ValueError(
                    f"the cache {self.path} has rows of shape {tuple(self._file.shape)}, but the teacher gives "
                    f"{tuple(shape)}. Delete the file to build it anew; rows of changing length cannot be cached."
                )
            if not new.all():
                self._compare(numbers[~new], encoded[~new])
                self._compared = True
            self._file.write(numbers[new], encoded[new])
        assert self._file is not None
        return self._decode(self._file.read(numbers), self._file.shape, device)

    def _in_use(self) -> dict[str, Any]:
        if self._identity is None:
            raise RuntimeError(
                f"the cache {self.path} does not know its dataset yet: wrap it first, "
                "DataLoader(teacher.index(dataset), ...)."
            )
        return self._identity

    def _compare(self, rows: RowNumbers, computed: Bytes) -> None:
        """That the student is shown what the cache was made from, whatever happens to a batch after the dataset."""
        assert self._file is not None
        shape = self._file.shape
        have, want = (self._decode(part, shape).flatten(1) for part in (self._file.read(rows), computed))
        error = (have - want).norm(dim=1) / (want - want.mean(1, keepdim=True)).norm(dim=1).clamp(min=1e-6)
        worst = int(error.argmax())
        if error[worst] > _SAME_TEACHER:
            raise ValueError(
                f"the cache {self.path} does not have what the teacher says of this batch: row {rows[worst]} is "
                f"{error[worst]:.0%} off. Is the batch changed after the dataset (MixUp, augmentation on the device), "
                "or are its indices of another dataset? Make such changes in the dataset, or train without a cache."
            )

    # ---- one row's bytes -------------------------------------------------------------------------------------------

    def _encode(self, logits: Tensor) -> Bytes:
        logits = logits.detach().float().cpu()
        if self.top_k is not None:
            values, classes = self._top_k(logits)
            parts = [values.to(_DTYPES[self.dtype]), classes.to(torch.int32)]
        else:
            values = logits.flatten(1)
            parts = [values.to(_DTYPES[self.dtype])]
        if not bool(parts[0].isfinite().all()):
            if not bool(values.isfinite().all()):
                raise ValueError("the teacher's logits are not finite: they cannot be cached, nor learnt from.")
            raise ValueError(
                f"the teacher has a logit of {float(values.abs().max()):.4g}, too large for {self.dtype} "
                f"(at most {torch.finfo(_DTYPES[self.dtype]).max:g}): TeacherCache(..., dtype='float32')."
            )
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], 1).numpy()

    def _decode(self, rows: Bytes, shape: list[int], device: torch.device | None = None) -> Tensor:
        encoded = torch.from_numpy(rows)
        if device is not None and device.type == "cuda":
            encoded = encoded.pin_memory()
        encoded = encoded.to(device, non_blocking=True)
        if self.top_k is None:
            return encoded.view(_DTYPES[self.dtype]).float().reshape(-1, *shape)
        split = (self.top_k + 1) * _DTYPES[self.dtype].itemsize
        values = encoded[:, :split].contiguous().view(_DTYPES[self.dtype]).float()
        classes = encoded[:, split:].contiguous().view(torch.int32).long()
        return values[:, -1:].repeat(1, *shape).scatter(1, classes, values[:, :-1])

    def _top_k(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logits and, last, the one logit that all others get; and the classes of the largest."""
        assert self.top_k is not None
        if logits.dim() != 2 or not _LEAST_CLASSES_FOR_TOP_K <= logits.shape[1] > self.top_k:
            raise ValueError(
                f"top_k={self.top_k} is for logits (N, C) of at least {_LEAST_CLASSES_FOR_TOP_K} classes, and of more "
                f"than k, got {tuple(logits.shape)}: a temperature brings the tail back, and the gradient would be "
                "wrong. Store all logits, top_k=None."
            )
        values, classes = logits.topk(self.top_k)
        tail = logits.scatter(1, classes, -math.inf).logsumexp(1, keepdim=True)
        return torch.cat([values, tail - math.log(logits.shape[1] - self.top_k)], 1), classes

    def _warn_of_top_k(self, logits: Tensor, encoded: Bytes) -> None:
        if self.top_k is None:
            return
        exact, kept = logits.detach().float().cpu(), self._decode(encoded, list(logits.shape[1:]))
        errors = []
        for t in (1, 2, 4):
            p, q = (exact / t).softmax(1), (kept / t).softmax(1)
            errors.append(f"{float((q - p).norm() / (p - 1 / p.shape[1]).norm()):.2g} at T = {t}")
        warnings.warn(
            f"top_k={self.top_k} of {logits.shape[1]} classes: on the first rows the gradient of an untrained student "
            f"is wrong by a factor of {', '.join(errors)}.",
            stacklevel=4,
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}  # another process opens the file itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._identity is not None and self.path.exists():
            self._file = _File(self.path, self._identity)

    def __repr__(self) -> str:
        if self._identity is None:
            return f"{type(self).__name__}({self.path})"
        rows = self._identity["samples"] * self.slots
        size = "" if self._file is None else f", {self._file.row_bytes + 5} bytes each"
        return f"{type(self).__name__}({self.path}, {rows - len(self.missing())} of {rows} rows{size})"


class _Layout(NamedTuple):
    """Where the parts of a file begin, after the header."""

    checksums: int
    rows: int
    flags: int
    end: int

    @classmethod
    def of(cls, count: int, row_bytes: int) -> _Layout:
        rows = _HEADER + 4 * count
        flags = rows + row_bytes * count
        return cls(_HEADER, rows, flags, flags + count)


class _File:
    """One open cache file: its checked header, and arrays over its parts."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        header = self._read_header(identity)
        self.shape: list[int] = header["shape"]
        self.row_bytes: int = header["row_bytes"]
        count = header["samples"] * header["slots"]
        layout, size = _Layout.of(count, self.row_bytes), path.stat().st_size
        if size != layout.end:
            self._fail(f"is {'truncated' if size < layout.end else 'too long'}: {size} bytes, {layout.end} expected")
        self.writable = os.access(path, os.W_OK)
        whole = np.asarray(np.memmap(path, np.uint8, "r+" if self.writable else "r"))
        self.checksums = whole[layout.checksums : layout.rows].view(np.uint32)
        self.rows = whole[layout.rows : layout.flags].reshape(count, self.row_bytes)
        self.flags = whole[layout.flags :]
        self._verified = np.zeros(count, bool)
        self.are_missing(np.arange(count))

    @staticmethod
    def create(path: Path, identity: dict[str, Any], shape: list[int], row_bytes: int) -> None:
        """Make the file with all its space, in one step; where another process has made it, leave that one."""
        header = {"version": _VERSION, **identity, "shape": shape, "row_bytes": row_bytes}
        block = (_MAGIC + json.dumps(header).encode()).ljust(_HEADER - 4, b"\0")
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(own, "wb") as file:
                file.write(block + zlib.crc32(block).to_bytes(4, "little"))
                file.flush()
                end = _Layout.of(identity["samples"] * identity["slots"], row_bytes).end
                if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and no crash later
                    os.posix_fallocate(file.fileno(), 0, end)
                else:
                    file.truncate(end)
            with contextlib.suppress(FileExistsError):
                os.link(own, path)
        finally:
            own.unlink(missing_ok=True)

    def are_missing(self, rows: RowNumbers) -> NDArray[np.bool_]:
        """Which of the rows are not written."""
        flags = self.flags[rows]
        wrong = (flags != 0) & (flags != _WRITTEN)
        if wrong.any():
            self._fail(f"is damaged: the flag of row {rows[wrong][0]} is {flags[wrong][0]:#x}")
        return flags == 0

    def read(self, rows: RowNumbers) -> Bytes:
        """The bytes of written rows, each compared with its checksum the first time."""
        found = self.rows[rows]
        new = np.flatnonzero(~self._verified[rows])
        if new.size:
            wrong = new[self.checksums[rows[new]] != _checksums(rows[new], found[new])]
            if wrong.size:  # perhaps another process is at it: look again when it is not
                with self._locked():
                    found[wrong] = self.rows[rows[wrong]]
                    wrong = wrong[self.checksums[rows[wrong]] != _checksums(rows[wrong], found[wrong])]
            if wrong.size:
                self._fail(f"is damaged: row {rows[wrong[0]]} does not match its checksum")
            self._verified[rows[new]] = True
        return found

    def write(self, rows: RowNumbers, encoded: Bytes) -> None:
        """Write those of the rows that nobody has written yet."""
        if not len(rows):
            return
        if not self.writable:
            raise PermissionError(
                f"the cache {self.path} lacks row {rows[0]} and cannot be written. Complete it first, with "
                "kd-lightning cache-teacher, or make the file writable."
            )
        rows, first = np.unique(rows, return_index=True)  # a sampler may repeat a sample
        with self._locked():
            new = self.flags[rows] == 0
            rows, encoded = rows[new], encoded[first[new]]
            self.rows[rows] = encoded
            self.checksums[rows] = _checksums(rows, encoded)
            self.flags[rows] = _WRITTEN

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.path, "r+b" if self.writable else "rb") as file:  # anew: forked processes share an open one's
            if fcntl is not None and self.writable:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _read_header(self, identity: dict[str, Any]) -> dict[str, Any]:
        with open(self.path, "rb") as file:
            block = file.read(_HEADER)
        if len(block) < _HEADER:
            self._fail(f"is truncated: {len(block)} bytes, its header alone has {_HEADER}")
        if zlib.crc32(block[:-4]) != int.from_bytes(block[-4:], "little"):
            what = "is damaged: its header does not match its checksum"
            self._fail(what if block.startswith(_MAGIC) else "is no teacher cache")
        header = json.loads(block[len(_MAGIC) : -4].rstrip(b"\0"))
        if header["version"] != _VERSION:
            self._fail(f"has format version {header['version']}, this library reads {_VERSION}")
        parts = {
            "teacher": "of another teacher (fingerprint {} in the file, {} now)",
            "data": "of other data (fingerprint {} in the file, {} now)",
            "inputs": "of other inputs: the transform changed (fingerprint {} in the file, {} now)",
        }
        differ = [
            parts.get(name, name + " {} in the file, {} now").format(
                *(str(value)[:8] if name in parts else repr(value) for value in (header[name], identity[name]))
            )
            for name in identity
            if header[name] != identity[name]
        ]
        if differ:
            self._fail(f"is not of this run: {'; '.join(differ)}", "Give this run another path, or")
        return header

    def _fail(self, what: str, way_out: str = "To have it built anew,") -> NoReturn:
        raise ValueError(f"the cache {self.path} {what}. {way_out} delete the file.")


def _checksums(rows: RowNumbers, encoded: Bytes) -> NDArray[np.uint32]:
    """CRC-32, started with the row's number, so that a row in another's place does not match."""
    return np.array([zlib.crc32(row, int(number) & 0xFFFFFFFF) for number, row in zip(rows, encoded, strict=True)],
                    np.uint32)  # fmt: skip
