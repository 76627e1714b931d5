from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from kd_lightning import DistillationModule, FrozenTeacher
from kd_lightning.functional import kd_loss
from kd_lightning.losses import CrossEntropyLoss
from kd_lightning.temperature import (
    CosineSchedule,
    ExponentialSchedule,
    LinearSchedule,
)
from tests.helpers import (
    NUM_CLASSES,
    NUM_FEATURES,
    LearnedTemperature,
    assert_same,
    make_data,
    make_loader,
    make_network,
    snapshot,
)

Make = Callable[..., DistillationModule]
MakeTrainer = Callable[..., Trainer]


class MoveTemperature(Callback):
    """Lowers the multiplier at the end of each validation, as an adaptive callback does."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            assert isinstance(pl_module, DistillationModule)
            pl_module.distiller.temperature.multiplier.mul_(0.5)


class CallTrain(Callback):
    """Puts the whole module in train mode, as some projects do."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.train()


# ---- training ----------------------------------------------------------------------------------------------------


def test_fit_equals_a_bare_loop(make_module: Make, make_trainer: MakeTrainer, teacher: nn.Module) -> None:
    module = make_module(temperature=LinearSchedule(8.0, 2.0))
    student = copy.deepcopy(module.student)
    make_trainer(max_epochs=3).fit(module, make_loader())

    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    teacher.eval()
    step = 0
    for _ in range(3):
        for inputs, targets in make_loader():
            t = 8.0 - 6.0 * step / 12
            logits = student(inputs)
            soft = F.kl_div(F.log_softmax(logits / t, -1), F.softmax(teacher(inputs) / t, -1), reduction="batchmean")
            optimizer.zero_grad()
            (0.9 * t * t * soft + 0.1 * F.cross_entropy(logits, targets)).backward()
            optimizer.step()
            step += 1
    for one, two in zip(student.parameters(), module.student.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_metrics_are_right_and_logged(
    make_module: Make, make_trainer: MakeTrainer, teacher: nn.Module, tmp_path: Path
) -> None:
    module = make_module(temperature=4.0)
    trainer = make_trainer(logger=CSVLogger(tmp_path), log_every_n_steps=2)
    trainer.fit(module, make_loader(), make_loader(40, seed=1))
    logged = trainer.callback_metrics
    inputs, targets = make_data(40, seed=1).tensors
    with torch.no_grad():
        logits, taught = module.eval()(inputs), teacher(inputs)
    expected = {
        "val_acc": (logits.argmax(1) == targets).float().mean(),
        "val_acc_top5": (logits.topk(5).indices == targets[:, None]).any(1).float().mean(),
        "val_agreement": (logits.argmax(1) == taught.argmax(1)).float().mean(),
        "val_teacher_acc": (taught.argmax(1) == targets).float().mean(),
        "val_task_loss": F.cross_entropy(logits, targets),
        "val_kd_loss": kd_loss(logits, taught, 4.0),
        "temperature_student": torch.tensor(4.0),
        "temperature_teacher": torch.tensor(4.0),
        "effective_kd_weight": torch.tensor(0.9 * 16),
    }
    for name, value in expected.items():
        torch.testing.assert_close(logged[name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert {"train_loss", "train_kd_loss", "train_task_loss", "train_acc", "val_calibration_error"} <= set(logged)
    assert 0 < logged["entropy_teacher"] < torch.tensor(NUM_CLASSES).log()
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    steps = [
        int(row.split(",")[header.index("step")]) for row in rows[1:] if row.split(",")[header.index("train_loss")]
    ]
    assert steps == [1, 3, 5, 7]  # the logger's interval, and no row missing


def test_test_and_predict(make_module: Make, make_trainer: MakeTrainer) -> None:
    module, trainer = make_module(), make_trainer()
    (metrics,) = trainer.test(module, make_loader(), verbose=False)
    assert {"test_acc", "test_loss", "test_agreement", "test_teacher_acc"} <= set(metrics)
    batches = trainer.predict(module, make_loader(32))
    assert batches is not None
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(batches), module.eval()(make_data(32).tensors[0]))  # pyright: ignore


def test_several_validation_loaders(make_module: Make, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(make_module(), make_loader(), [make_loader(32, seed=1), make_loader(32, seed=2)])
    assert {"val_acc/dataloader_idx_0", "val_acc/dataloader_idx_1"} <= set(trainer.callback_metrics)


def test_the_end_says_student_beside_teacher(
    make_module: Make, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    with caplog.at_level(logging.INFO):
        make_trainer(max_epochs=1).fit(make_module(), make_loader(), make_loader())
    assert "val_acc: student 0." in caplog.text
    assert ", teacher 0." in caplog.text
    assert "frozen parameters, weights in place), fingerprint" in caplog.text


# ---- batches, outputs --------------------------------------------------------------------------------------------


class Dictionary(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs, target = make_data()[index]
        return {"input": inputs, "labels": target}

    def __len__(self) -> int:
        return 32


def test_mapping_batches(teacher: nn.Module, make_module: Make, make_trainer: MakeTrainer) -> None:
    make_trainer(max_epochs=1).fit(make_module(), DataLoader(Dictionary(), batch_size=8))


def test_overriding_the_two_methods(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    class Wrapped(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            return {"scores": self.network(inputs)}

    class Mine(DistillationModule):
        def unpack_batch(self, batch: Any) -> tuple[Any, Tensor | None]:
            inputs, target, _index = batch
            return inputs, target

        def extract_logits(self, output: Any) -> Tensor:
            return output["scores"]

    inputs, targets = make_data().tensors
    loader = DataLoader(torch.utils.data.TensorDataset(inputs, targets, torch.arange(64)), batch_size=16)
    module = Mine(student=Wrapped(make_network()), teacher=Wrapped(teacher))
    make_trainer(max_epochs=1).fit(module, loader, loader)


def test_odd_batch_says_what_to_override(make_module: Make) -> None:
    with pytest.raises(TypeError, match=r"got tuple of length 3. Override unpack_batch"):
        make_module().unpack_batch((1, 2, 3))


# ---- optimisers --------------------------------------------------------------------------------------------------


def test_only_student_and_policy_reach_the_optimiser(make_module: Make, make_trainer: MakeTrainer) -> None:
    module = make_module(
        temperature=LearnedTemperature(), optimizer=lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.5)
    )
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, make_loader())
    student, policy = trainer.optimizers[0].param_groups
    assert {id(p) for p in student["params"]} == {id(p) for p in module.student.parameters()}
    assert [id(p) for p in policy["params"]] == [id(module.distiller.temperature.raw)]  # pyright: ignore
    assert student["weight_decay"] == 0.5
    assert policy["weight_decay"] == 0
    assert module.distiller.temperature.raw != 0  # it learns


class OwnOptimizer(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = make_network()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.123)
        assert self.trainer.max_epochs == 1  # it may look at its trainer
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


def test_a_lightning_student_brings_its_own_optimiser(make_module: Make, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_epochs=1)
    module = make_module(student=OwnOptimizer(), optimizer=None, temperature=LearnedTemperature())
    trainer.fit(module, make_loader())
    assert trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.123
    assert len(trainer.optimizers[0].param_groups) == 2
    assert len(trainer.lr_scheduler_configs) == 1


def test_plateau_scheduler_gets_a_monitor(make_module: Make, make_trainer: MakeTrainer) -> None:
    module = make_module(lr_scheduler=lambda opt: torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=1))
    make_trainer(max_epochs=1).fit(module, make_loader(), make_loader())


def test_nothing_to_train(teacher: nn.Module, make_trainer: MakeTrainer) -> None:
    module = DistillationModule(student=make_network().requires_grad_(False), teacher=teacher)
    with pytest.raises(ValueError, match="there is nothing to train"):
        make_trainer().fit(module, make_loader())


# ---- the teacher is untouched ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "callback",
    [
        None,
        CallTrain(),
        StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
        WeightAveraging(),
        EMAWeightAveraging(decay=0.5),
        ModelPruning("l1_unstructured", amount=0.5),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_teacher_is_bit_identical_and_an_adapted_temperature_survives(
    callback: Callback | None, make_module: Make, make_trainer: MakeTrainer, teacher: nn.Module, tmp_path: Path
) -> None:
    before = snapshot(teacher)
    module = make_module(temperature=8.0)
    seen: list[float] = []

    class Record(Callback):
        def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
            seen.append(module.distiller.temperature.multiplier.item())

    saver = ModelCheckpoint(dirpath=tmp_path, monitor="val_acc", mode="max", save_top_k=-1, filename="{epoch}")
    callbacks = [c for c in (callback, MoveTemperature(), Record(), saver) if c is not None]
    trainer = make_trainer(max_epochs=4, callbacks=callbacks, enable_checkpointing=True, num_sanity_val_steps=0)
    trainer.fit(module, make_loader(), make_loader(16))
    assert_same(snapshot(teacher), before)
    epochs = len(seen)
    assert seen == [0.5**n for n in range(epochs)]
    assert module.distiller.temperature.multiplier.item() == 0.5**epochs
    plain = not isinstance(callback, StochasticWeightAveraging)  # before torch 2.9 its scheduler saves a function
    for epoch in range(epochs):
        saved = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=plain)["state_dict"]
        assert not any("teacher" in name for name in saved)
        assert saved["distiller.temperature.multiplier"].item() == 0.5 ** (epoch + 1)


def test_teacher_and_student_may_not_share(teacher: nn.Module) -> None:
    with pytest.raises(ValueError, match="share parameters"):
        DistillationModule(student=nn.Sequential(teacher, nn.Identity()), teacher=teacher)


# ---- checkpoints and resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [CosineSchedule(8, 2), ExponentialSchedule(16, 0.5), LearnedTemperature()])
def test_resume_is_exact(
    temperature: Any, make_module: Make, make_trainer: MakeTrainer, tmp_path: Path, teacher: nn.Module
) -> None:
    def run(**fit: Any) -> tuple[DistillationModule, Trainer]:
        module = make_module(temperature=copy.deepcopy(temperature))
        trainer = make_trainer(max_epochs=4, callbacks=[MoveTemperature()], num_sanity_val_steps=0)
        trainer.fit(module, make_loader(), make_loader(16), **fit)
        return module, trainer

    class StopAfterTwo(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    straight, _ = run()
    first = make_module(temperature=copy.deepcopy(temperature))
    trainer = make_trainer(max_epochs=4, callbacks=[MoveTemperature(), StopAfterTwo()], num_sanity_val_steps=0)
    trainer.fit(first, make_loader(), make_loader(16))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, trainer = run(ckpt_path=tmp_path / "half.ckpt")
    assert trainer.current_epoch == 4
    assert_same(snapshot(straight), snapshot(resumed))


def test_resuming_with_another_teacher_is_an_error(
    make_module: Make, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(make_module(), make_loader())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    other = make_network(32)
    other[1].running_mean += 1.0  # pyright: ignore
    module = make_module(teacher=other)
    with pytest.raises(RuntimeError, match=r"was trained with the teacher FrozenTeacher.*but the teacher now is"):
        make_trainer(max_epochs=2).fit(module, make_loader(), ckpt_path=tmp_path / "one.ckpt")


def test_a_missing_student_key_is_an_error(make_module: Make, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(make_module(), make_loader())
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    checkpoint = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    del checkpoint["state_dict"]["student.0.weight"]
    torch.save(checkpoint, tmp_path / "part.ckpt")
    with pytest.raises(RuntimeError, match=r"missing in the file: student\.0\.weight\. Build"):
        make_trainer(max_epochs=2).fit(make_module(), make_loader(), ckpt_path=tmp_path / "part.ckpt")


def test_changed_settings_on_resume_are_said(make_module: Make, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(make_module(temperature=4.0), make_loader())
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    with pytest.warns(
        UserWarning, match=r"temperature=ConstantTemperature\(value=4\).*=ConstantTemperature\(value=2\)"
    ):
        make_trainer(max_epochs=2).fit(make_module(temperature=2.0), make_loader(), ckpt_path=tmp_path / "four.ckpt")


def test_load_from_checkpoint_over_three_generations(
    make_module: Make, make_trainer: MakeTrainer, tmp_path: Path, teacher: nn.Module
) -> None:
    module = make_module(kd_weight=0.8, task_weight=0.2, temperature=CosineSchedule(6.0, 2.0))
    trainer = make_trainer()
    trainer.fit(module, make_loader(), make_loader(40, seed=1))
    trainer.save_checkpoint(tmp_path / "0.ckpt")
    first = trainer.validate(module, make_loader(40, seed=1), verbose=False)
    for generation in range(3):
        module = DistillationModule.load_from_checkpoint(
            tmp_path / f"{generation}.ckpt",
            student=make_network(),
            teacher=FrozenTeacher(teacher),
            temperature=CosineSchedule(6.0, 2.0),
            weights_only=True,
        )
        assert module.hparams["kd_weight"] == 0.8
        trainer = make_trainer()
        assert trainer.validate(module, make_loader(40, seed=1), verbose=False) == first
        trainer.save_checkpoint(tmp_path / f"{generation + 1}.ckpt")


def test_validate_and_predict_need_no_teacher_file(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = DistillationModule(student=make_network(), teacher=FrozenTeacher(make_network(32), tmp_path / "gone.pt"))
    trainer = make_trainer()
    (metrics,) = trainer.validate(module, make_loader(), verbose=False)
    assert {"val_acc", "val_task_loss"} <= set(metrics)
    assert "val_loss" not in metrics
    assert "val_agreement" not in metrics
    trainer.predict(module, make_loader())
    with pytest.raises(FileNotFoundError, match=r"gone\.pt"):
        trainer.fit(module, make_loader())


def test_fit_without_teacher(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="fit needs a teacher"):
        make_trainer().fit(DistillationModule(student=make_network()), make_loader())


def test_student_weights_go_into_the_bare_student(make_module: Make, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = make_module()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, make_loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    torch.save(module.student.state_dict(), tmp_path / "student.pt")
    bare = make_network()
    bare.load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True))
    assert_same(snapshot(bare), snapshot(module.student))
    next_teacher = FrozenTeacher(make_network(), tmp_path / "run.ckpt")  # a distilled student can teach the next
    inputs = torch.randn(3, NUM_FEATURES)
    assert torch.equal(next_teacher(inputs), bare.eval()(inputs))


# ---- precision, accumulation, compile ----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(precision: Any, make_module: Make, make_trainer: MakeTrainer) -> None:
    module = make_module(temperature=LearnedTemperature())
    trainer = make_trainer(precision=precision)
    trainer.fit(module, make_loader(), make_loader())
    assert module.distiller.temperature.multiplier.dtype == torch.float32
    assert all(torch.isfinite(value) for value in trainer.callback_metrics.values())


def test_progress_counts_optimiser_steps(make_module: Make, make_trainer: MakeTrainer) -> None:
    seen: list[tuple[int, int | None]] = []

    def record(progress: Any) -> float:
        seen.append((progress.step, progress.max_steps))
        return 4.0

    trainer = make_trainer(accumulate_grad_batches=2, max_epochs=2, limit_val_batches=0)
    trainer.fit(make_module(temperature=record), make_loader())
    assert seen == [(step, 4) for step in (0, 0, 1, 1, 2, 2, 3, 3)]


def test_endless_training_has_no_fraction(make_module: Make, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_epochs=-1, max_steps=4)
    trainer.fit(make_module(temperature=CosineSchedule(8, 2)), make_loader())
    assert trainer.global_step == 4


@pytest.mark.parametrize("temperature", [4.0, CosineSchedule(8, 2)])
def test_the_whole_module_compiles_to_at_most_two_graphs(
    temperature: Any, make_module: Make, make_trainer: MakeTrainer
) -> None:
    graphs: list[Any] = []

    def count(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    student = make_network()
    eager = make_module(student=copy.deepcopy(student), temperature=temperature)
    compiled = make_module(student=copy.deepcopy(student), temperature=temperature)
    make_trainer(max_epochs=5).fit(eager, make_loader())
    make_trainer(max_epochs=5).fit(cast(LightningModule, torch.compile(compiled, backend=count)), make_loader())
    assert 1 <= len(graphs) <= 2
    for one, two in zip(eager.student.parameters(), compiled.student.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_compiled_student(make_module: Make, make_trainer: MakeTrainer) -> None:
    module = make_module(temperature=CosineSchedule(8, 2))
    module.student.compile(backend="eager")
    make_trainer().fit(module, make_loader(), make_loader())


@pytest.mark.parametrize("before", [None, 2.0, 1.0])
@pytest.mark.parametrize("after", [None, 1.0])
def test_class_weights_are_settings_and_not_taken_from_a_checkpoint(
    before: float | None, after: float | None, make_module: Make, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def module(weight: float | None) -> DistillationModule:
        weights = None if weight is None else torch.full((NUM_CLASSES,), weight)
        return make_module(task_loss=CrossEntropyLoss(weight=weights))

    trainer = make_trainer(max_epochs=1)
    trainer.fit(module(before), make_loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    resumed, options = module(after), {"ckpt_path": tmp_path / "run.ckpt", "weights_only": True}
    if before == after:
        make_trainer(max_epochs=2).fit(resumed, make_loader(), **options)
    else:
        with pytest.warns(UserWarning, match=r"was trained with other class weights \(distiller.task_loss.weight\)"):
            make_trainer(max_epochs=2).fit(resumed, make_loader(), **options)
    weight = resumed.distiller.task_loss.weight
    assert weight is None if after is None else torch.equal(weight, torch.full((NUM_CLASSES,), after))  # pyright: ignore
