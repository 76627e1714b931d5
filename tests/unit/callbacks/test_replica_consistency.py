from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.multiprocessing.spawn import ProcessRaisedException

from kd_lightning import ClassificationModule, DistillationModule, Distiller, LayerTerm
from kd_lightning.callbacks import AdaptiveTemperature, DistillationCallback, EarlyStopDistillation, ReplicaConsistency
from kd_lightning.losses import KDLoss, SimilarityPreservingLoss
from kd_lightning.modules.between_ranks import _difference, distiller_state
from kd_lightning.schedules import ConstantSchedule
from kd_lightning.temperature import Signals, Temperature, TemperaturePolicy
from tests.helpers import make_loader, make_network, make_teacher
from tests.unit.callbacks.helpers import digits, distiller_of

Make = Callable[..., DistillationModule]
MakeTrainer = Callable[..., Trainer]


class Disturb(Callback):
    """At step 3, on rank 1 alone, changes something that DDP does not synchronise in time or at all."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if trainer.global_step < 3 or trainer.global_rank != 1:
            return
        if self.what == "buffer":
            distiller_of(pl_module).temperature.multiplier.fill_(0.5)
        elif self.what == "counter":
            next(c for c in trainer.callbacks if isinstance(c, AdaptiveTemperature)).rule.state.flat_checks = 7  # pyright: ignore
        elif self.what == "switch":
            distiller_of(pl_module).kd_enabled = False
        elif self.what == "loss":
            distiller_of(pl_module).kd_loss = KDLoss(scale="none")
        elif self.what == "layer":
            next(iter(distiller_of(pl_module).layers)).weight = ConstantSchedule(2.0)


class OwnStatistic(TemperaturePolicy):
    """Keeps a moving average of its rank's batches without reducing it, as published code does."""

    def __init__(self) -> None:
        super().__init__()
        self.average: torch.Tensor
        self.register_buffer("average", torch.ones(1))

    def compute(self, signals: Signals) -> Temperature:
        self.average.lerp_(signals.teacher_logits.std().reshape(1), 0.5)
        return Temperature(self.average.clone(), self.average.clone())


def fit(make_trainer: MakeTrainer, module: DistillationModule, what: str, every_n_steps: int = 1) -> None:
    callbacks = [AdaptiveTemperature(), EarlyStopDistillation(), Disturb(what), ReplicaConsistency(every_n_steps)]
    trainer = make_trainer(devices=2, strategy="ddp_fork", callbacks=callbacks, max_epochs=3)
    trainer.fit(module, make_loader(), make_loader(16))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("buffer", r"differ after step 3:\s+distiller.temperature.multiplier: rank 0 has 1, rank 1 has 0.5[.;]"),
        ("counter", r"AdaptiveTemperature\{'monitor': 'val_acc'.*\}.flat_checks: rank 0 has 0, rank 1 has 7[.;]"),
        ("switch", r"distiller.kd_enabled: rank 0 has True, rank 1 has False[.;]"),
        ("loss", r"distiller.kd_loss: rank 0 has .KDLoss.*, rank 1 has .KDLoss.*scale='none'"),
        ("layer", r"distiller.layers.0: rank 0 has .LayerTerm.*weight=1.*, rank 1 has .LayerTerm.*weight=2"),
    ],
)
def test_the_error_names_tensor_and_ranks(
    what: str, message: str, make_module: Make, make_trainer: MakeTrainer
) -> None:
    with pytest.raises(ProcessRaisedException, match=message):
        fit(make_trainer, make_module(layers=[LayerTerm("0", "0", SimilarityPreservingLoss())]), what)


def test_a_statistic_that_is_not_reduced(make_module: Make, make_trainer: MakeTrainer) -> None:
    with pytest.raises(ProcessRaisedException, match=r"temperature.average: rank 0 has \d\.\d+, rank 1 has \d\.\d+"):
        fit(make_trainer, make_module(temperature=OwnStatistic()), "nothing", every_n_steps=1000)  # seen at the end


def test_ranks_that_agree_train_on(make_module: Make, make_trainer: MakeTrainer) -> None:
    fit(make_trainer, make_module(), "nothing")


def test_one_process(make_trainer: MakeTrainer) -> None:
    module, data = digits(lr=0.01)
    make_trainer(max_epochs=1, callbacks=[ReplicaConsistency(1)]).fit(module, datamodule=data)
    with pytest.raises(ValueError, match="every_n_steps must be 1 or more, got 0"):
        ReplicaConsistency(0)


def test_many_ranks_in_the_message() -> None:
    assert _difference("t", [("a", "1"), ("b", "2"), ("a", "1")]) == "t: ranks 0, 2 have 1, rank 1 has 2"
    assert _difference("t", [("a", "1"), None]) == "t: rank 0 has 1, rank 1 has nothing of this name"
    assert not _difference("t", [("a", "1")] * 3)


CHECKSUM = r"a checksum of the teacher's weights: rank 0 has .*, rank 1 has "


def test_a_teacher_may_have_an_empty_buffer() -> None:
    teacher = make_teacher()
    teacher.register_buffer("empty", torch.zeros(0))
    assert "a checksum of the teacher's weights" in distiller_state(Distiller(teacher), None)


class Drift(Callback):
    """In the first epoch, on rank 1 alone, changes something that nothing synchronises."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if trainer.global_rank == 1 and (trainer.global_step == 1 or self.what not in ("rows", "columns")):
            holder: Any = next((c for c in trainer.callbacks if isinstance(c, DistillationCallback)), pl_module)  # pyright: ignore
            if self.what == "multiplier":
                holder.distiller.temperature.multiplier.fill_(0.5)
            elif self.what == "temperature":
                holder.temperature = 2.0
            elif self.what == "kd_weight":
                holder.kd_weight = 0.25
            elif self.what == "rows":
                weight = holder.teacher.module[0].weight.data
                weight.copy_(weight.flip(0))
            elif self.what == "columns":
                weight = holder.teacher.module[0].weight.data
                weight.copy_(weight.flip(1))
            elif self.what == "statistic":
                holder.teacher.module[1].running_mean += 1.0
            else:
                holder.teacher.module[0].weight.data[0, 0] += 1.0


@pytest.mark.parametrize("kind", ["module", "callback"])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("multiplier", r"after step 2:\s+distiller.temperature.multiplier: rank 0 has 1, rank 1 has 0.5[.;]"),
        ("temperature", r"distiller.temperature: rank 0 has 'Constant.*value=4.*, rank 1 has 'Constant.*value=2"),
        ("kd_weight", r"distiller.kd_weight: rank 0 has 0.9, rank 1 has 0.25[.;]"),
        ("teacher", CHECKSUM),
        ("rows", CHECKSUM),
        ("columns", CHECKSUM),
        ("statistic", CHECKSUM),
    ],
)
def test_each_epoch_begins_with_a_comparison(kind: str, what: str, message: str, make_trainer: MakeTrainer) -> None:
    module: LightningModule = DistillationModule(student=make_network(norm=False), teacher=make_teacher())
    callbacks: list[Callback] = [Drift(what)]
    if kind == "callback":
        module = ClassificationModule(make_network(norm=False))
        callbacks.insert(0, DistillationCallback(make_teacher()))
    trainer = make_trainer(devices=2, strategy="ddp_fork", callbacks=callbacks, max_epochs=2)
    with pytest.raises(ProcessRaisedException, match=message):
        trainer.fit(module, make_loader())
