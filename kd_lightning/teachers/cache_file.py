"""The file of a teacher cache: a checked header, and rows with checksums in a memory map."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

try:
    import fcntl
except ImportError:  # Windows has no fcntl locks, so only one process may write there
    fcntl = None

_MAGIC = b"KDLCACHE"
_VERSION = 1
_HEADER = 4096  # bytes: magic, JSON, zeros, and the CRC-32 of the preceding bytes
_WRITTEN = 0xA5  # the flag of a row
_BLOCK = 2**26  # bytes that are copied or verified at a time

Bytes = NDArray[np.uint8]
RowNumbers = NDArray[np.int64]


class CacheFile:
    """An open cache file: its checked header, and arrays over its parts: checksums, rows and flags.

    The header must match ``identity``: teacher, dataset, transform and options of the run; None: any. With ``alone`` no
    other process may write: the file is locked until this object is gone, and rows are not.
    """

    def __init__(self, path: Path, identity: dict[str, Any] | None = None, alone: bool = False) -> None:
        self.path = path
        self.header = header = self._read_header(identity or {})
        self.shape: list[int] = header["shape"]
        self.row_bytes: int = header["row_bytes"]
        self.first, last = header.get("shard", (0, header["samples"] * header["slots"]))
        count = last - self.first
        size, expected = path.stat().st_size, _file_size(count, self.row_bytes)
        if size != expected:
            self._fail(f"is {'truncated' if size < expected else 'too long'}: {size} bytes, {expected} expected")
        self.writable = os.access(path, os.W_OK)
        self._alone = alone
        with open(path, "r+b" if self.writable else "rb") as file:
            if fcntl is not None and alone:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by the map's copy of the descriptor
                except BlockingIOError:
                    raise BlockingIOError(
                        f"the cache {path} is being filled by another process. Wait until it ends, or stop it."
                    ) from None
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE if self.writable else mmap.ACCESS_READ)
        self._begin = _HEADER + 4 * count  # of the rows
        whole = np.frombuffer(self._map, np.uint8)
        self.checksums = whole[_HEADER : self._begin].view(np.uint32)
        self.rows = whole[self._begin : size - count].reshape(count, self.row_bytes)
        self.flags = whole[size - count :]
        # shared with forked processes, so that rows that a loader's worker has verified are not verified again
        self._verified = np.frombuffer(mmap.mmap(-1, max(count, 1)), bool)

    @staticmethod
    def create(
        path: Path,
        identity: dict[str, Any],
        shape: list[int],
        row_bytes: int,
        shard: tuple[int, int] | None = None,
    ) -> None:
        """Create the file with all its space atomically, or keep the file that another process has created.

        ``shape`` is that of a sample's logits; ``shard``, first and last + 1, are the rows of the file, by default all.
        """
        header = {"version": _VERSION, **identity, "shape": shape, "row_bytes": row_bytes}
        header |= {} if shard is None else {"shard": shard}
        block = (_MAGIC + json.dumps(header).encode()).ljust(_HEADER - 4, b"\0")
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(own, "wb") as file:
                file.write(block + zlib.crc32(block).to_bytes(4, "little"))
                file.flush()
                first, last = shard or (0, identity["samples"] * identity["slots"])
                size = _file_size(last - first, row_bytes)
                if hasattr(os, "posix_fallocate"):  # because writing to a map on a full disk kills the process
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
            with contextlib.suppress(FileExistsError):
                os.link(own, path)
        finally:
            own.unlink(missing_ok=True)

    @property
    def whole(self) -> bool:
        """True if all rows are written."""
        return bool(self.flags.all())

    def are_missing(self, rows: RowNumbers) -> NDArray[np.bool_]:
        """Return True for each of the rows that is not written, or raise if a flag is neither of its two values."""
        flags = self.flags[rows - self.first]
        wrong = (flags != 0) & (flags != _WRITTEN)
        if wrong.any():
            self._fail(f"is damaged: the flag of row {rows[wrong][0]} is {flags[wrong][0]:#x}")
        return flags == 0

    def read(self, rows: RowNumbers) -> Bytes:
        """Return the bytes of written rows, or raise if one, at its first read, does not match its checksum."""
        at = rows - self.first
        new = np.flatnonzero(~self._verified[at])
        found = self.rows[at]
        if new.size:
            wrong = new[self.checksums[at[new]] != _checksums(rows[new], found[new])]
            if wrong.size:  # read again under the lock, because another process may be writing
                with self._locked():
                    found[wrong] = self.rows[at[wrong]]
                    wrong = wrong[self.checksums[at[wrong]] != _checksums(rows[wrong], found[wrong])]
            if wrong.size:
                self._fail(f"is damaged: row {rows[wrong[0]]} does not match its checksum")
            self._verified[at[new]] = True
        return found

    def request(self, rows: RowNumbers) -> None:
        """Request rows from the file system all at once: page faults would wait for a disk or network one by one."""
        if not hasattr(self._map, "madvise") or not len(rows):
            return
        at = np.unique(rows) - self.first
        begins = self._begin + at * self.row_bytes
        starts = begins // mmap.PAGESIZE * mmap.PAGESIZE
        ends = begins + self.row_bytes
        apart = np.flatnonzero(starts[1:] > ends[:-1]) + 1  # rows on neighbouring pages are one block
        for start, end in zip(starts[np.r_[0, apart]], ends[np.r_[apart - 1, -1]], strict=True):
            self._map.madvise(mmap.MADV_WILLNEED, int(start), int(end - start))

    def blocks(self) -> Iterator[RowNumbers]:
        """Yield the numbers of written rows, in order and in blocks that are read at a time."""
        size = max(_BLOCK // max(self.row_bytes, 1), 1)
        for begin in range(self.first, self.first + len(self.flags), size):
            rows = np.arange(begin, min(begin + size, self.first + len(self.flags)))
            rows = rows[~self.are_missing(rows)]
            self.request(rows)
            yield rows

    def adopt(self, shard: CacheFile) -> None:
        """Copy the rows of a shard, each compared with its checksum."""
        if (shard.shape, shard.row_bytes) != (self.shape, self.row_bytes):
            shard._fail(f"has rows of shape {tuple(shard.shape)}, but {self.path} of {tuple(self.shape)}")
        for rows in shard.blocks():
            self.write(rows, shard.read(rows))
        self._map.flush()  # before the shard is deleted

    def write(self, rows: RowNumbers, encoded: Bytes) -> None:
        """Write the rows that no process has written yet, or raise if the file is not writable."""
        if not len(rows):
            return
        if not self.writable:
            raise PermissionError(
                f"the cache {self.path} lacks row {rows[0]} and cannot be written. Complete it first, with "
                "kd-lightning cache-teacher, or make the file writable."
            )
        rows, first = np.unique(rows, return_index=True)  # a sampler may repeat a sample
        with self._locked():
            new = self.flags[rows - self.first] == 0
            rows, encoded = rows[new], encoded[first[new]]
            at = rows - self.first
            self.rows[at] = encoded
            self.checksums[at] = _checksums(rows, encoded)
            self.flags[at] = _WRITTEN

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self._alone:  # locked since it was opened
            yield
            return
        # opened anew, because forked processes share an open file's lock
        with open(self.path, "r+b" if self.writable else "rb") as file:
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
                *(str(value)[:8] if name in parts else repr(value) for value in (header.get(name), identity[name]))
            )
            for name in identity
            if header.get(name) != identity[name]
        ]
        if differ:
            self._fail(f"is not of this run: {'; '.join(differ)}", "Give this run another path, or")
        return header

    def _fail(self, what: str, way_out: str = "To have it built anew,") -> NoReturn:
        raise ValueError(f"the cache {self.path} {what}. {way_out} delete the file.")


def _file_size(count: int, row_bytes: int) -> int:
    """Return the bytes of a file of so many rows, each with a checksum of 4 bytes and a flag of one."""
    return _HEADER + count * (4 + row_bytes + 1)


def _checksums(rows: RowNumbers, encoded: Bytes) -> NDArray[np.uint32]:
    """Return each row's CRC-32, started with the row number so that a row in another row's place does not match."""
    found = [zlib.crc32(row, int(number) & 0xFFFFFFFF) for number, row in zip(rows, encoded, strict=True)]
    return np.array(found, np.uint32)
