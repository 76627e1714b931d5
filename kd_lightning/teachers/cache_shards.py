"""The rows of a teacher cache: in its file, and in the files of shards while several processes fill it."""

from __future__ import annotations

import glob
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from kd_lightning.teachers.cache_file import CacheFile, RowNumbers


class StoredRows:
    """The rows of one dataset, ``slots`` for each sample: in a file, or in shards beside it until :meth:`merge`."""

    def __init__(self, path: str | Path, slots: int) -> None:
        self.path = Path(path)
        self.slots = slots
        self.first = 0
        """The number of the first row."""
        self._identity: dict[str, Any] | None = None
        self._file: CacheFile | None = None
        self._shard: str | None = None  # the suffix of its file
        self._merged: CacheFile | None = None  # while a shard is filled, the file that shards are merged into
        self._told = False  # of shards that are not merged

    @property
    def row_bytes(self) -> int:
        """The bytes of a row in the file, with its checksum and flag; 0 while there is no file."""
        return 0 if self._file is None else self._file.row_bytes + 5

    @property
    def row_shape(self) -> list[int]:
        """The shape of a sample's logits; empty while there is no file."""
        return [] if self._file is None else self._file.shape

    @property
    def rows(self) -> range:
        """The numbers of the rows that this process may write: all, or those of its shard."""
        total = self._in_use()["samples"] * self.slots
        number, count = (0, 1) if self._shard is None else map(int, self._shard.split("-of-"))
        first = total * number // count
        return range(self.first + first, self.first + max(total * (number + 1) // count, first + 1))

    def missing(self) -> RowNumbers:
        """Return the numbers of the rows that are not written yet, those of other parts left out."""
        begin, lacks = self.rows.start - self.first, np.ones(len(self.rows), bool)
        for file in (self._merged, self._file):
            if file is not None:
                lacks &= file.flags[begin - file.first :][: len(lacks)] == 0
        return self.rows.start + np.flatnonzero(lacks)

    def verify(self) -> None:
        """Raise if a written row does not match its checksum."""
        if self._file is not None:
            for rows in self._file.blocks():
                self._file.read(rows)

    def teacher_of_whole_file(self) -> str | None:
        """Return the fingerprint of the teacher whose logits of all training data are in the file, or None."""
        file = CacheFile(self.path) if self.path.exists() else None
        return file.header["teacher"] if file is not None and file.whole else None

    # ---- a build by several processes ------------------------------------------------------------------------------

    def take_shard(self, number: int, count: int) -> None:
        """Have this process write one of ``count`` ranges of rows, to a file of its own beside the cache's.

        No other process may write to that file, so that no lock is taken for a batch, and a dead process leaves its
        rows to the next that takes the same range. :meth:`merge` puts the files together.
        """
        self._shard, self._merged = f"{number}-of-{count}", self._open(self.path)
        self._file = self._open(self._target)

    def leave_shard(self) -> None:
        """Leave the range of rows to another process, and read and write the cache's file again."""
        self._shard = self._merged = self._file = None
        self._file = self._open(self.path)

    def merge(self) -> None:
        """Copy the rows of all shards into the cache's file, each compared with its checksum; delete their files."""
        self.leave_shard()
        identity, file = self._in_use(), self._file
        for path in self._shards():
            shard = CacheFile(path, identity, alone=True)
            if file is None:
                CacheFile.create(self.path, identity, shard.shape, shard.row_bytes)
                file = CacheFile(self.path, identity)
            file.adopt(shard)
            path.unlink()
        self._file = file

    def unmerged(self) -> str:
        """Return a sentence that names the files of shards beside the cache's and the way out; empty without any."""
        names = [path.name for path in self._shards()]
        if not names or self._shard is not None:
            return ""
        listed = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        return (
            f" Shards that are not merged lie beside it ({listed}), and their rows do not count: merge them with "
            "kd-lightning cache-teacher, with the same configuration and without --shard."
        )

    def _warn_of_shards(self) -> None:
        """Warn once, at the first row that is computed although a shard may have it."""
        self._told, told = True, self._told
        if not told and (shards := self.unmerged()):
            warnings.warn(f"the cache {self.path} lacks rows, which the teacher now computes.{shards}", stacklevel=3)

    def _shards(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.*-of-*"))

    @property
    def _target(self) -> Path:
        return self.path if self._shard is None else self.path.with_name(f"{self.path.name}.{self._shard}")

    def _create(self, shape: list[int], row_bytes: int) -> CacheFile:
        """Create the file of this process, unless another process has, and open it."""
        identity, is_shard = self._in_use(), self._shard is not None
        own = (self.rows.start - self.first, self.rows.stop - self.first) if is_shard else None
        CacheFile.create(self._target, identity, shape, row_bytes, own)
        return CacheFile(self._target, identity, alone=is_shard)

    def _open(self, path: Path) -> CacheFile | None:
        return CacheFile(path, self._identity, alone=path != self.path) if path.exists() else None

    def _in_use(self) -> dict[str, Any]:
        if self._identity is None:
            raise RuntimeError(
                f"the cache {self.path} does not know its dataset yet: wrap it first, "
                "DataLoader(teacher.index(dataset), ...)."
            )
        return self._identity

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None, "_merged": None}  # because another process must open the file itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._identity is not None and self._shard is None:
            self._file = self._open(self.path)
