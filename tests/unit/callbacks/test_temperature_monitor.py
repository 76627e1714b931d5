from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kd_lightning.plotting
from kd_lightning import DistillationModule
from kd_lightning.callbacks import AdaptiveTemperature, TemperatureMonitor
from kd_lightning.callbacks.temperature_monitor import gradient_share
from kd_lightning.functional import predictive_entropy
from kd_lightning.temperature import CosineSchedule, Signals, Temperature, TemperaturePolicy
from tests.helpers import make_data, make_loader, make_network
from tests.unit.callbacks.helpers import Script, digits

Make = Callable[..., DistillationModule]
MakeTrainer = Callable[..., Trainer]
OWN = {"temperature_student", "temperature_teacher", "effective_kd_weight", "entropy_student", "entropy_teacher"}


class PerSample(TemperaturePolicy):
    def compute(self, signals: Signals) -> Temperature:
        confidence = signals.teacher_logits.softmax(-1).amax(-1, keepdim=True)
        return Temperature(student=2 * confidence, teacher=1 + 4 * confidence)


def fit(
    make_trainer: MakeTrainer, module: DistillationModule, folder: Path, *callbacks: Callback, **options: Any
) -> list[dict[str, str]]:
    """The logged rows, as the CSV file has them."""
    options = {"max_epochs": 2, "log_every_n_steps": 2, "num_sanity_val_steps": 1} | options
    trainer = make_trainer(logger=CSVLogger(folder, version="run"), callbacks=list(callbacks), **options)
    trainer.fit(module, make_loader(80), make_loader(16))
    with open(folder / "lightning_logs" / "run" / "metrics.csv") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str) -> dict[int, float]:
    return {int(row["step"]): float(row[name]) for row in rows if row.get(name)}


