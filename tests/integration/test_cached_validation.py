"""Validation with a teacher cache: its logits come from the cache as those of training do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_lightning import DistillationModule, FrozenTeacher
from kd_lightning.callbacks import DistillationCallback
from kd_lightning.datamodules import DigitsDataModule, PythonDocsDataModule
from kd_lightning.models import DigitsCNN
from kd_lightning.teachers import TeacherCache
from kd_lightning.teachers.indexed import Indexed
from tests.helpers import make_data, make_network

pytestmark = pytest.mark.slow

MakeTrainer = Callable[..., Trainer]
TEACHER = Path(__file__).parents[2] / "configs" / "digits_teacher.safetensors"


def digits(**options: Any) -> DigitsDataModule:
    return DigitsDataModule(batch_size=40, train_fraction=0.05, **options)  # 66 images, and 146 to validate on


def teacher_with(path: Path, **options: Any) -> FrozenTeacher:
    return FrozenTeacher(DigitsCNN(), TEACHER, cache=TeacherCache(path, **options))


def counted(teacher: FrozenTeacher) -> list[int]:
    runs: list[int] = []
    teacher.module.register_forward_hook(lambda *_: runs.append(1))
    return runs


def fit(make_trainer: MakeTrainer, teacher: FrozenTeacher, data: Any = None) -> dict[str, float]:
    torch.manual_seed(4)
    module = DistillationModule(DigitsCNN(channels=(4, 8), hidden=16), teacher)
    trainer = make_trainer(max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(module, datamodule=digits() if data is None else data)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def erase(path: Path, rows: slice) -> None:
    """Take rows out of a cache: their flags are the last bytes of the file."""
    content = bytearray(path.read_bytes())
    count = (len(content) - 4096) // 25  # 2 · 10 bytes of logits, 4 of checksum and the flag
    flags = content[-count:]
    flags[rows] = bytes(len(flags[rows]))
    path.write_bytes(content[:-count] + flags)


def test_the_same_bits_with_a_cache_empty_half_full_and_full(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    path, results, runs = tmp_path / "a.cache", [], []
    for state in ("empty", "half", "full"):
        if state == "half":
            erase(tmp_path / "a.val.cache", slice(0, 146, 2))
        teacher = teacher_with(path)
        calls = counted(teacher)
        results.append(fit(make_trainer, teacher))
        runs.append(len(calls))
        assert [len(part.missing()) for part in teacher.caches[0].parts] == [0, 0]
    assert results[0] == results[1] == results[2]
    assert "val_agreement" in results[0]
    assert "val_teacher_acc" in results[0]
    # two batches of training, four of validation; a look at one stored batch of each that is there
    assert runs == [2 + 4 + 2, 1 + 4, 1 + 1]
    live = fit(make_trainer, FrozenTeacher(DigitsCNN(), TEACHER))
    assert live == pytest.approx(results[0], rel=2e-3, abs=2e-3)


def test_augmentation_is_of_training_alone(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    teacher = teacher_with(tmp_path / "a.cache", augmentation="replay", slots=2)
    fit(make_trainer, teacher, digits(augment=True))
    training, validation = teacher.caches[0].parts
    assert (training.slots, validation.slots) == (2, 1)
    assert len(validation.missing()) == 0
    assert validation.path == tmp_path / "a.val.cache"


def test_validate_reads_the_cache_too(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    results = []
    for _ in range(2):
        teacher = teacher_with(tmp_path / "a.cache")
        runs = counted(teacher)
        torch.manual_seed(4)
        module = DistillationModule(DigitsCNN(channels=(4, 8), hidden=16), teacher)
        data = digits()
        results.append((make_trainer().validate(module, datamodule=data, verbose=False), len(runs)))
        assert not isinstance(next(iter(data.val_dataloader())), Indexed)  # the data module is as before
    assert results[0][0] == results[1][0]
    assert [runs for _, runs in results] == [4, 1]


def test_other_validation_data_are_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    fit(make_trainer, teacher_with(tmp_path / "a.cache"))

    class Other(DigitsDataModule):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            assert self.val_dataset is not None
            self.val_dataset.targets = self.val_dataset.targets.roll(1)

    with pytest.raises(ValueError, match=r"a\.val\.cache is not of this run: of other data"):
        fit(make_trainer, teacher_with(tmp_path / "a.cache"), Other(batch_size=40, train_fraction=0.05))


def test_text_is_indexed_too(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(nn.Embedding(256, 4), nn.Linear(4, 256))
            nn.init.normal_(self.network[1].weight, std=3.0)  # pyright: ignore[reportArgumentType]

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.network(input_ids)

    teacher = FrozenTeacher(Tokens(), cache=TeacherCache(tmp_path / "a.cache"))
    module = DistillationModule(Tokens(), teacher, shift_labels=True)
    data = PythonDocsDataModule(batch_size=8, block_size=16, train_fraction=0.01, val_fraction=0.01)
    make_trainer(max_epochs=1).fit(module, datamodule=data)
    assert [len(part.missing()) for part in teacher.caches[0].parts] == [0, 0]


# ---- loaders of one's own, and the callback ------------------------------------------------------------------------


class Plain(LightningModule):
    """A user's module, which knows neither teacher nor cache."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_network()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(self(inputs), targets)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        self.log("val_loss", nn.functional.cross_entropy(self(inputs), targets))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert not isinstance(batch, Indexed)
        self.values.append(float(outputs["loss"]))


def test_the_callback_reads_the_cache(make_trainer: MakeTrainer, teacher: nn.Module, tmp_path: Path) -> None:
    results, calls = [], []
    for _ in range(2):
        torch.manual_seed(4)
        frozen = FrozenTeacher(teacher, cache=TeacherCache(tmp_path / "a.cache"))
        runs, losses = counted(frozen), Losses()
        trainer = make_trainer(
            callbacks=[DistillationCallback(frozen, validate=True), losses], max_epochs=2, num_sanity_val_steps=0
        )
        module = Plain()
        validation = DataLoader(frozen.index(make_data(32, seed=1), part="val"), batch_size=16)
        trainer.fit(module, DataLoader(frozen.index(make_data(64)), batch_size=16), validation)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        results.append((losses.values, metrics))
        calls.append(len(runs))
        assert "_on_before_batch_transfer" not in vars(module)
    assert results[0] == results[1]
    assert "val_agreement" in results[0][1]
    assert calls == [4 + 2 + 2, 1 + 1]


def test_the_callback_takes_the_epochs_slot(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    class Digits(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.net = DigitsCNN(channels=(4, 8), hidden=16)

    teacher = teacher_with(tmp_path / "a.cache", augmentation="replay", slots=2)
    data = digits(augment=True)
    make_trainer(callbacks=[DistillationCallback(teacher)], max_epochs=1).fit(Digits(), datamodule=data)
    assert teacher.caches[0].missing().tolist() == list(range(66, 132))
    make_trainer(callbacks=[DistillationCallback(teacher)], max_epochs=2).fit(Digits(), datamodule=data)
    assert not len(teacher.caches[0].missing())


def test_the_callback_needs_batches_that_name_their_samples(
    make_trainer: MakeTrainer, teacher: nn.Module, tmp_path: Path
) -> None:
    callback = DistillationCallback(FrozenTeacher(teacher, cache=TeacherCache(tmp_path / "a.cache")))
    with pytest.raises(ValueError, match=r"does not say which samples it has: make the loader of teacher\.index\(data"):
        make_trainer(callbacks=[callback]).fit(Plain(), DataLoader(make_data(), batch_size=16))
