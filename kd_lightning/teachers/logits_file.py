"""Teacher logits in a file, found by the samples' ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self, override

from kd_lightning.teachers.batch import FromBatch
from kd_lightning.teachers.calls import device_of, extract_logits
from kd_lightning.teachers.made_at import Output

_IDS = "iuU"  # NumPy's kinds of integers and text


class LogitsFile(FromBatch):
    r"""The teacher whose logits were written to a file beforehand, one row for each sample's id, in any order.

    Each batch brings the ids of its samples, integers or text, in training and in validation; the student does not see
    them. A batch of a validation without ids is evaluated without a teacher. :class:`~kd_lightning.DistillationModule`
    reads the ids before the batch goes to the device; elsewhere a tensor of ids on an accelerator costs a host sync.

    Formats, by suffix:

    - ``.npy``: an array ``(N, …, C)``, memory-mapped; the id of a row is its number, from 0;
    - ``.safetensors``: a tensor ``(N, …, C)`` under ``column`` and integers ``(N,)`` under ``key``;
    - ``.parquet``, and ``.arrow`` of the Hugging Face datasets library (``pip install "kd-lightning[arrow]"``): a
      column of lists of one length, and a column of ids. A folder, such as ``save_to_disk`` writes: all files in it.

    All but ``.npy`` are held in host memory.

    Args:
        path: The file or folder, or several whose ids do not overlap.
        key: Where a batch has its ids (key of a mapping, or position in a tuple), and the files' column of ids.
        column: The files' column of logits.
        output: What the file has: ``"logits"``, ``"log_probs"`` (natural) or ``"probs"``.
        temperature: :math:`T_0`, at which they were made; see :class:`~kd_lightning.teachers.FunctionTeacher`.

    Raises:
        ValueError: If an option is outside its range; on first use, if a file is none of these, has no such columns, or
            has an id twice; on the call, if an id is not in the file.
        FileNotFoundError: On first use, if there is no such file.
        ModuleNotFoundError: On first use, if pyarrow is needed and not installed.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> np.save(f"{folder}/logits.npy", np.array([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=np.float32))
        >>> LogitsFile(f"{folder}/logits.npy").logits({"x": torch.ones(2, 4), "id": torch.tensor([2, 0])})
        tensor([[1., 1.],
                [3., 0.]])
    """

    loaded = False

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        key: str | int = "id",
        column: str = "logits",
        output: Output = "logits",
        temperature: float = 1.0,
    ) -> None:
        super().__init__(key, output, temperature)
        self.paths = [Path(path)] if isinstance(path, (str, Path)) else [Path(each) for each in path]
        self.column = column
        self.checkpoint = ", ".join(map(str, self.paths))
        self._logits = torch.empty(0)
        self._ids: Any = None  # sorted
        self._order: Any = None  # the row of each of them
        self._fingerprint: str | None = None

    @override
    def available(self) -> bool:
        return self.loaded or all(path.exists() for path in self.paths)

    @override
    def load(self) -> Self:
        """Read the ids, and the logits or their memory map, the first time only."""
        if not self.loaded:
            tables = [_read(file, self.column, str(self.key)) for file in self._files()]
            ids = np.concatenate([ids for ids, _ in tables])
            self._logits = tables[0][1] if len(tables) == 1 else torch.cat([logits for _, logits in tables])
            self._order = np.argsort(ids, kind="stable")
            self._ids = ids[self._order]
            twice = self._ids[1:][self._ids[1:] == self._ids[:-1]]
            if len(twice):
                raise ValueError(
                    f"each sample has one row of logits, but {self.checkpoint} has the id {_shown(twice[0])} more than "
                    "once. Give each sample an id of its own, such as 'train-17' where splits are numbered alike."
                )
            self.loaded = True
        return self

    @override
    def fingerprint(self) -> str:
        """Hash the files, and at which temperature what is given."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(f"{self.column} {self._made_at}".encode(), digest_size=16)
            for file in self._files():
                with file.open("rb") as stream:
                    while chunk := stream.read(1 << 20):
                        digest.update(chunk)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    @override
    def rows(self, batch: Any) -> Tensor | None:
        """Return the batch's rows in the file, or None for a batch without ids."""
        if not self.serves(batch):
            return None
        ids = self.load().part(batch)
        ids = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids)
        text = self._ids.dtype.kind == "U"
        if ids.ndim != 1 or ids.dtype.kind not in _IDS or (ids.dtype.kind == "U") != text:
            kind = "text" if text else "integers"
            raise ValueError(
                f"{self.checkpoint} has ids that are {kind}, one for each sample, but the batch has {ids.dtype} "
                f"{ids.shape} under {self.key!r}. Give the batch the ids that the file was written with."
            )
        places = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
        unknown = ids[self._ids[places] != ids]
        if len(unknown):
            raise ValueError(
                f"{self.checkpoint} has no logits for the id {_shown(unknown[0])}: it has {len(self._ids)} ids, from "
                f"{_shown(self._ids[0])} to {_shown(self._ids[-1])}. Give the files of all data, as a list; or leave "
                f"{self.key!r} out of the batches of a validation without a teacher."
            )
        return torch.from_numpy(self._order[places])

    @override
    def logits(
        self, inputs: Any, index: Tensor | None = None, extract: Callable[[Any], Tensor] = extract_logits
    ) -> Tensor:
        """Return the logits of the batch's ids, whose rows in the file are ``index`` where they are known already."""
        gathered: Any = torch.compiler.disable(self._gathered)  # because neither search nor memory map can be traced
        return self.to_logits(gathered(inputs, index))

    def _gathered(self, inputs: Any, index: Tensor | None) -> Tensor:
        rows = self.load().rows(inputs) if index is None else index.cpu()
        if rows is None:
            self.part(inputs)  # raises
        logits, device = self._logits[rows], device_of(inputs)
        if device.type == "cuda":
            logits = logits.pin_memory()
        return logits.to(device, non_blocking=True).to(torch.promote_types(logits.dtype, torch.float32))

    def _files(self) -> Iterator[Path]:
        for path in self.paths:
            files = sorted(path.glob("*.arrow")) + sorted(path.glob("*.parquet")) if path.is_dir() else [path]
            if not files or not files[0].exists():
                what = "no .arrow or .parquet file in the folder" if path.is_dir() else "no file of logits at"
                raise FileNotFoundError(f"there is {what} {str(path)!r} (from the folder {str(Path.cwd())!r}).")
            yield from files

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_logits": torch.empty(0), "_ids": None, "_order": None, "loaded": False}

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.checkpoint}, {self.key!r}, {self._made_at})"


