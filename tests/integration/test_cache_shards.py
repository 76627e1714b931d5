"""A cache that several jobs or ranks fill, each its own range in a file of its own."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning.cli import main
from kd_lightning.teachers import TeacherCache
from kd_lightning.teachers.indexed import Rows

ROOT = Path(__file__).parents[2]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false"]
COUNT = 100


def opened(path: Path) -> tuple[TeacherCache, Any]:
    cache = TeacherCache(path, dtype="float32")
    return cache, cache.index(TensorDataset(torch.arange(float(COUNT))[:, None]), "teacher")


def expected(rows: Any) -> torch.Tensor:
    return torch.as_tensor(rows)[:, None] * torch.arange(1.0, 6.0)


def fill(cache: TeacherCache, data: Any, pause: float = 0.0) -> int:
    """Fill what is missing; the number of rows that are computed."""
    missing = cache.missing()
    for _, rows in DataLoader(Rows(data, missing), batch_size=4):
        time.sleep(pause)
        cache.logits(rows, lambda rows=rows: expected(rows))
    return len(missing)


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 7, 100, 130])
def test_shards_are_merged(tmp_path: Path, count: int) -> None:
    path = tmp_path / "a.cache"
    for number in range(count):
        cache, data = opened(path)
        cache.take_shard(number, count)
        assert fill(cache, data) == len(cache.rows)
        assert not path.exists()
        cache.leave_shard()
    assert len(files(tmp_path)) == count
    cache, _ = opened(path)
    cache.merge()
    cache.verify()
    assert not len(cache.missing())
    assert files(tmp_path) == ["a.cache"]
    assert torch.equal(cache.logits(torch.arange(COUNT), None), expected(torch.arange(COUNT)))
    whole, data = opened(tmp_path / "b.cache")
    fill(whole, data)
    assert (tmp_path / "a.cache").read_bytes() == (tmp_path / "b.cache").read_bytes()


def test_what_is_there_is_not_computed_again(tmp_path: Path) -> None:
    cache, data = opened(tmp_path / "a.cache")
    cache.logits(torch.arange(30), lambda: expected(torch.arange(30)))
    cache.take_shard(0, 2)
    assert cache.missing().tolist() == list(range(30, 50))
    cache.logits(torch.arange(30, 40), lambda: expected(torch.arange(30, 40)))
    cache.leave_shard()
    cache, data = opened(tmp_path / "a.cache")  # as a job that resumes
    cache.take_shard(0, 2)
    assert cache.missing().tolist() == list(range(40, 50))
    cache.merge()  # the other shard was never begun
    assert cache.missing().tolist() == list(range(40, 100))
    assert fill(cache, data) == 60
    cache.verify()


def test_a_shard_has_one_process(tmp_path: Path) -> None:
    cache, data = opened(tmp_path / "a.cache")
    cache.take_shard(1, 2)
    fill(cache, data)
    other, _ = opened(tmp_path / "a.cache")
    with pytest.raises(BlockingIOError, match=r"a\.cache\.1-of-2 is being filled by another process\. Wait until it"):
        other.take_shard(1, 2)
    with pytest.raises(BlockingIOError, match="is being filled by another process"):
        other.merge()


def test_a_damaged_shard_is_told_and_kept(tmp_path: Path) -> None:
    cache, data = opened(tmp_path / "a.cache")
    cache.take_shard(0, 2)
    fill(cache, data)
    cache.leave_shard()
    shard = tmp_path / "a.cache.0-of-2"
    content = bytearray(shard.read_bytes())
    content[4096 + 4 * 50 + 20 * 3 + 1] ^= 1
    shard.write_bytes(content)
    cache, _ = opened(tmp_path / "a.cache")
    with pytest.raises(ValueError, match=r"a\.cache\.0-of-2 is damaged: row 3 does not match its checksum"):
        cache.merge()
    assert shard.exists()


def test_shards_of_another_teacher_are_refused(tmp_path: Path) -> None:
    cache, data = opened(tmp_path / "a.cache")
    cache.take_shard(0, 2)
    fill(cache, data)
    cache.leave_shard()
    other = TeacherCache(tmp_path / "a.cache", dtype="float32")
    other.index(TensorDataset(torch.arange(float(COUNT))[:, None]), "another")
    with pytest.raises(ValueError, match="of another teacher"):
        other.merge()


def test_shards_that_are_not_merged_are_told_once(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for number in range(5):
        cache, data = opened(tmp_path / "a.cache")
        cache.take_shard(number, 5)
        fill(cache, data)
        cache.leave_shard()
    assert not recwarn.list
    cache, data = opened(tmp_path / "a.cache")
    fill(cache, data)  # as a fit does
    [told] = [str(each.message) for each in recwarn.list]
    names = ", ".join(f"a.cache.{number}-of-5" for number in range(3))
    assert told == (
        f"the cache {tmp_path / 'a.cache'} lacks rows, which the teacher now computes. Shards that are not merged lie "
        f"beside it ({names}, …), and their rows do not count: merge them with kd-lightning cache-teacher, with the "
        "same configuration and without --shard."
    )
    cache.merge()
    cache, data = opened(tmp_path / "a.cache")
    cache.logits(torch.arange(4), lambda: expected(torch.arange(4)))
    assert len(recwarn.list) == 1


def slow_shard(path: Path, number: int, pause: float) -> None:
    cache, data = opened(path)
    cache.take_shard(number, 3)
    fill(cache, data, pause)


@pytest.mark.slow
def test_a_killed_shard_is_resumed_by_another_process(tmp_path: Path) -> None:
    path, context = tmp_path / "a.cache", multiprocessing.get_context("fork")
    processes = [context.Process(target=slow_shard, args=(path, n, 0.2 if n == 1 else 0.001)) for n in range(3)]
    for process in processes:
        process.start()
    victim = tmp_path / "a.cache.1-of-3"
    while not victim.exists() or victim.read_bytes()[-33:].count(0xA5) < 8:
        assert processes[1].is_alive()
        time.sleep(0.01)
    processes[1].kill()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL, 0]
    cache, data = opened(path)
    cache.take_shard(1, 3)  # the dead process has given up the file
    missing = fill(cache, data)
    assert 0 < missing <= 33 - 8
    cache.merge()
    cache.verify()
    assert torch.equal(cache.logits(torch.arange(COUNT), None), expected(torch.arange(COUNT)))


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def _project_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kd-lightning"])


def build(*arguments: str) -> None:
    main(["cache-teacher", "--config", "configs/digits_cached.yaml", *QUIET, *arguments])


@pytest.mark.slow
@pytest.mark.usefixtures("_project_folder")
def test_jobs_of_an_array_fill_a_cache(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for shard in (2, 0, 0):  # the job of shard 1 never runs, another one twice
        build("--output=made/a.cache", "--num_shards=3", f"--shard={shard}")
    assert files(tmp_path / "made") == [
        f"{name}.{shard}-of-3" for name in ("a.cache", "a.val.cache") for shard in (0, 2)
    ]
    assert "Shard 2 of 3 is filled." in capsys.readouterr().out
    build("--output=made/a.cache")
    assert "TeacherCache(made/a.cache, 264 of 264 rows, 25 bytes each)" in capsys.readouterr().out
    assert files(tmp_path / "made") == ["a.cache", "a.val.cache"]


@pytest.mark.slow
@pytest.mark.usefixtures("_project_folder")
def test_ranks_fill_a_cache(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp_fork"]
    build("--output=made/a.cache", "--num_shards=4", "--shard=1", *ranks)  # rows 66 to 131, in two files
    assert files(tmp_path / "made")[:2] == ["a.cache.2-of-8", "a.cache.3-of-8"]
    build("--output=made/a.cache", *ranks)
    printed = capsys.readouterr().out
    assert "TeacherCache(made/a.cache, 264 of 264 rows" in printed
    assert "TeacherCache(made/a.val.cache, 145 of 145 rows" in printed
    assert files(tmp_path / "made") == ["a.cache", "a.val.cache"]
    before = (tmp_path / "made" / "a.cache").read_bytes()
    build("--output=made/a.cache", *ranks)  # nothing is left to do
    assert (tmp_path / "made" / "a.cache").read_bytes() == before


@pytest.mark.slow
@pytest.mark.usefixtures("_project_folder")
@pytest.mark.parametrize("options", [["--num_shards=8"], ["--shard=1"], ["--num_shards=2", "--shard=2"]])
def test_both_numbers_are_needed(options: list[str]) -> None:
    with pytest.raises(ValueError, match="--num_shards says into how many parts"):
        build(*options)
