"""A teacher whose cache has every row: its file may be absent, and its weights are released."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_lightning import DistillationModule, FrozenTeacher, TeacherEnsemble
from kd_lightning.datamodules import DigitsDataModule
from kd_lightning.models import DigitsCNN
from kd_lightning.teachers import MappedClasses, TeacherCache
from tests.helpers import make_data, make_teacher

MakeTrainer = Callable[..., Trainer]
CONFIGURED = Path(__file__).parents[2] / "configs" / "digits_teacher.safetensors"


class Weights(Callback):
    """Keeps, at the start of each epoch's first batch, whether the teacher has weights."""

    def __init__(self) -> None:
        self.absent: list[bool] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            assert isinstance(pl_module, DistillationModule)
            self.absent.append(all(p.is_meta for p in pl_module.teacher.module.parameters()))


class Rank(Weights):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (self.folder / str(trainer.global_rank)).write_text(str(self.absent))


def digits() -> DigitsDataModule:
    return DigitsDataModule(batch_size=40, train_fraction=0.05)


def teacher_of(folder: Path, **options: Any) -> FrozenTeacher:
    return FrozenTeacher(DigitsCNN(), folder / "teacher.safetensors", cache=TeacherCache(folder / "a.cache"), **options)


def fit(
    make_trainer: MakeTrainer, teacher: FrozenTeacher, **options: Any
) -> tuple[dict[str, float], list[bool], Trainer, DistillationModule]:
    torch.manual_seed(4)
    module, weights = DistillationModule(DigitsCNN(channels=(4, 8), hidden=16), teacher), Weights()
    trainer = make_trainer(max_epochs=3, num_sanity_val_steps=0, callbacks=[weights], **options)
    trainer.fit(module, datamodule=digits())
    return {name: float(x) for name, x in trainer.callback_metrics.items()}, weights.absent, trainer, module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(CONFIGURED, tmp_path / "teacher.safetensors")
    return tmp_path


@pytest.mark.slow
def test_weights_are_released_once_all_rows_are_there(make_trainer: MakeTrainer, folder: Path) -> None:
    live = fit(make_trainer, FrozenTeacher(DigitsCNN(), CONFIGURED))[1]
    cold, cold_absent, *_ = fit(make_trainer, teacher_of(folder))
    teacher = teacher_of(folder)
    warm, warm_absent, trainer, module = fit(make_trainer, teacher)
    assert cold == warm
    assert live == [False, False, False]
    assert cold_absent == [False, False, True]  # the second epoch compares the rows with the teacher
    assert warm_absent == [False, True, True]
    # where it is needed, it is read again
    (tested,) = trainer.test(module, datamodule=digits(), verbose=False)
    assert tested["test_teacher_acc"] > 0.9
    assert not any(p.is_meta for p in teacher.module.parameters())
    inputs = torch.randn(3, 1, 8, 8)
    assert torch.equal(teacher(inputs), FrozenTeacher(DigitsCNN(), CONFIGURED)(inputs))


@pytest.mark.slow
def test_a_run_without_the_teachers_file(make_trainer: MakeTrainer, folder: Path, tmp_path: Path) -> None:
    warm, _, trainer, _ = fit(make_trainer, teacher_of(folder))
    trainer.save_checkpoint(tmp_path / "with.ckpt")
    (folder / "teacher.safetensors").unlink()
    teacher = teacher_of(folder)
    without, absent, trainer, module = fit(make_trainer, teacher)
    assert without == warm
    assert "val_agreement" in without
    assert absent == [True, True, True]
    saved = torch.load(tmp_path / "with.ckpt", weights_only=True)["kd_lightning"]["teacher"]
    assert teacher.fingerprint() == saved["fingerprint"]
    # the test set is not in the cache: the student is measured alone, as without a teacher
    (tested,) = trainer.test(module, datamodule=digits(), verbose=False)
    assert "test_teacher_acc" not in tested
    assert "test_acc" in tested
    (validated,) = trainer.validate(module, datamodule=digits(), verbose=False)
    assert validated["val_agreement"] == without["val_agreement"]


@pytest.mark.slow
def test_two_ranks_release_together(make_trainer: MakeTrainer, folder: Path) -> None:
    fit(make_trainer, teacher_of(folder))
    module, weights = DistillationModule(DigitsCNN(channels=(4, 8), hidden=16), teacher_of(folder)), Rank(folder)
    trainer = make_trainer(max_epochs=3, devices=2, strategy="ddp_fork", num_sanity_val_steps=0, callbacks=[weights])
    trainer.fit(module, datamodule=digits())
    assert [(folder / f"{rank}").read_text() for rank in (0, 1)] == ["[False, True, True]"] * 2


