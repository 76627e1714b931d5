from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from kd_lightning import DistillationModule
from kd_lightning.callbacks import AdaptiveTemperature, TemperatureFinder
from kd_lightning.callbacks.snapshot import Snapshot
from kd_lightning.callbacks.temperature_finder import Trial
from kd_lightning.temperature import CosineSchedule, ScheduledTemperature, Signals, Temperature, TemperaturePolicy
from tests.helpers import NUM_CLASSES, NUM_FEATURES, make_data, make_loader, make_network
from tests.unit.callbacks.helpers import Save, digits, distiller_of

Make = Callable[..., DistillationModule]
MakeTrainer = Callable[..., Trainer]


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Augments by every random number generator there is, and by one of its own."""

    def __init__(self) -> None:
        self.data = make_data(64)
        self.own = np.random.default_rng(3)

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, target = self.data[index]
        noise = random.random() + np.random.rand() + torch.rand(()).item() + self.own.random()  # noqa: NPY002
        return inputs + 0.1 * noise, target


class EveryState(TemperaturePolicy):
    """Has a parameter, a moving average and a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(1))
        self.average: Tensor
        self.register_buffer("average", torch.ones(1))
        self.calls: list[int] = []

    def compute(self, signals: Signals) -> Temperature:
        self.calls.append(len(self.calls))
        if self.training:
            self.average.lerp_(signals.teacher_logits.std().reshape(1), 0.1)
        t = 2 + 4 * torch.sigmoid(self.raw) * self.average
        return Temperature(t, t)


def student() -> nn.Sequential:
    """Batch norm and dropout: statistics, and random numbers in every step."""
    hidden = [nn.Linear(NUM_FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3)]
    return nn.Sequential(*hidden, nn.Linear(16, NUM_CLASSES))


OPTIONS: dict[str, Any] = {
    "optimizer": lambda params: torch.optim.AdamW(params, lr=0.01),
    "lr_scheduler": {
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=100),
        "interval": "step",
    },
}


class Seen(Callback):
    """Every training loss, and what has been counted and logged."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        self.losses.append(outputs["loss"].item())


def whole_run(
    make_trainer: MakeTrainer, module: DistillationModule, folder: Path, *finder: Callback, **options: Any
) -> dict[str, Any]:
    """A run with shuffling, dropout, augmentation and callbacks, and all that can be compared of it."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(7)
    generator = torch.Generator().manual_seed(11)
    data = Noisy()
    loader = DataLoader(data, batch_size=16, sampler=RandomSampler(data, generator=generator), drop_last=True)
    seen, adaptive = Seen(), AdaptiveTemperature("val_task_loss", "min", patience=1)
    given: dict[str, Any] = {
        "max_epochs": 4,
        "logger": CSVLogger(folder, version="run"),
        "log_every_n_steps": 2,
        "gradient_clip_val": 0.5,
        "accumulate_grad_batches": 2,
        "callbacks": [seen, adaptive, *finder, ModelCheckpoint(folder / "saved", monitor="val_acc")],
        "enable_checkpointing": True,
    }
    trainer = make_trainer(**(given | options))
    trainer.fit(module, loader, make_loader(32, seed=1))
    checkpoint = torch.load(folder / "saved" / os.listdir(folder / "saved")[0], weights_only=True)
    checkpoint["callbacks"] = {k: v for k, v in checkpoint["callbacks"].items() if k.startswith("Adaptive")}
    return {
        "losses": seen.losses,
        "weights": module.state_dict(),
        "optimiser": trainer.optimizers[0].state_dict(),
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "metrics": dict(trainer.callback_metrics),
        "logged": (folder / "lightning_logs" / "run" / "metrics.csv").read_text(),
        "files": sorted(os.listdir(folder / "saved")),
        "loops": {k: v for k, v in checkpoint["loops"]["fit_loop"].items() if "state_dict" not in k},
        "counters": (trainer.global_step, trainer.current_epoch, adaptive.state_dict(), checkpoint["callbacks"]),
        "configuration": checkpoint["kd_lightning"]["configuration"],
        "random": (torch.rand(3), np.random.rand(3).tolist(), random.random(), torch.rand(2, generator=generator)),  # noqa: NPY002
        "metric modules": sorted(module.metrics),
    }


