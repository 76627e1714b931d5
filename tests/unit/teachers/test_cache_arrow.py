"""A cache written as a column of logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from kd_lightning.teachers import LogitsFile, TeacherCache
from kd_lightning.teachers.cache_arrow import write_arrow

pytest.importorskip("pyarrow")
COUNT = 10_000


def filled(path: Path, logits: torch.Tensor, **options: Any) -> TeacherCache:
    cache = TeacherCache(path, **options)
    cache.index(TensorDataset(torch.arange(len(logits))), "teacher")
    rows = torch.arange(cache.rows.start, cache.rows.stop)
    cache.logits(rows, lambda: logits.repeat(cache.slots, *[1] * (logits.dim() - 1)))
    return cache


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_logits_file_reads_it(tmp_path: Path, dtype: Any) -> None:
    logits = torch.randn(COUNT, 7)
    cache = filled(tmp_path / "a.cache", logits, dtype=dtype)
    path = write_arrow(cache)
    assert path == tmp_path / "a.arrow"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.arrow", "a.cache"]
    ids = torch.tensor([4097, 0, COUNT - 1, 17])
    found = LogitsFile(path).logits({"x": torch.ones(4), "id": ids})
    assert torch.equal(found, logits[ids].to(getattr(torch, dtype)).float())


def test_a_part_has_a_file_of_its_own(tmp_path: Path) -> None:
    cache = filled(tmp_path / "a.cache", torch.randn(8, 3))
    cache.index(TensorDataset(torch.arange(4)), "teacher", part="val")
    part, logits = cache.parts[1], torch.randn(4, 3)
    cache.logits(torch.tensor([*part.rows]), lambda: logits)
    path = write_arrow(part)
    assert path == tmp_path / "a.val.arrow"
    found = LogitsFile(path).logits({"x": torch.ones(1), "id": torch.tensor([2])})
    assert torch.equal(found, logits[2:3].half().float())


@pytest.mark.filterwarnings("ignore:top_k=")
@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 4), {}, r"rows of shape \(3, 4\)"),
        ((1200,), {"top_k": 5}, "with top_k=5"),
        ((4,), {"augmentation": "replay", "slots": 2}, "in 2 slots"),
    ],
)
def test_other_rows_are_refused(tmp_path: Path, shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    cache = filled(tmp_path / "a.cache", torch.randn(6, *shape), **options)
    with pytest.raises(ValueError, match=f"has a row of logits .* {message}.* Train from the cache itself"):
        write_arrow(cache)


def test_a_cache_that_lacks_rows_is_refused(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "a.cache")
    cache.index(TensorDataset(torch.arange(5)), "teacher")
    with pytest.raises(ValueError, match=r"a\.cache lacks 5 rows\. Complete it first: kd-lightning cache-teacher\."):
        write_arrow(cache)