def filled(teacher: FrozenTeacher) -> FrozenTeacher:
    for (inputs, _), rows in DataLoader(teacher.index(make_data(24)), batch_size=10):
        teacher.logits(inputs, rows)
    return teacher


def small(folder: Path, **options: Any) -> FrozenTeacher:
    options = {"checkpoint": folder / "small.pt", "cache": TeacherCache(folder / "small.cache"), **options}
    return FrozenTeacher(make_teacher(), **options)


@pytest.fixture
def absent(tmp_path: Path) -> Path:
    """A folder of a whole cache, whose teacher is gone."""
    network = make_teacher()
    torch.save(network.state_dict(), tmp_path / "small.pt")
    filled(small(tmp_path))
    (tmp_path / "small.pt").unlink()
    return tmp_path


def test_rows_are_read_without_a_teacher(absent: Path) -> None:
    teacher = small(absent, precision="bf16")
    assert teacher.available()
    with pytest.raises(ValueError, match="of another teacher"):  # of other precision
        FrozenTeacher(make_teacher(), cache=TeacherCache(absent / "small.cache")).index(make_data(24))
    data = teacher.index(make_data(24))
    assert not teacher.runs
    assert list(teacher.modules()) == []
    [(inputs, _), rows] = next(iter(DataLoader(data, batch_size=24)))
    assert teacher.logits(inputs, rows).shape == (24, 6)
    teacher.to(torch.float64).to("cpu")
    for wrapped in (MappedClasses(teacher, list(range(6))), TeacherEnsemble([teacher, make_teacher()])):
        assert not wrapped.runs
    with pytest.raises(FileNotFoundError, match=r"weights .*small\.pt are absent, and only samples of its cache"):
        teacher(inputs)


def test_a_cache_that_lacks_rows_needs_its_teacher(absent: Path) -> None:
    content = bytearray((absent / "small.cache").read_bytes())
    whole = bytes(content)
    content[-3] = 0
    (absent / "small.cache").write_bytes(content)
    teacher = small(absent)
    assert not teacher.available()
    with pytest.raises(FileNotFoundError, match=r"small\.pt"):
        teacher.index(make_data(24))
    (absent / "small.cache").write_bytes(whole)
    teacher = small(absent)
    teacher.index(make_data(24))
    validation = teacher.index(make_data(8, seed=1), part="val")
    [(inputs, _), rows] = next(iter(DataLoader(validation, batch_size=8)))
    with pytest.raises(FileNotFoundError, match=r"small\.val\.cache lacks row 0, and the teacher .* is absent"):
        teacher.logits(inputs, rows)


def test_other_weights_than_the_caches_are_refused(absent: Path) -> None:
    teacher = small(absent)
    teacher.load()
    other = make_teacher()
    other[0].weight.data += 1.0  # pyright: ignore[reportOperatorIssue, reportArgumentType]
    torch.save(other.state_dict(), absent / "small.pt")
    with pytest.raises(ValueError, match=r"have the fingerprint \w{8}, but its cache is of \w{8}\."):
        teacher(torch.ones(2, 8))


def test_released_weights_come_back_in_their_place_and_type(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(8, 8)
            self.two = nn.Linear(8, 8)
            self.two.weight = self.one.weight
            self.norm = nn.BatchNorm1d(8)
            self.register_buffer("scale", torch.ones(1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.norm(self.one(x))) * self.scale

    network = Tied()
    network.one.weight.data *= 9
    torch.save(network.state_dict(), tmp_path / "tied.pt")
    teacher = FrozenTeacher(Tied(), tmp_path / "tied.pt", cache=TeacherCache(tmp_path / "a.cache"), precision="bf16")
    before = teacher(torch.ones(2, 8))
    assert teacher.fingerprint()
    teacher.release()
    module = teacher.module
    assert isinstance(module, Tied)
    assert module.one.weight is module.two.weight
    assert module.one.weight.is_meta
    teacher.to(torch.float64)  # a precision of its own stays
    assert torch.equal(teacher(torch.ones(2, 8)), before)
    assert module.one.weight.dtype == torch.bfloat16
    in_place = FrozenTeacher(make_teacher(), cache=TeacherCache(tmp_path / "b.cache"))
    in_place.release()  # nothing could be read again
    assert not any(p.is_meta for p in in_place.parameters())
