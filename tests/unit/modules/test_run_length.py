"""A whole-run schedule is at its end when the run is, whichever limit ends the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from kd_lightning import DistillationModule
from kd_lightning.callbacks import DistillationCallback
from kd_lightning.modules import ClassificationModule
from kd_lightning.temperature import LinearSchedule
from tests.helpers import make_data, make_loader, make_network

Make = Callable[..., DistillationModule]
MakeTrainer = Callable[..., Trainer]


class Fractions(Callback):
    """Records step, fraction and length at each training step, and the fraction of the sanity check."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int | None]] = []
        self.fractions: list[float] = []
        self.sanity: list[tuple[int, int | None]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DistillationModule)
        assert pl_module.progress.step == trainer.global_step  # read before the loop forgets the epoch before

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, DistillationModule)
        progress = pl_module.progress
        self.steps.append((progress.step, progress.max_steps))
        self.fractions.append(progress.fraction)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        assert isinstance(pl_module, DistillationModule)
        if trainer.sanity_checking:
            self.sanity.append((pl_module.progress.step, pl_module.progress.max_steps))


class Stream(IterableDataset[tuple[Tensor, ...]]):
    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter(make_data(40))  # pyright: ignore[reportArgumentType]


class Growing(LightningDataModule):
    """One batch of 8 in the first epoch, two in the second, and so on."""

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        return make_loader(8 * (self.trainer.current_epoch + 1), batch_size=8)


@pytest.mark.parametrize(
    ("options", "data", "steps"),
    [
        ({"max_steps": 8, "max_epochs": -1}, lambda: make_loader(64, 16), 8),
        ({"max_steps": 8}, lambda: make_loader(64, 16), 8),
        ({"max_epochs": 3}, lambda: make_loader(64, 16), 12),
        ({"max_epochs": 3, "max_steps": 7}, lambda: make_loader(64, 16), 7),
        ({"max_epochs": 3, "max_steps": 1000}, lambda: make_loader(64, 16), 12),
        ({"max_epochs": 3, "accumulate_grad_batches": 3}, lambda: make_loader(64, 16), 6),
        ({"max_epochs": 5, "reload_dataloaders_every_n_epochs": 1}, Growing, 15),
        ({"max_epochs": 2, "max_steps": 1000}, lambda: DataLoader(Stream(), batch_size=8), 10),
        ({"max_epochs": 2}, lambda: DataLoader(Stream(), batch_size=8), 10),
        ({"max_epochs": 2, "max_steps": 7}, lambda: DataLoader(Stream(), batch_size=8), 7),
        ({"max_epochs": 2, "limit_train_batches": 3}, lambda: DataLoader(Stream(), batch_size=8), 6),
    ],
)
def test_the_last_step_is_the_last_of_the_length(
    options: dict[str, Any], data: Callable[[], Any], steps: int, make_module: Make, make_trainer: MakeTrainer
) -> None:
    fractions, module, trainer = Fractions(), make_module(temperature=LinearSchedule(8.0, 2.0)), None
    trainer = make_trainer(callbacks=[fractions], **options)
    trainer.fit(module, data())
    assert trainer.global_step == steps
    assert fractions.steps[-1] == (steps - 1, steps)
    assert fractions.fractions == sorted(fractions.fractions)
    assert module.progress.fraction == 1.0


def test_gradient_accumulation_that_changes(make_module: Make, make_trainer: MakeTrainer) -> None:
    """4 batches an epoch: 1 + 1 steps, then 4 + 4."""
    fractions = Fractions()
    trainer = make_trainer(max_epochs=4, callbacks=[GradientAccumulationScheduler({0: 4, 2: 1}), fractions])
    trainer.fit(make_module(temperature=LinearSchedule(8.0, 2.0)), make_loader(64, 16))
    assert trainer.global_step == 10
    assert {length for _, length in fractions.steps} == {10}
    assert fractions.steps[-1] == (9, 10)


@pytest.mark.parametrize(
    ("options", "length"), [({"max_steps": 8}, 8), ({"max_steps": 8, "max_epochs": -1}, 8), ({"max_epochs": 2}, None)]
)
def test_the_sanity_check_is_step_0(
    options: dict[str, Any], length: int | None, make_module: Make, make_trainer: MakeTrainer
) -> None:
    fractions = Fractions()
    trainer = make_trainer(callbacks=[fractions], num_sanity_val_steps=1, **options)
    trainer.fit(make_module(temperature=LinearSchedule(8.0, 2.0)), make_loader(), make_loader())
    assert fractions.sanity == [(0, length)]


def test_the_sanity_check_with_the_callback(make_trainer: MakeTrainer, teacher: nn.Module) -> None:
    callback = DistillationCallback(teacher, temperature=LinearSchedule(8.0, 2.0), validate=True)
    trainer = make_trainer(callbacks=[callback], max_steps=8, max_epochs=-1, num_sanity_val_steps=1)
    trainer.fit(ClassificationModule(make_network()), make_loader(), make_loader())
    assert callback.progress.fraction == 1.0


def test_a_run_that_only_time_ends(make_module: Make, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_epochs=-1, max_time={"seconds": 20})
    with pytest.raises(ValueError, match=r"whose end must be known.*\(max_time alone names no step\)"):
        trainer.fit(make_module(temperature=LinearSchedule(8.0, 2.0)), make_loader())


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_resume_within_an_epoch(make_module: Make, make_trainer: MakeTrainer, tmp_path: Any) -> None:
    """5 batches an epoch, 2 accumulated: 3 steps an epoch; resumed after 2 batches and 1 step of the second."""

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "run.ckpt")
                trainer.should_stop = True

    def fit(*callbacks: Callback, **options: Any) -> None:
        module = make_module(temperature=LinearSchedule(8.0, 2.0))
        trainer = make_trainer(max_epochs=3, accumulate_grad_batches=2, callbacks=[*callbacks])
        trainer.fit(module, make_loader(80, 16), **options)

    fit(Save())
    fractions = Fractions()
    fit(fractions, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert [step for step, _ in fractions.steps] == [4, 4, 5, 6, 6, 7, 7, 8]
    assert {length for _, length in fractions.steps} == {9}
    assert torch.tensor(fractions.fractions).diff().ge(0).all()
