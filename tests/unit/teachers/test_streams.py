"""A cache of streams, whose samples are known by their ids."""

from __future__ import annotations

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


@pytest.mark.slow
def test_no_command_fills_a_stream(teacher: nn.Module, tmp_path: Path, make_trainer: Callable[..., Trainer]) -> None:
    frozen = cached(teacher, tmp_path / "a.cache")
    data = LightningDataModule.from_datasets()
    data.train_dataloader = lambda: DataLoader(frozen.index(stream()))
    with pytest.raises(ValueError, match="since the first epoch of training fills the cache"):
        cache_teacher(make_trainer(), DistillationModule(make_network(), frozen), data)


@pytest.mark.slow
def test_a_fit_on_streams(teacher: nn.Module, tmp_path: Path, make_trainer: Callable[..., Trainer]) -> None:
    class Module(DistillationModule):
        def unpack_batch(self, batch: Any) -> tuple[Any, Tensor | None]:
            return batch["x"], batch["labels"]

    frozen = cached(teacher, tmp_path / "a.cache")
    training = DataLoader(frozen.index(stream()), batch_size=5)
    validation = DataLoader(frozen.index(stream(), part="val"), batch_size=5)
    trainer = make_trainer(max_epochs=3)
    trainer.fit(Module(make_network(), frozen), training, validation)
    assert [len(part.missing()) for part in frozen.caches[0].parts] == [0, 0]
    assert "val_agreement" in trainer.callback_metrics