def _shown(value: Any) -> str:
    return repr(value.item())


def _read(path: Path, column: str, key: str) -> tuple[Any, Tensor]:
    """Return the ids and the logits of a file."""
    if path.suffix == ".npy":
        logits = torch.from_numpy(np.load(path, mmap_mode="c"))  # "c", because torch warns of read-only memory
        ids = np.arange(len(logits))
    elif path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(path)
        _check_columns(path, [*tensors], column, key)
        ids, logits = tensors[key].numpy(), tensors[column]
    elif path.suffix in (".parquet", ".arrow"):
        ids, logits = _read_table(path, column, key)
    else:
        raise ValueError(f"logits are in .npy, .safetensors, .parquet or .arrow files, got {str(path)!r}.")
    fits = logits.dim() >= 2 and logits.is_floating_point() and ids.shape == logits.shape[:1]
    if not fits or ids.dtype.kind not in _IDS:
        raise ValueError(
            f"{path} must have floating-point logits (N, …, C) and integers or text (N,) as ids, got {logits.dtype} "
            f"{tuple(logits.shape)} and {ids.dtype} {ids.shape}."
        )
    return ids, logits


def _check_columns(path: Path, columns: list[str], column: str, key: str) -> None:
    if not {column, key} <= {*columns}:
        raise ValueError(
            f"{path} needs {column!r}, the logits, and {key!r}, their ids; it has {', '.join(columns) or 'nothing'}. "
            "Name them: LogitsFile(path, key=..., column=...)."
        )


def _read_table(path: Path, column: str, key: str) -> tuple[Any, Tensor]:
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
        from pyarrow import ipc, parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} needs pyarrow, which is not installed: pip install 'kd-lightning[arrow]'."
        ) from error
    if path.suffix == ".parquet":
        table: Any = parquet.read_table(path)
    else:
        with pa.memory_map(str(path)) as source:
            try:
                table = ipc.open_stream(source).read_all()  # as the datasets library writes
            except pa.ArrowInvalid:
                table = ipc.open_file(source).read_all()
    _check_columns(path, table.column_names, column, key)
    lists = table[column].combine_chunks()
    lengths = (
        set(pc.call_function("list_value_length", [lists]).to_pylist()) if pa.types.is_nested(lists.type) else {None}
    )
    values = lists.flatten() if len(lengths) == 1 and None not in lengths else None
    if values is None or values.null_count or not pa.types.is_floating(values.type):
        raise ValueError(
            f"{path} must have lists of floating-point logits in {column!r}, of one length for all samples, got "
            f"{lists.type} of lengths {', '.join(sorted(map(str, lengths)))}."
        )
    logits = np.array(values.to_numpy(zero_copy_only=False)).reshape(len(lists), -1)
    return np.asarray(table[key].to_pylist()), torch.from_numpy(logits)