def assert_equal(one: Any, two: Any, at: str = "") -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, two), at
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), at
        for key in one:
            assert_equal(one[key], two[key], f"{at}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), at
        for index, pair in enumerate(zip(one, two, strict=True)):
            assert_equal(*pair, f"{at}[{index}]")
    else:
        assert one == two, at


@pytest.mark.parametrize("policy", ["constant", "every state"])
def test_a_run_after_the_finder_equals_one_started_with_the_suggestion(
    policy: str, make_module: Make, make_trainer: MakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(temperature: Any, **options: Any) -> DistillationModule:
        torch.manual_seed(5)
        return make_module(student=student(), temperature=temperature, **OPTIONS, **options)

    candidates = (1, 3, 7) if policy == "constant" else (0.5, 1.5)
    finder = TemperatureFinder(candidates, steps=5, monitor="val_task_loss", mode="min", kd_weights=(0.5, 2), seeds=2)
    after = make(4.0 if policy == "constant" else EveryState())
    one = whole_run(make_trainer, after, tmp_path / "after", finder)
    assert finder.best is not None
    assert len(finder.results) == 2 * len(candidates)
    assert len({score for trial in finder.results for score in trial.scores}) > len(candidates)  # they were trained
    best, weight = finder.suggestion(), finder.best.kd_weight
    assert best is not None
    assert weight is not None
    assert "over 2 paired seeds" in capsys.readouterr().out

    started = make(float(best) if policy == "constant" else EveryState(), kd_weight=weight)
    if policy != "constant":
        distiller_of(started).temperature.multiplier.fill_(best)
        assert len(after.distiller.temperature.calls) == len(one["losses"]) + 5 * 2  # pyright: ignore
    assert_equal(one, whole_run(make_trainer, started, tmp_path / "started"))


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": -1, "max_steps": 6},
        {"reload_dataloaders_every_n_epochs": 2},
        {"check_val_every_n_epoch": None, "val_check_interval": 3},
        {"check_val_every_n_epoch": 2, "num_sanity_val_steps": 0, "min_epochs": 2},
    ],
    ids=lambda options: ", ".join(options),
)
def test_that_holds_whatever_ends_and_validates_the_run(
    options: dict[str, Any], make_module: Make, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def make(temperature: float) -> DistillationModule:
        torch.manual_seed(5)
        return make_module(student=student(), temperature=temperature, **OPTIONS)

    finder = TemperatureFinder((1, 7), steps=7, monitor="val_task_loss", mode="min", seeds=1)
    after = whole_run(make_trainer, make(4.0), tmp_path / "after", finder, **options)
    best = finder.suggestion()
    assert best is not None
    assert_equal(after, whole_run(make_trainer, make(float(best)), tmp_path / "started", **options))


@pytest.mark.parametrize("find_only", [True, False])
def test_only_the_run_says_that_it_stopped(
    find_only: bool, make_module: Make, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    finder = TemperatureFinder((1, 7), steps=99, monitor="val_task_loss", mode="min", seeds=2, find_only=find_only)
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        make_trainer(callbacks=[finder]).fit(make_module(), make_loader(), make_loader(16))
    assert caplog.text.count("`Trainer.fit` stopped") == (0 if find_only else 1)


def test_a_progress_bar_names_the_trial(
    make_module: Make, make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    finder = TemperatureFinder((1, 7), steps=2, monitor="val_task_loss", mode="min", seeds=2, find_only=True)
    make_trainer(callbacks=[finder], enable_progress_bar=True).fit(make_module(), make_loader(), make_loader(16))
    drawn = capsys.readouterr().err
    assert "Finding the temperature: 100%" in drawn
    assert "8/8" in drawn
    assert "temperature 7, seed 1" in drawn


class NothingLogged(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert not trainer.callback_metrics
        assert not trainer.logged_metrics
        assert not trainer.progress_bar_metrics


def test_a_trial_is_the_start_of_the_run(make_module: Make, make_trainer: MakeTrainer) -> None:
    """Loss for loss, so schedules of temperature and learning rate are those of the whole run."""
    recorded: list[float] = []

    class Recording(DistillationModule):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            recorded.append(loss.item())
            return loss

    torch.manual_seed(5)
    teacher = make_module().teacher
    module = Recording(student=student(), teacher=teacher, temperature=CosineSchedule(8, 2), **OPTIONS)
    loader = DataLoader(make_data(64), batch_size=16, shuffle=True)
    finder = TemperatureFinder([1], steps=7, monitor="val_task_loss", mode="min", seeds=2)
    trainer = make_trainer(max_epochs=4, callbacks=[finder, NothingLogged()], num_sanity_val_steps=0)
    trainer.fit(module, loader, make_loader(16))
    trial, other, run = recorded[:7], recorded[7:14], recorded[14:]
    assert trial == run[:7]
    assert other != trial
    assert finder.results[0].temperature == pytest.approx(8 - 6 * (1 - math.cos(math.pi * 6 / 16)) / 2, rel=1e-4)


def test_snapshot_restores_in_place_what_was_made_since_too() -> None:
    model = student()
    model.history = [torch.ones(2), {"a": 1}]  # pyright: ignore
    history, weight = model.history, model[0].weight
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.ConstantLR(optimizer), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)],
        milestones=[1],
    )
    kept = Snapshot(model, optimizer, scheduler, generator)
    before = [torch.cat([p.detach().flatten() for p in model.state_dict().values()]), scheduler.state_dict()]
    drawn = torch.rand(2, generator=generator.clone_state())
    for _ in range(2):
        for _ in range(3):
            model(torch.randn(4, NUM_FEATURES)).sum().backward()
            optimizer.step()
            scheduler.step()
        torch.rand(2, generator=generator)
        model.extra = nn.Linear(1, 1)
        model[0].weight.requires_grad_(False)
        model.history[0].zero_()  # pyright: ignore
        model.history.append(3)  # pyright: ignore
        model.eval()
        kept.restore()
        assert not hasattr(model, "extra")
        assert model.training
        assert model[0].weight is weight
        assert weight.requires_grad
        assert weight.grad is None
        assert model.history is history
        assert_equal(history, [torch.ones(2), {"a": 1}])
        assert not optimizer.state
        after = [torch.cat([p.detach().flatten() for p in model.state_dict().values()]), scheduler.state_dict()]
        assert_equal(before[0], after[0])
        assert scheduler.last_epoch == 0
        assert torch.equal(torch.rand(2, generator=generator.clone_state()), drawn)


# ---- what it says ---------------------------------------------------------------------------------------------------


def found(scores: dict[float, list[float]], seeds: int, mode: str = "max") -> TemperatureFinder:
    finder = TemperatureFinder(tuple(scores), seeds=seeds, mode=mode)  # pyright: ignore
    finder.results = [Trial(candidate, None, candidate, values) for candidate, values in scores.items()]
    return finder


def test_table_and_verdict() -> None:
    finder = found({1: [0.70, 0.72, 0.71], 4: [0.80, 0.83, 0.81], 16: [0.75, 0.84, 0.79]}, seeds=3)
    assert finder.suggestion() == 4
    lines = finder.table().splitlines()
    assert lines[0].split() == [
        "temperature",
        "T",
        "at",
        "the",
        "end",
        "val_acc",
        "std",
        "lowest",
        "highest",
        "best",
        "in",
    ]
    assert lines[2].split() == ["4", "4", "0.8133", "0.0153", "0.8000", "0.8300", "2", "of", "3"]
    assert lines[-1] == (
        "suggestion: temperature 4; it leads temperature 16 by 0.0200 ± 0.0173 (standard error over 3 paired seeds): "
        "within the noise"
    )
    clear = found({1: [0.5, 0.6, 0.7], 2: [0.4, 0.5, 0.6]}, seeds=3, mode="min").table()
    assert clear.endswith("by 0.1000 ± 0.0000 (standard error over 3 paired seeds): more than two standard errors")
    few = found({1: [0.5, 0.6], 2: [0.4, 0.5]}, seeds=2, mode="min").table()
    assert few.endswith("by 0.1000 ± 0.0000 (standard error over 2 paired seeds): too few to tell")
    one = found({1: [0.5], 2: [math.nan]}, seeds=1)
    assert [line.split() for line in one.table().splitlines()[:2]] == [
        ["temperature", "T", "at", "the", "end", "val_acc"],
        ["1", "1", "0.5000"],
    ]  # a single seed has no spread
    one = found({1: [0.5], 2: [0.4]}, seeds=1)
    assert one.table().endswith("it leads temperature 2 by 0.1000 on one seed: seeds=3 shows how noisy that is")
    broken = found({1: [math.nan, 0.9], 2: [0.4, 0.4]}, seeds=2)
    assert broken.suggestion() == 2
    assert broken.table().splitlines()[1].split() == ["1", "1", "nan", "–", "–", "–", "1", "of", "2"]
    assert found({1: [math.nan], 2: [math.nan]}, seeds=1).table().endswith("nothing is suggested")


def test_plot(tmp_path: Path) -> None:
    finder = found({1: [0.70, 0.72, 0.71], 4: [0.80, 0.83, 0.81], 16: [0.75, 0.84, 0.79]}, seeds=3)
    axes = finder.plot().axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "4", "16"]
    assert "3 seeds each" in axes.get_title(loc="left")
    with pytest.raises(RuntimeError, match="nothing to plot before the search"):
        TemperatureFinder().plot()


