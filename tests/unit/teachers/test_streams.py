"""A cache of streams, whose samples are known by their ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from kd_lightning import DistillationModule, FrozenTeacher
from kd_lightning.cli.commands import cache_teacher
from kd_lightning.teachers import TeacherCache
from kd_lightning.teachers.streams import StreamWithIds
from tests.helpers import make_data, make_network

COUNT = 24


class Shuffled(IterableDataset[Any]):
    """Samples with ids in another order in each pass, divided among workers."""

    def __init__(self, noise: float = 0.0) -> None:
        self.samples = list(zip(*make_data(COUNT).tensors, strict=True))
        self.noise = noise
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        worker = get_worker_info()
        for number in order if worker is None else order[worker.id :: worker.num_workers]:
            inputs, target = self.samples[number]
            yield {"x": inputs + self.noise * self.epoch, "labels": target, "id": f"sample-{number}"}


def number(sample: dict[str, Any]) -> int:
    return int(sample["id"].split("-")[1])


def stream(dataset: Any = None, **options: Any) -> StreamWithIds:
    given = {"key": number, "count": COUNT, "name": "shuffled, v1", **options}
    return StreamWithIds(Shuffled() if dataset is None else dataset, **given)


def cached(teacher: nn.Module, path: Path) -> FrozenTeacher:
    return FrozenTeacher(teacher, cache=TeacherCache(path))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_rows_follow_the_ids(teacher: nn.Module, tmp_path: Path, workers: int) -> None:
    frozen, live = cached(teacher, tmp_path / "a.cache"), FrozenTeacher(teacher)
    runs: list[int] = []
    teacher.register_forward_hook(lambda *_: runs.append(1))
    data = frozen.index(stream())
    for epoch in range(4):
        data.set_epoch(epoch)
        runs.clear()
        seen: list[int] = []
        for batch, rows in DataLoader(data, batch_size=5, num_workers=workers):
            assert [f"sample-{row}" for row in rows.tolist()] == batch["id"]
            logits = frozen.logits(batch["x"], rows)
            count = len(runs)
            torch.testing.assert_close(logits, live(batch["x"]), rtol=2e-3, atol=2e-3)
            del runs[count:]
            seen += rows.tolist()
        assert sorted(seen) == list(range(COUNT))
        assert len(runs) == (5 + bool(workers) if epoch == 0 else 1 if epoch == 1 else 0)
    assert not len(frozen.caches[0].missing())


def test_a_stream_has_its_own_length(teacher: nn.Module, tmp_path: Path) -> None:
    data = cached(teacher, tmp_path / "a.cache").index(stream([{"id": "sample-3"}, {"id": "sample-5"}]))
    assert len(DataLoader(data, batch_size=2)) == 1
    with pytest.raises(TypeError, match="has no len"):
        len(cached(teacher, tmp_path / "a.cache").index(stream()))


def test_another_name_is_other_data(teacher: nn.Module, tmp_path: Path) -> None:
    frozen = cached(teacher, tmp_path / "a.cache")
    batch, rows = next(iter(DataLoader(frozen.index(stream()), batch_size=5)))
    frozen.logits(batch["x"], rows)
    cached(teacher, tmp_path / "a.cache").index(stream())
    with pytest.raises(ValueError, match="of other data"):
        cached(teacher, tmp_path / "a.cache").index(stream(name="shuffled, v2"))
    with pytest.raises(ValueError, match=r"of other data.*samples 24 in the file, 30 now"):
        cached(teacher, tmp_path / "a.cache").index(stream(count=30))


def test_random_samples_are_found_in_the_second_pass(teacher: nn.Module, tmp_path: Path) -> None:
    frozen = cached(teacher, tmp_path / "a.cache")
    data = frozen.index(stream(Shuffled(noise=3.0)))
    for batch, rows in DataLoader(data, batch_size=5):
        frozen.logits(batch["x"], rows)
    data.set_epoch(1)
    batch, rows = next(iter(DataLoader(data, batch_size=5)))
    with pytest.raises(ValueError, match=r"does not have what the teacher says of this batch"):
        frozen.logits(batch["x"], rows)


class Module(DistillationModule):
    def unpack_batch(self, batch: Any) -> tuple[Any, Tensor | None]:
        return batch["x"], batch["labels"]


class Streams(LightningDataModule):
    """A stream to train on and one to validate on, with a loader that drops the last batch."""

    def __init__(self, teacher: FrozenTeacher, workers: int = 0, **options: Any) -> None:
        super().__init__()
        self.teacher = teacher
        self.workers = workers
        self.options = options

    def loader(self, part: str) -> DataLoader[Any]:
        data = self.teacher.index(stream(**self.options), part=part)
        return DataLoader(data, batch_size=5, num_workers=self.workers, drop_last=part == "train")

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader("train")

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [self.loader("val"), DataLoader(make_data(4))]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_command_fills_a_stream(
    teacher: nn.Module, tmp_path: Path, make_trainer: Callable[..., Trainer], workers: int
) -> None:
    frozen, inputs = cached(teacher, tmp_path / "a.cache"), make_data(COUNT).tensors[0]
    computed: list[int] = []
    teacher.register_forward_hook(lambda _, given, logits: computed.append(len(logits)))
    data = Streams(frozen, workers)
    batch, rows = next(iter(DataLoader(frozen.index(stream()), batch_size=7)))
    frozen.logits(batch["x"], rows)
    computed.clear()
    cache_teacher(make_trainer(), Module(make_network(), frozen), data)
    assert sum(computed) == COUNT - 7 + COUNT  # what was there is not computed again
    assert [len(part.missing()) for part in frozen.caches[0].parts] == [0, 0]
    computed.clear()
    again = cached(teacher, tmp_path / "a.cache")
    cache_teacher(make_trainer(), Module(make_network(), again), Streams(again, workers))
    assert computed == []
    rows = torch.arange(COUNT)
    torch.testing.assert_close(frozen.logits(inputs, rows), FrozenTeacher(teacher)(inputs), rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_jobs_share_a_stream(teacher: nn.Module, tmp_path: Path, make_trainer: Callable[..., Trainer]) -> None:
    computed: list[int] = []
    teacher.register_forward_hook(lambda _, given, logits: computed.append(len(logits)))
    for shard in (2, 0, 0, None):  # the job of shard 1 never runs, another one twice
        frozen = cached(teacher, tmp_path / "a.cache")
        options: Any = {} if shard is None else {"num_shards": 3, "shard": shard}
        cache_teacher(make_trainer(), Module(make_network(), frozen), Streams(frozen), **options)
    assert sum(computed) == 2 * COUNT
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.cache", "a.val.cache"]
    assert [len(part.missing()) for part in frozen.caches[0].parts] == [0, 0]


@pytest.mark.slow
def test_ids_that_do_not_come_are_told(
    teacher: nn.Module, tmp_path: Path, make_trainer: Callable[..., Trainer]
) -> None:
    frozen = cached(teacher, tmp_path / "a.cache")
    data = Streams(frozen, count=30)
    with pytest.warns(
        UserWarning, match=r"6 rows of the cache .*\.cache are not filled, because their samples did not"
    ):
        cache_teacher(make_trainer(), Module(make_network(), frozen), data)


@pytest.mark.slow
def test_ranks_cannot_share_a_stream(teacher: nn.Module, tmp_path: Path, make_trainer: Callable[..., Trainer]) -> None:
    frozen = cached(teacher, tmp_path / "a.cache")
    trainer = make_trainer(devices=2, strategy="ddp_fork")
    message = (
        "cache-teacher cannot tell which of 2 processes gets which samples of a stream. Give --trainer.devices=1, and "
        "share the work by --num_shards and --shard: each job reads the whole stream and computes its own ids."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        cache_teacher(trainer, Module(make_network(), frozen), Streams(frozen))


@pytest.mark.slow
def test_a_fit_on_streams(teacher: nn.Module, tmp_path: Path, make_trainer: Callable[..., Trainer]) -> None:
    frozen = cached(teacher, tmp_path / "a.cache")
    training = DataLoader(frozen.index(stream()), batch_size=5)
    validation = DataLoader(frozen.index(stream(), part="val"), batch_size=5)
    trainer = make_trainer(max_epochs=3)
    trainer.fit(Module(make_network(), frozen), training, validation)
    assert [len(part.missing()) for part in frozen.caches[0].parts] == [0, 0]
    assert "val_agreement" in trainer.callback_metrics
