"""A cache by id of the streams of litdata, webdataset and MosaicML, where those packages are installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_lightning import DistillationModule, FrozenTeacher
from kd_lightning.cli.commands import cache_teacher
from kd_lightning.teachers import TeacherCache
from kd_lightning.teachers.streams import StreamWithIds
from tests.helpers import make_data, make_network

COUNT = 60
pytestmark = [
    pytest.mark.slow,
    # of the packages, and of Lightning of streams that have a length
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning",
        "ignore:Your `IterableDataset` has `__len__`",
        "ignore:The given .* is not writable",
    ),
]


def sample(number: int) -> dict[str, Any]:
    inputs, targets = make_data(COUNT).tensors
    return {"id": number, "x": inputs[number], "y": int(targets[number])}


def webdataset_stream(folder: Path) -> Any:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(f"{folder}/%03d.tar", maxcount=15, verbose=0) as writer:
        for each in map(sample, range(COUNT)):
            writer.write({"__key__": f"{each['id']:08d}", "x.npy": each["x"].numpy(), "y.cls": each["y"]})
    stream = webdataset.WebDataset(f"{folder}/{{000..003}}.tar", shardshuffle=4).shuffle(20).decode()
    return stream.rename(id="__key__", x="x.npy", y="y.cls").map_dict(id=int)


def litdata_stream(folder: Path) -> Any:
    litdata = pytest.importorskip("litdata")
    options = {"chunk_bytes": "1KB", "num_workers": 1, "start_method": "fork", "verbose": False}
    litdata.optimize(sample, list(range(COUNT)), str(folder / "data"), **options)
    return litdata.StreamingDataset(str(folder / "data"), shuffle=True)


def mosaicml_stream(folder: Path) -> Any:
    streaming = pytest.importorskip("streaming")
    columns = {"id": "int", "x": "ndarray", "y": "int"}
    with streaming.MDSWriter(out=str(folder / "data"), columns=columns, size_limit=1024) as writer:
        for each in map(sample, range(COUNT)):
            writer.write({**each, "x": each["x"].numpy()})
    return streaming.StreamingDataset(local=str(folder / "data"), shuffle=True, batch_size=6)


@pytest.fixture(params=[webdataset_stream, litdata_stream, mosaicml_stream])
def stream(request: pytest.FixtureRequest, tmp_path: Path) -> StreamWithIds:
    return StreamWithIds(request.param(tmp_path), key="id", count=COUNT, name="numbers, v1")


def cached(teacher: nn.Module, folder: Path) -> FrozenTeacher:
    return FrozenTeacher(teacher, cache=TeacherCache(folder / "teacher.cache", dtype="float32"))


class Module(DistillationModule):
    def unpack_batch(self, batch: Any) -> tuple[Any, Tensor | None]:
        return batch["x"], batch["y"]


def test_rows_follow_the_ids(teacher: nn.Module, tmp_path: Path, stream: StreamWithIds) -> None:
    frozen, expected = cached(teacher, tmp_path), FrozenTeacher(teacher)(make_data(COUNT).tensors[0])
    runs: list[int] = []
    teacher.register_forward_hook(lambda *_: runs.append(1))
    data = frozen.index(stream)
    loader, orders = DataLoader(data, batch_size=6, num_workers=2, persistent_workers=True), []
    for epoch in range(3):
        data.set_epoch(epoch)
        runs.clear()
        orders.append([])
        for batch, rows in loader:
            assert batch["id"].tolist() == rows.tolist()
            torch.testing.assert_close(frozen.logits(batch["x"], rows), expected[rows], rtol=1e-5, atol=1e-5)
            orders[-1] += rows.tolist()
        assert sorted(orders[-1]) == list(range(COUNT))
        assert len(runs) == (10, 1, 0)[epoch]
    assert orders[0] != orders[1]


def test_the_command_and_a_fit(
    teacher: nn.Module, tmp_path: Path, stream: StreamWithIds, make_trainer: Callable[..., Trainer]
) -> None:
    frozen = cached(teacher, tmp_path)
    data = LightningDataModule()
    data.train_dataloader = lambda: DataLoader(frozen.index(stream), batch_size=6, num_workers=2)
    runs: list[int] = []
    teacher.register_forward_hook(lambda *_: runs.append(1))
    for job in (1, 0):
        cache_teacher(make_trainer(), Module(make_network(), frozen), data, num_shards=2, shard=job)
    cache_teacher(make_trainer(), Module(make_network(), frozen), data)
    assert not len(frozen.caches[0].missing())
    runs.clear()
    trainer = make_trainer(max_epochs=2)
    trainer.fit(Module(make_network(), frozen), datamodule=data)
    assert trainer.global_step == 20
    assert len(runs) == 1  # to compare


@pytest.mark.parametrize("stream", [litdata_stream, mosaicml_stream], indirect=True)
def test_a_trainer_knows_the_length_of_a_stream(
    teacher: nn.Module, tmp_path: Path, stream: StreamWithIds, make_trainer: Callable[..., Trainer]
) -> None:
    """As it does without a cache: schedules span the run from its first step on."""
    for frozen in (FrozenTeacher(teacher), cached(teacher, tmp_path)):
        data: Any = frozen.index(stream) if frozen.caches else stream.dataset
        trainer = make_trainer(max_epochs=1)
        trainer.fit(Module(make_network(), frozen), DataLoader(data, batch_size=6))
        assert trainer.num_training_batches == COUNT // 6