def test_values_and_rows(make_module: Make, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = make_module(temperature=PerSample(), optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    module.student = make_network(norm=False)
    rows = fit(make_trainer, module, tmp_path, TemperatureMonitor())
    inputs, targets = make_data(80).tensors
    assert module.teacher is not None
    with torch.no_grad():
        logits, taught = module.student(inputs), module.teacher(inputs)
        t = PerSample()(Signals(logits, taught, targets))
    assert isinstance(t, Temperature)
    steps = {1: 1, 3: 3, 4: 4, 5: 0, 7: 2, 9: 4}  # every second step, and the last of each epoch; the batch seen there
    for step, batch in steps.items():
        of = slice(16 * batch, 16 * batch + 16)
        expected = {
            "temperature_student": t.student[of].mean(),
            "temperature_student_min": t.student[of].min(),
            "temperature_student_max": t.student[of].max(),
            "temperature_teacher": t.teacher[of].mean(),
            "temperature_teacher_min": t.teacher[of].min(),
            "temperature_teacher_max": t.teacher[of].max(),
            "temperature_multiplier": torch.tensor(1.0),
            "effective_kd_weight": 0.9 * (t.student[of] * t.teacher[of]).mean(),
            "entropy_student": predictive_entropy(logits[of], t.student[of]).mean(),
            "entropy_teacher": predictive_entropy(taught[of], t.teacher[of]).mean(),
        }
        for name, value in expected.items():
            assert column(rows, name)[step] == pytest.approx(value.item(), rel=1e-5), name
            assert set(column(rows, name)) == set(steps)
    assert set(column(rows, "train_loss")) == set(steps) - {4}  # as the module logs its losses


@pytest.mark.parametrize(
    ("interval", "temperature", "steps"),
    [
        ("step", 4.0, {1, 3, 4, 5, 7, 9}),
        ("epoch", CosineSchedule(8, 2), {4, 9}),
        (None, 4.0, {4, 9}),
        (None, CosineSchedule(8, 2), {1, 3, 4, 5, 7, 9}),
    ],
)
def test_intervals(
    interval: Any, temperature: Any, steps: set[int], make_module: Make, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    rows = fit(make_trainer, make_module(temperature=temperature), tmp_path, TemperatureMonitor(interval))
    for name in (*OWN, "temperature_multiplier"):
        assert set(column(rows, name)) == steps, name
    assert not any(name.endswith(("_min", "_max")) for name in rows[0])


def test_it_follows_a_moved_multiplier_and_feeds_callback_metrics(
    make_module: Make, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = make_module(temperature=4.0)
    adaptive = AdaptiveTemperature("scripted", factor=0.5, patience=1)
    rows = fit(make_trainer, module, tmp_path, Script([0.9] * 3, 5), adaptive, TemperatureMonitor(), max_epochs=3)
    assert list(column(rows, "temperature_multiplier").values()) == [1, 1, 0.5]
    assert list(column(rows, "temperature_student").values()) == [4, 4, 2]


def test_accumulated_gradients_give_one_row_per_step(
    make_module: Make, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = make_module(temperature=CosineSchedule(8, 2))
    monitor = TemperatureMonitor(plot=True)
    rows = fit(make_trainer, module, tmp_path, monitor, accumulate_grad_batches=2)  # 3 steps an epoch
    assert set(column(rows, "temperature_student")) == {1, 2, 3, 5}
    assert [row[0] for row in monitor.history] == [2, 3, 4, 6]


class Count(TorchDispatchMode):
    """Counts operations, and those that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.all += 1
        self.waits += "_local_scalar_dense" in str(func) or "_to_copy" in str(func)
        return func(*args, **(kwargs or {}))


def test_no_work_between_the_logged_steps_and_no_wait_but_one_transfer_in_them(
    make_module: Make, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    counts: list[tuple[int, int]] = []

    class Counted(TemperatureMonitor):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            with Count() as count:
                super().on_train_batch_end(*args, **kwargs)
            counts.append((count.all, count.waits))

    fit(make_trainer, make_module(temperature=PerSample()), tmp_path, Counted("step"), max_epochs=1)
    assert [ops > 0 for ops, _ in counts] == [False, True, False, True, True]
    assert max(waits for _, waits in counts) <= 10  # tolist reads its row's ten numbers from one CPU copy


# ---- the gradient's share -------------------------------------------------------------------------------------------


def test_gradient_share(make_module: Make, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    shares: list[float] = []

    class Compare(Callback):
        """By two backward passes of the bare terms."""

        def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
            assert isinstance(pl_module, DistillationModule)
            output = pl_module.last_output
            assert output is not None
            norms = []
            for term in (0.9 * output.kd_loss, 0.1 * output.task_loss):
                grads = torch.autograd.grad(term, list(pl_module.student.parameters()), retain_graph=True)
                norms.append(torch.cat([grad.flatten() for grad in grads]).norm())
            shares.append((norms[0] / (norms[0] + norms[1])).item())

    monitor = TemperatureMonitor("step", gradient_share_every_n_steps=4)
    rows = fit(make_trainer, make_module(temperature=4.0), tmp_path, monitor, Compare())
    logged = column(rows, "kd_gradient_share")
    assert logged == pytest.approx({3: shares[3], 7: shares[7]}, rel=1e-5)
    assert all(0 < share < 1 for share in logged.values())


def test_gradient_share_leaves_training_as_it_is(make_module: Make, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def run(*callbacks: Callback) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        module = make_module(student=nn.Sequential(make_network(), nn.Dropout(0.2)))
        torch.manual_seed(2)
        make_trainer(logger=CSVLogger(tmp_path), callbacks=list(callbacks)).fit(
            module, make_loader(80), make_loader(16)
        )
        return module.state_dict()

    plain, watched = run(), run(TemperatureMonitor("step", gradient_share_every_n_steps=1))
    for name in plain:  # up to rounding: a loss that is differentiated twice takes its readable form the second time
        torch.testing.assert_close(plain[name], watched[name], rtol=1e-4, atol=1e-6)


def test_gradient_share_of_a_single_term(make_module: Make) -> None:
    module = make_module(kd_weight=1.0, task_weight=0.0)
    inputs, _ = make_data(16).tensors
    parameters = list(module.student.parameters())
    alone = module.distiller(inputs, module(inputs))
    assert gradient_share(alone, parameters) == 1
    module.distiller.kd_enabled = False
    assert gradient_share(module.distiller(inputs, module(inputs)), parameters).isnan()


# ---- histogram, plot, what it refuses -------------------------------------------------------------------------------


class Histograms(CSVLogger):
    """The part of TensorBoard's logger that is used."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.drawn: list[tuple[str, tuple[int, ...], int]] = []

    @property
    def experiment(self) -> Any:
        experiment = super().experiment
        experiment.add_histogram = lambda name, values, global_step: self.drawn.append(
            (name, tuple(values.shape), global_step)
        )
        return experiment


def test_histogram(make_module: Make, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    logger = Histograms(tmp_path)
    trainer = make_trainer(max_epochs=1, logger=logger, callbacks=[TemperatureMonitor("epoch", histogram=True)])
    trainer.fit(make_module(temperature=PerSample()), make_loader(), make_loader(16))
    assert logger.drawn == [(f"temperature_{side}_histogram", (16,), 3) for side in ("student", "teacher")]
    with pytest.warns(UserWarning, match="no logger here draws histograms"):
        fit(make_trainer, make_module(), tmp_path, TemperatureMonitor(histogram=True), max_epochs=1)


def test_the_plot_of_a_resumed_run_is_whole(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Real digits, whose accuracy falls, so that the temperature moves."""

    def run(epochs: int, **options: Any) -> TemperatureMonitor:
        module, data = digits(lr=3e-3, maximize=True)
        monitor = TemperatureMonitor("epoch", plot=True)
        trainer = make_trainer(max_epochs=epochs, callbacks=[AdaptiveTemperature(), monitor])
        trainer.fit(module, datamodule=data, **options)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return monitor

    run(1)
    (tmp_path / "temperature.png").unlink()
    monitor = run(3, ckpt_path=tmp_path / "1.ckpt")
    assert [row[:2] for row in monitor.history] == [[5, 4], [10, 4], [15, 5]]
    state = torch.load(tmp_path / "3.ckpt", weights_only=True)["callbacks"]
    adaptive = AdaptiveTemperature()
    adaptive.load_state_dict(state[adaptive.state_key])
    assert (adaptive.moves[0][0], adaptive.moves[0][1]) == (10, 1.25)
    assert adaptive.moves[0][2].endswith("temperature ÷ 0.8 → 5")
    assert [row[0] for row in monitor.metric_history] == [5, 10, 15]
    assert monitor.metric_history[0][1] > monitor.metric_history[1][1]
    assert (tmp_path / "temperature.png").stat().st_size > 10_000


def test_moves_are_drawn_with_their_reasons(
    make_module: Make, make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[dict[str, Any]] = []
    draw = kd_lightning.plotting.plot_temperature_history

    def recorded(*args: Any, **kwargs: Any) -> Any:
        drawn.append(kwargs)
        return draw(*args, **kwargs)

    monkeypatch.setattr(kd_lightning.plotting, "plot_temperature_history", recorded)
    adaptive = AdaptiveTemperature("scripted", factor=0.5, patience=1)
    script, monitor = Script([0.9, 0.9, 0.8], 5), TemperatureMonitor(plot=True)
    fit(make_trainer, make_module(temperature=4.0), tmp_path, script, adaptive, monitor, max_epochs=3)
    assert [call["moves"] for call in drawn] == [
        [
            (10, 0.5, "scripted 0.9 not above 0.9 for 1 check: temperature × 0.5 → 2"),
            (15, 2.0, "scripted 0.8 below 0.9 − 0.018 for 1 check: temperature ÷ 0.5 → 4"),
        ]
    ]


def test_what_it_refuses(make_module: Make, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="logging_interval must be 'step', 'epoch' or None, got 'batch'"):
        TemperatureMonitor("batch")  # pyright: ignore
    with pytest.raises(ValueError, match="gradient_share_every_n_steps must be 1 or more"):
        TemperatureMonitor(gradient_share_every_n_steps=0)
    with pytest.raises(MisconfigurationException, match="nowhere to log to: the Trainer has no logger"):
        make_trainer(callbacks=[TemperatureMonitor()]).fit(make_module(), make_loader())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError):
        make_trainer(callbacks=[TemperatureMonitor(plot=True)]).fit(make_module(), make_loader())


def test_two_processes(make_module: Make, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    monitor = TemperatureMonitor("step", gradient_share_every_n_steps=1, plot=True)
    fit(make_trainer, make_module(temperature=PerSample()), tmp_path, monitor, devices=2, strategy="ddp_fork")
    assert (tmp_path / "lightning_logs" / "run" / "temperature.png").stat().st_size > 10_000
