"""A fit with a teacher cache: the same training, without the teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import ClassificationModule, DistillationModule, FrozenTeacher
from kd_lightning.datamodules import DigitsDataModule
from kd_lightning.models import DigitsCNN
from kd_lightning.teachers import IndexedDataset, TeacherCache
from kd_lightning.teachers.indexed import Indexed
from tests.helpers import make_data, make_loader, make_network

pytestmark = pytest.mark.slow

Make = Callable[..., DistillationModule]
MakeTrainer = Callable[..., Trainer]
TEACHER = Path(__file__).parents[2] / "configs" / "digits_teacher.safetensors"


class Watch(Callback):
    """Keeps the losses, the batches' kind, the rows and how often the teacher ran on training batches."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rows: list[list[int]] = []
        self.slots: dict[int, set[int]] = {}
        self.runs = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DistillationModule)
        assert pl_module.teacher is not None

        def count(module: nn.Module, *_: Any) -> None:
            self.runs += trainer.training

        self.hook = pl_module.teacher.module.register_forward_hook(count)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DistillationModule)
        assert not isinstance(batch, Indexed)
        self.losses.append(float(outputs["loss"]))
        rows = pl_module._run.cache.rows
        if rows is not None:
            self.rows.append(rows.tolist())
            assert pl_module.teacher is not None
            cache = pl_module.teacher.caches[0]
            assert cache.dataset is not None
            self.slots.setdefault(trainer.current_epoch, set()).update(r // len(cache.dataset) for r in rows.tolist())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.hook.remove()


def digits(**options: Any) -> DigitsDataModule:
    return DigitsDataModule(**{"batch_size": 20, "train_fraction": 0.05, **options})  # 66 images


def digits_module(cache: TeacherCache | None = None, **options: Any) -> DistillationModule:
    torch.manual_seed(4)
    teacher = FrozenTeacher(DigitsCNN(), TEACHER, cache=cache)
    options.setdefault("optimizer", lambda params: torch.optim.SGD(params, lr=0.05))
    return DistillationModule(DigitsCNN(channels=(4, 8), hidden=16), teacher, **options)


def fit(make_trainer: MakeTrainer, cache: TeacherCache | None, data: Any = None, **options: Any) -> Watch:
    watch, module = Watch(), digits_module(cache)
    torch.manual_seed(5)
    make_trainer(callbacks=[watch], **options).fit(module, datamodule=digits() if data is None else data)
    return watch


def test_the_same_losses_with_and_without_a_cache(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    live = fit(make_trainer, None)
    cold = fit(make_trainer, TeacherCache(tmp_path / "a.cache"))
    warm = fit(make_trainer, TeacherCache(tmp_path / "a.cache"))
    assert len(live.losses) == 8
    assert live.losses == pytest.approx(warm.losses, rel=2e-3)
    assert cold.losses == warm.losses
    assert (live.runs, cold.runs, warm.runs) == (8, 5, 1)  # to fill it four times; and once, to compare
    assert cold.rows == warm.rows
    assert sorted(row for rows in warm.rows[:4] for row in rows) == list(range(66))


def test_validation_and_checkpoints_are_as_ever(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    metrics = []
    for cache in (None, TeacherCache(tmp_path / "a.cache")):
        module, trainer = digits_module(cache), make_trainer()
        torch.manual_seed(5)
        trainer.fit(module, datamodule=digits())
        metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert module.teacher is not None
        assert saved["kd_lightning"]["teacher"]["fingerprint"] == module.teacher.fingerprint()
        assert not any("cache" in name or "teacher" in name for name in saved["state_dict"])
    assert metrics[0].keys() == metrics[1].keys()
    assert metrics[0]["val_teacher_acc"] == metrics[1]["val_teacher_acc"] > 0.97
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-2, abs=1e-2)


# ---- augmentation ------------------------------------------------------------------------------------------------


def test_augmented_data_are_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"BatchedImageDataset is another one each time.*augmentation='fixed'"):
        fit(make_trainer, TeacherCache(tmp_path / "a.cache"), digits(augment=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("augmentation", "slots"), [("fixed", 1), ("replay", 3)])
def test_augmentation_is_replayed(
    make_trainer: MakeTrainer, tmp_path: Path, augmentation: Any, slots: int, workers: int
) -> None:
    def make() -> TeacherCache:
        return TeacherCache(tmp_path / "a.cache", augmentation=augmentation, slots=slots)

    data = digits(augment=True, num_workers=workers)
    cold = fit(make_trainer, make(), data, max_epochs=4)
    assert cold.slots == {epoch: {epoch % slots} for epoch in range(4)}
    cache = make()
    warm = fit(make_trainer, cache, data, max_epochs=4)
    assert warm.losses == cold.losses
    assert warm.runs == 1
    assert cold.runs == 4 * slots + 1
    assert not isinstance(data.train_dataloader().dataset, IndexedDataset)  # the fit has left the data as they were
    frozen = FrozenTeacher(DigitsCNN(), TEACHER)
    assert cache.dataset is not None
    for row in (0, 40, 66 * slots - 1):  # what the student saw is what the teacher was asked for
        (sample,) = cache.dataset.fetch([row])
        kept = cache.logits(torch.tensor([row]), lambda: pytest.fail("it is there"))
        torch.testing.assert_close(frozen(sample.batch[0][None]), kept, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")  # the second run's
@pytest.mark.parametrize("steps", [3, 4, 6])
def test_a_resumed_run_takes_the_epochs_slot(
    make_trainer: MakeTrainer, tmp_path: Path, steps: int, workers: int
) -> None:
    def cache() -> TeacherCache:
        return TeacherCache(tmp_path / "a.cache", augmentation="replay", slots=5)

    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="mid", every_n_train_steps=steps, enable_version_counter=False)

    data = digits(augment=True, num_workers=workers)
    first = make_trainer(max_steps=steps, max_epochs=-1, enable_checkpointing=True, callbacks=[saving()])
    first.fit(digits_module(cache()), datamodule=data)
    watch = Watch()
    module = digits_module(cache())
    trainer = make_trainer(max_epochs=4, enable_checkpointing=True, callbacks=[watch, saving()])
    trainer.fit(module, datamodule=digits(augment=True, num_workers=workers), ckpt_path=tmp_path / "mid.ckpt")
    assert watch.slots == {epoch: {epoch} for epoch in range(steps // 4, 4)}
    assert trainer.global_step == 16


# ---- other people's data -----------------------------------------------------------------------------------------


def cached(teacher: nn.Module, path: Path, **options: Any) -> FrozenTeacher:
    return FrozenTeacher(teacher, cache=TeacherCache(path, **options))


def test_a_loader_of_ones_own(make_module: Make, make_trainer: MakeTrainer, teacher: nn.Module, tmp_path: Path) -> None:
    frozen, watch = cached(teacher, tmp_path / "a.cache"), Watch()
    loader = DataLoader(frozen.index(make_data()), batch_size=12, drop_last=True)
    trainer = make_trainer(callbacks=[watch], accumulate_grad_batches=2, max_epochs=3)
    trainer.fit(make_module(teacher=frozen), loader, make_loader())
    assert watch.runs == 6
    assert "val_agreement" in trainer.callback_metrics
    live = Watch()
    make_trainer(callbacks=[live], accumulate_grad_batches=2, max_epochs=3).fit(
        make_module(teacher=copy.deepcopy(teacher)), DataLoader(make_data(), batch_size=12, drop_last=True)
    )
    assert live.losses == pytest.approx(watch.losses, rel=2e-3)


def test_a_loader_that_does_not_say_which_samples(
    make_module: Make, make_trainer: MakeTrainer, teacher: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"does not say which samples it has: make the loader of teacher\.index\(data"):
        make_trainer().fit(make_module(teacher=cached(teacher, tmp_path / "a.cache")), make_loader())


def test_a_data_module_with_a_transfer_hook_of_its_own(
    make_module: Make, make_trainer: MakeTrainer, teacher: nn.Module, tmp_path: Path
) -> None:
    frozen = cached(teacher, tmp_path / "a.cache")

    class Data(LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(frozen.index(make_data()), batch_size=16)

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            assert not isinstance(batch, Indexed)
            return batch

    module = make_module(teacher=frozen)
    make_trainer(max_epochs=1).fit(module, datamodule=Data())
    assert module.training_step(next(iter(Data().train_dataloader()))).requires_grad
    assert not len(frozen.caches[0].missing())


def test_a_module_with_batches_of_its_own(make_trainer: MakeTrainer, teacher: nn.Module, tmp_path: Path) -> None:
    class Mine(DistillationModule):
        def unpack_batch(self, batch: Any) -> tuple[Any, Tensor | None]:
            return batch["x"], batch["y"]

        def extract_logits(self, output: Any) -> Tensor:
            return output["scores"] if isinstance(output, dict) else output

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = teacher

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scores": self.network(x)}

    samples = [{"x": x, "y": y} for x, y in make_data()]
    frozen = cached(Scores(), tmp_path / "a.cache")
    trainer = make_trainer()
    trainer.fit(Mine(make_network(), frozen), DataLoader(frozen.index(samples), batch_size=16))
    assert not len(frozen.caches[0].missing())


def test_the_baseline_after_it(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    data = digits()
    fit(make_trainer, TeacherCache(tmp_path / "a.cache"), data)
    make_trainer(max_epochs=1).fit(ClassificationModule(DigitsCNN(channels=(4, 8), hidden=16)), datamodule=data)


def test_mixed_up_batches_are_found(
    make_module: Make, make_trainer: MakeTrainer, teacher: nn.Module, tmp_path: Path
) -> None:
    frozen = cached(teacher, tmp_path / "a.cache")

    class MixUp(DistillationModule):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            inputs, targets = batch
            return 0.5 * inputs + 0.5 * inputs[torch.randperm(len(inputs))], targets

    loader = DataLoader(frozen.index(make_data()), batch_size=16)
    with pytest.raises(ValueError, match="changed after the dataset"):
        make_trainer(max_epochs=3).fit(MixUp(make_network(), frozen), loader)


# ---- several processes -------------------------------------------------------------------------------------------


class Rank(Watch):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        torch.save([self.rows, self.runs, self.losses], self.folder / f"{trainer.global_rank}.pt")


def test_two_ranks_fill_one_cache(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    results = []
    path = tmp_path / "a.cache"
    for _ in range(2):
        torch.manual_seed(5)
        cache = TeacherCache(path, augmentation="replay", slots=2)
        trainer = make_trainer(devices=2, strategy="ddp_fork", callbacks=[Rank(tmp_path)], max_epochs=4)
        trainer.fit(digits_module(cache), datamodule=digits(augment=True, train_fraction=0.0501))
        results.append([torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)])
    for rank in (0, 1):
        (cold_rows, cold_runs, cold), (warm_rows, warm_runs, warm) = (result[rank] for result in results)
        assert cold_rows == warm_rows
        assert cold == pytest.approx(warm, rel=1e-5)
        assert (len(cold), cold_runs, warm_runs) == (8, 5, 1)
    seen = [row for rank in (0, 1) for rows in results[0][rank][0] for row in rows]
    assert set(seen) == set(range(132))
    cache = TeacherCache(path, augmentation="replay", slots=2)
    module = digits_module(cache)
    assert module.teacher is not None
    data = digits(augment=True, train_fraction=0.0501)
    data.setup("fit")
    module.teacher.index(data.train_dataset)
    assert not len(cache.missing())
    cache.verify()


def test_an_error_of_one_rank_ends_the_run(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    path = tmp_path / "a.cache"
    fit(make_trainer, TeacherCache(path))
    content = bytearray(path.read_bytes())
    content[4096 + 4 * 66 + 20 * 3] ^= 4
    path.write_bytes(content)
    trainer = make_trainer(devices=2, strategy="ddp_fork")
    with pytest.raises(ProcessRaisedException, match="row 3 does not match its checksum"):
        trainer.fit(digits_module(TeacherCache(path)), datamodule=digits())


def test_workers_that_live_on(make_module: Make, make_trainer: MakeTrainer, teacher: nn.Module, tmp_path: Path) -> None:
    losses = []
    for workers, path in ((0, "a"), (2, "b")):
        frozen, watch = cached(copy.deepcopy(teacher), tmp_path / path), Watch()
        data = frozen.index(TensorDataset(*make_data().tensors))
        options: dict[str, Any] = {"persistent_workers": True, "num_workers": workers} if workers else {}
        loader = DataLoader(data, batch_size=16, **options)
        make_trainer(callbacks=[watch]).fit(make_module(teacher=frozen), loader)
        losses.append(watch.losses)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(
    make_module: Make, make_trainer: MakeTrainer, teacher: nn.Module, tmp_path: Path, precision: Any
) -> None:
    losses = []
    for frozen in (cached(copy.deepcopy(teacher), tmp_path / "a.cache"), FrozenTeacher(copy.deepcopy(teacher))):
        data, watch = frozen.index(make_data()) if frozen.caches else make_data(), Watch()
        trainer = make_trainer(callbacks=[watch], precision=precision)
        trainer.fit(make_module(teacher=frozen), DataLoader(data, batch_size=16))
        losses.append(watch.losses)
    assert losses[0] == pytest.approx(losses[1], rel=3e-2)
