"""The file of a teacher cache: a checked header, and rows with checksums in a memory map."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

try:
    import fcntl
except ImportError:  # Windows has no fcntl locks, so only one process may write there
    fcntl = None

__all__ = ["Bytes", "CacheFile", "RowNumbers"]

_MAGIC = b"KDLCACHE"
_VERSION = 1
_HEADER = 4096  # bytes: magic, JSON, zeros, and the CRC-32 of the preceding bytes
_WRITTEN = 0xA5

Bytes = NDArray[np.uint8]
RowNumbers = NDArray[np.int64]


class _Layout(NamedTuple):
    """Offsets of a file's parts after the header."""

    checksums: int
    rows: int
    flags: int
    end: int

    @classmethod
    def of(cls, count: int, row_bytes: int) -> _Layout:
        rows = _HEADER + 4 * count
        flags = rows + row_bytes * count
        return cls(_HEADER, rows, flags, flags + count)


class CacheFile:
    """An open cache file: its checked header, and arrays over its parts.

    Args:
        path: Path of the file.
        identity: Teacher, dataset, transform and options of this run, which the header must match; None: any.

    Raises:
        ValueError: If the file is truncated, too long, damaged, no teacher cache, or of another run.
    """

    def __init__(self, path: Path, identity: dict[str, Any] | None = None) -> None:
        self.path = path
        self.header = header = self._read_header(identity or {})
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
        """Create the file with all its space atomically, or keep the file that another process has created."""
        header = {"version": _VERSION, **identity, "shape": shape, "row_bytes": row_bytes}
        block = (_MAGIC + json.dumps(header).encode()).ljust(_HEADER - 4, b"\0")
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(own, "wb") as file:
                file.write(block + zlib.crc32(block).to_bytes(4, "little"))
                file.flush()
                end = _Layout.of(identity["samples"] * identity["slots"], row_bytes).end
                if hasattr(os, "posix_fallocate"):  # because writing to a map on a full disk kills the process
                    os.posix_fallocate(file.fileno(), 0, end)
                else:
                    file.truncate(end)
            with contextlib.suppress(FileExistsError):
                os.link(own, path)
        finally:
            own.unlink(missing_ok=True)

    @property
    def whole(self) -> bool:
        """Whether all rows are written."""
        return bool(self.flags.all())

    def are_missing(self, rows: RowNumbers) -> NDArray[np.bool_]:
        """Return True for each of the rows that is not written.

        Raises:
            ValueError: If a flag is neither of its two values.
        """
        flags = self.flags[rows]
        wrong = (flags != 0) & (flags != _WRITTEN)
        if wrong.any():
            self._fail(f"is damaged: the flag of row {rows[wrong][0]} is {flags[wrong][0]:#x}")
        return flags == 0

    def read(self, rows: RowNumbers) -> Bytes:
        """Return the bytes of written rows; compare each row with its checksum at the first read.

        Raises:
            ValueError: If a row does not match its checksum.
        """
        found = self.rows[rows]
        new = np.flatnonzero(~self._verified[rows])
        if new.size:
            wrong = new[self.checksums[rows[new]] != _checksums(rows[new], found[new])]
            if wrong.size:  # read again under the lock, because another process may be writing
                with self._locked():
                    found[wrong] = self.rows[rows[wrong]]
                    wrong = wrong[self.checksums[rows[wrong]] != _checksums(rows[wrong], found[wrong])]
            if wrong.size:
                self._fail(f"is damaged: row {rows[wrong[0]]} does not match its checksum")
            self._verified[rows[new]] = True
        return found

    def write(self, rows: RowNumbers, encoded: Bytes) -> None:
        """Write the rows that no process has written yet.

        Raises:
            PermissionError: If the file is not writable.
        """
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
        with open(
            self.path, "r+b" if self.writable else "rb"
        ) as file:  # because forked processes share an open file's lock
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
    """Return each row's CRC-32, started with the row number so that a row in another row's place does not match."""
    return np.array([zlib.crc32(row, int(number) & 0xFFFFFFFF) for number, row in zip(rows, encoded, strict=True)],
                    np.uint32)  # fmt: skip
