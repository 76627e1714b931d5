"""Fill and read a teacher cache, beside a bare memory map of the same bytes; and the sizes of large caches.

    uv run python benchmarks/cache.py --fill

Rows of a second of processor time with one thread, the median over rounds in which all variants take their turn. Logits
are made beforehand, so that no network is in the figures. "First read" compares rows with their checksums;
"after a worker" is what the training process still does when a loader's worker has done that.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine
from torch import Tensor
from torch.utils.data import TensorDataset

from kd_lightning.teachers import TeacherCache

KINDS: dict[str, tuple[tuple[int, ...], int, int, dict[str, Any]]] = {  # shape of a row, rows, batch, options
    "images, 1,000 classes": ((1000,), 16384, 256, {}),
    "512 tokens of 32,000, top-k 64": ((512, 32000), 32, 2, {"top_k": 64, "temperature": 2.0}),
}
LARGE: dict[str, tuple[tuple[int, ...], dict[str, Any], int, str]] = {  # shape of a row, options, positions, what
    "ImageNet, 1,281,167 images of 1,000 classes, all": ((1000,), {}, 1_281_167, "an image"),
    "ImageNet, top-k 20": ((1000,), {"top_k": 20}, 1_281_167, "an image"),
    "10⁹ tokens of 32,000, all": ((2, 32000), {}, 10**9, "a token"),
    "10⁹ tokens of 32,000, top-k 64": ((2, 32000), {"top_k": 64}, 10**9, "a token"),
    "10⁹ tokens of 128,256, all": ((2, 128256), {}, 10**9, "a token"),
    "10⁹ tokens of 128,256, top-k 64": ((2, 128256), {"top_k": 64}, 10**9, "a token"),
}


def opened(path: Path, count: int, options: dict[str, Any]) -> TeacherCache:
    cache = TeacherCache(path, **options)
    cache.index(TensorDataset(torch.arange(count)), "teacher")
    return cache


def seconds(step: Callable[[Tensor], Any], batches: list[Tensor]) -> float:
    begin = time.process_time()
    for batch in batches:
        step(batch)
    return time.process_time() - begin


def measure(shape: tuple[int, ...], count: int, batch: int, options: dict[str, Any], folder: Path) -> dict[str, float]:
    """Return the processor seconds of each variant for all rows."""
    logits = torch.randn(batch, *shape)
    in_order = [*torch.arange(count).split(batch)]
    shuffled = [*torch.randperm(count).split(batch)]
    times: dict[str, float] = {}
    cache = opened(folder / "a.cache", count, options)
    times["fill"] = seconds(lambda rows: cache.logits(rows, lambda: logits), in_order)
    shard = opened(folder / "b.cache", count, options)
    shard.take_shard(0, 1)
    times["fill, as a shard"] = seconds(lambda rows: shard.logits(rows, lambda: logits), in_order)
    begin = time.process_time()
    shard.merge()
    times["merge a shard"] = time.process_time() - begin
    warm = opened(folder / "a.cache", count, options)
    times["first read, with checksums"] = seconds(lambda rows: warm.logits(rows, None), shuffled)
    times["read, after a worker or again"] = seconds(lambda rows: warm.logits(rows, None), shuffled)
    row_bytes = cache.row_bytes - 5
    bare = np.memmap(folder / "bare", np.uint8, "w+", shape=(count, row_bytes))
    encoded = np.zeros((batch, row_bytes), np.uint8)

    def write(rows: Tensor) -> None:
        bare[rows.numpy()] = encoded[: len(rows)]

    def read(rows: Tensor) -> Tensor:
        found = torch.from_numpy(bare[rows.numpy()])
        return found if "top_k" in options else found.view(torch.float16).float()

    times["bare map, write"] = seconds(write, in_order)
    times["bare map, read"] = seconds(read, shuffled)
    for name in ("a.cache", "b.cache", "bare"):
        (folder / name).unlink()
    return times


def time_kinds(rounds: int) -> None:
    names: list[str] = []
    columns: list[dict[str, float]] = []
    for shape, count, batch, options in KINDS.values():
        found: list[dict[str, float]] = []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                found.append(measure(shape, count, batch, options, Path(folder)))
        names = [*found[0]]
        columns.append({name: count / statistics.median(each[name] for each in found) for name in names})
    print(f"| rows a second | {' | '.join(KINDS)} |\n|---{'|---' * len(KINDS)}|")
    for name in names:
        print(f"| {name} | {' | '.join(f'{column[name]:,.0f}' for column in columns)} |", flush=True)


def sizes() -> None:
    print("\n| cache in float16 | bytes for each | file |\n|---|---|---|")
    for name, (shape, options, count, what) in LARGE.items():
        with tempfile.TemporaryDirectory() as folder:
            cache = opened(Path(folder) / "a.cache", 1, options)
            logits = torch.randn(1, *shape)
            cache.logits(torch.tensor([0]), lambda logits=logits: logits)
            positions = shape[0] if len(shape) > 1 else 1
            # checksum and flag are of a whole sample: of tokens, that is a share that rounds to nothing
            each = (cache.row_bytes - 5) / positions + (5 if len(shape) == 1 else 0)
        print(f"| {name} | {each:,.0f} {what} | {_size(each * count)} |", flush=True)


def _size(count: float) -> str:
    return f"{count / 1e12:.3g} TB" if count >= 1e12 else f"{count / 1e9:.3g} GB"


def fill_and_read(rounds: int) -> None:
    """Print the tables."""
    print(f"{machine('cpu')}; {rounds} rounds\n")
    time_kinds(rounds)
    sizes()