# ---- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": ()}, "candidates must be one or more positive"),
        ({"candidates": (1, -2)}, "candidates must be one or more positive"),
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"seeds": 0}, "seeds must be 1 or more, got 0"),
        ({"mode": "up"}, "mode must be one of"),
        ({"kd_weights": (-1,)}, "kd_weights must be one or more"),
        ({"monitor": "test_acc"}, "does not choose on the test set, got monitor='test_acc'"),
        ({"monitor": "val_kd_loss"}, "val_kd_loss changes with the temperature itself"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TemperatureFinder(**options)


class ValidatesOnTest(LightningDataModule):
    def setup(self, stage: str) -> None:
        self.test_set = self.val_set = make_data(16)

    def train_dataloader(self) -> Any:
        return make_loader()

    def val_dataloader(self) -> Any:
        return DataLoader(self.val_set, batch_size=16)


def test_it_refuses_at_fit(make_module: Make, make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="ValidatesOnTest validates on its test set"):
        make_trainer(callbacks=[TemperatureFinder()]).fit(make_module(), datamodule=ValidatesOnTest())
    with pytest.raises(ValueError, match=r"within the policy's bounds \[0.05, 100\], got 200"):
        make_trainer(callbacks=[TemperatureFinder((1, 200))]).fit(make_module(), make_loader(), make_loader())
    finder = TemperatureFinder((1,), steps=1, monitor="val_f1")
    with pytest.raises(RuntimeError, match="TemperatureFinder follows the metric 'val_f1', which was not logged"):
        make_trainer(callbacks=[finder]).fit(make_module(), make_loader(), make_loader())


def test_nothing_finite_changes_nothing(make_module: Make, make_trainer: MakeTrainer) -> None:
    module = make_module(optimizer=lambda params: torch.optim.SGD(params, lr=math.inf))
    finder = TemperatureFinder((1, 2), steps=2, monitor="val_task_loss", mode="min", find_only=True)
    trainer = make_trainer(callbacks=[finder])
    with pytest.warns(UserWarning, match="no candidate has a finite val_task_loss"):
        trainer.fit(module, make_loader(), make_loader(16))
    assert distiller_of(module).temperature.value == 4.0  # pyright: ignore
    assert trainer.global_step == 0  # find_only


# ---- resuming, ranks, real data -------------------------------------------------------------------------------------


def test_resuming_sets_what_was_found(make_module: Make, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def fit(epochs: int, **options: Any) -> tuple[DistillationModule, TemperatureFinder]:
        module = make_module(temperature=4.0)
        finder = TemperatureFinder((2, 9), steps=2, monitor="val_task_loss", mode="min", kd_weights=(0.3,), seeds=1)
        trainer = make_trainer(max_epochs=epochs, callbacks=[finder])
        trainer.fit(module, make_loader(), make_loader(16), **options)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module, finder

    _, first = fit(2)
    straight, _ = fit(4)
    resumed, finder = fit(4, ckpt_path=tmp_path / "2.ckpt")  # without the warning of a changed configuration
    assert finder.results == first.results
    assert_equal(straight.state_dict(), resumed.state_dict())
    assert distiller_of(resumed).temperature.value == finder.suggestion()  # pyright: ignore
    loaded = DistillationModule.load_from_checkpoint(tmp_path / "4.ckpt", student=make_network(), teacher=None)
    assert distiller_of(loaded).temperature.value == finder.suggestion()  # pyright: ignore
    assert distiller_of(loaded).kd_weight == distiller_of(resumed).kd_weight


def save(folder: Path, finder: TemperatureFinder) -> Save:
    return Save(folder, lambda module: {"results": finder.state_dict(), "weights": module.state_dict()})


def test_two_ranks_find_the_same_and_train_as_if_started_with_it(
    make_module: Make, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def fit(temperature: float, finder: TemperatureFinder, folder: Path) -> list[dict[str, Any]]:
        folder.mkdir()
        torch.manual_seed(5)
        module = make_module(student=student(), temperature=ScheduledTemperature(lambda _: temperature))
        torch.manual_seed(3)
        callbacks = [finder, save(folder, finder)] if finder.steps > 1 else [save(folder, finder)]
        trainer = make_trainer(devices=2, strategy="ddp_fork", callbacks=callbacks)
        trainer.fit(module, DataLoader(make_data(64), batch_size=8, shuffle=True), make_loader(16))
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]

    finder = TemperatureFinder((0.5, 2), steps=3, monitor="val_task_loss", mode="min", seeds=2)
    zero, one = fit(4.0, finder, tmp_path / "found")
    assert zero["results"] == one["results"]
    results = [Trial(**trial) for trial in zero["results"]["results"]]
    assert results[0].scores[0] != results[0].scores[1]  # distributed samplers too draw another order
    best = min(results, key=lambda trial: trial.mean).candidate
    zero["weights"].pop("distiller.temperature.multiplier")
    started, _ = fit(4.0 * best, TemperatureFinder(steps=1), tmp_path / "started")
    started["weights"].pop("distiller.temperature.multiplier")
    assert_equal(zero["weights"], started["weights"])


class NotSynchronised(DistillationModule):
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log("own", self.distiller.temperature.multiplier.squeeze() * (-3.0 if self.global_rank else 1.0))


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_two_ranks_decide_on_the_mean_of_their_scores(
    make_module: Make, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Rank 0 by itself would take 2, rank 1 would take 0.5."""
    schedule = ScheduledTemperature(lambda _: 4.0)
    module = NotSynchronised(student=make_network(), teacher=make_module().teacher, temperature=schedule)
    finder = TemperatureFinder((0.5, 2), steps=1, monitor="own", seeds=1)
    trainer = make_trainer(max_epochs=1, devices=2, strategy="ddp_fork", callbacks=[finder, save(tmp_path, finder)])
    trainer.fit(module, make_loader(), make_loader(16))
    for rank in (0, 1):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=True)["results"]["results"]
        assert [trial["scores"] for trial in results] == [[-0.5], [-2.0]]


def test_digits_whose_metric_falls(make_trainer: MakeTrainer) -> None:
    """With the gradient reversed the accuracy provably falls, how far depends on the temperature."""
    module, data = digits(lr=3e-3, maximize=True, temperature=4.0)
    finder = TemperatureFinder((1, 16), steps=16, monitor="val_acc", seeds=1, find_only=True)
    make_trainer(max_epochs=8, callbacks=[finder]).fit(module, datamodule=data)
    cold, hot = finder.results
    assert (cold.temperature, hot.temperature) == (1, 16)
    assert finder.suggestion() == (1 if cold.mean > hot.mean else 16)
    assert distiller_of(module).temperature.value == finder.suggestion()  # pyright: ignore
    assert abs(cold.mean - hot.mean) > 0.05
