"""The ``train_`` metrics of an epoch that a checkpoint breaks in two."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import ClassificationModule, DistillationModule
from tests.helpers import make_data, make_loader, make_network, make_teacher

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),  # resumed runs save nothing
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch:UserWarning"),
]

MakeTrainer = Callable[..., Trainer]


def loader() -> DataLoader[Any]:
    """Five equal batches: Lightning starts a resumed epoch's loader anew, which makes no difference here."""
    inputs, targets = make_data(16).tensors
    return DataLoader(TensorDataset(inputs.repeat(5, 1), targets.repeat(5)), batch_size=16)


def make(kind: type[LightningModule]) -> LightningModule:
    torch.manual_seed(0)
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    if kind is ClassificationModule:
        return ClassificationModule(make_network(), optimizer=sgd)
    torch.manual_seed(1)
    return DistillationModule(make_network(), make_teacher(), optimizer=sgd)


class Epochs(Callback):
    """Keeps each epoch's ``train_`` metrics by its number."""

    def __init__(self) -> None:
        self.values: dict[int, dict[str, float]] = {}

    def keep(self, trainer: Trainer, epoch: int) -> None:
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.values[epoch] = {name: value for name, value in metrics.items() if name.startswith("train_a")}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch and "train_acc" in trainer.callback_metrics:
            self.keep(trainer, trainer.current_epoch - 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.keep(trainer, trainer.current_epoch - 1)


def fit(make_trainer: MakeTrainer, module: LightningModule, *callbacks: Callback, **options: Any) -> Epochs:
    epochs = Epochs()
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = make_trainer(callbacks=[epochs, *callbacks], enable_checkpointing=checkpoints)
    trainer.fit(module, loader(), make_loader(32, seed=1), **options)
    return epochs


@pytest.mark.parametrize("kind", [ClassificationModule, DistillationModule])
def test_they_are_those_of_the_unbroken_run(kind: Any, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path / "first", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(make_trainer, make(kind), saves).values
    assert len(whole) == 2
    assert whole[0] != whole[1]
    for step in range(1, 10):
        resumed = fit(make_trainer, make(kind), ckpt_path=tmp_path / "first" / f"step={step}.ckpt").values
        assert resumed == {epoch: whole[epoch] for epoch in resumed}
        assert set(resumed) >= ({0, 1} if step < 5 else {1})
    # a second break in the same epoch
    again = ModelCheckpoint(tmp_path / "second", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(make_trainer, make(kind), again, ckpt_path=tmp_path / "first" / "step=1.ckpt")
    resumed = fit(make_trainer, make(kind), ckpt_path=tmp_path / "second" / "step=3.ckpt").values
    assert resumed == whole


class InAFile(Callback):
    """Writes rank 0's ``train_acc`` of the first epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.path.write_text(str(trainer.callback_metrics["train_acc"].item()))


@pytest.mark.parametrize("later", [1, 2])
def test_several_ranks_go_on_from_the_sums_over_all(later: int, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Saved by two ranks within the epoch, resumed by two or by one."""

    def run(name: str, devices: int, callbacks: list[Callback], **options: Any) -> float:
        strategy = {"strategy": "ddp_fork", "devices": 2} if devices == 2 else {}
        callbacks = [*callbacks, InAFile(tmp_path / name)]
        trainer = make_trainer(
            callbacks=callbacks,
            max_epochs=1,
            enable_checkpointing=len(callbacks) > 1,
            use_distributed_sampler=False,
            **strategy,
        )
        trainer.fit(make(DistillationModule), loader(), **options)
        return float((tmp_path / name).read_text())

    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = run("whole", 2, [saves])
    sums = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["train_metrics"]["train_0"]["acc"]
    assert sums["total"] == 2 * 2 * 16  # both ranks have the same batches
    resumed = run("resumed", later, [], ckpt_path=tmp_path / "step=2.ckpt")
    rest = (whole * 2 * 5 * 16 - int(sums["correct"])) / 2 * later
    assert resumed == pytest.approx((int(sums["correct"]) + rest) / (64 + 3 * 16 * later))


@pytest.mark.parametrize("kind", [ClassificationModule, DistillationModule])
def test_a_checkpoint_without_metrics_is_said(
    kind: Any, make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(make_trainer, make(kind), saves)
    content = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    del content["train_metrics"]  # as an earlier version wrote it
    torch.save(content, tmp_path / "old.ckpt")
    said = "its train_ metrics cover the rest of the epoch only"
    with caplog.at_level(logging.INFO):
        for name, expected in (("step=3", False), ("step=5", False), ("old", True)):
            caplog.clear()
            fit(make_trainer, make(kind), ckpt_path=tmp_path / f"{name}.ckpt")
            assert (said in caplog.text) == expected


class Stop(Callback):
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 2:
            raise RuntimeError("enough")


def test_a_new_fit_forgets_an_interrupted_one(make_trainer: MakeTrainer) -> None:
    module = make(DistillationModule)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    expected = fit(make_trainer, make(DistillationModule)).values
    with pytest.raises(RuntimeError, match="enough"):
        fit(make_trainer, module, Stop())
    module.load_state_dict(start)
    assert fit(make_trainer, module).values == expected


def test_metrics_are_no_weights(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(make_trainer, make(DistillationModule), saves)
    content = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert not any("metrics" in name for name in content["state_dict"])
    assert "train_metrics" not in torch.load(tmp_path / "step=5.ckpt", weights_only=True)  # the epoch is over
    fresh = make(DistillationModule)
    loaded = DistillationModule.load_from_checkpoint(
        tmp_path / "step=3.ckpt", student=make_network(), teacher=fresh.teacher
    )
    loaded.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # pyright: ignore
    loaded.load_state_dict(fresh.state_dict())
    assert fit(make_trainer, loaded).values == fit(make_trainer, fresh).values
