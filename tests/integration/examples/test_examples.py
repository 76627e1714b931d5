"""The examples run, and the students in them learn."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Trainer
from torch.nn import functional as F

from kd_lightning.callbacks import AdaptiveTemperature, TemperatureMonitor
from kd_lightning.datamodules import DigitsDataModule
from kd_lightning.functional import kd_loss
from kd_lightning.models import DigitsCNN
from kd_lightning.teachers.weights import load_weights

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parent / f"{name}.py"))


def accuracy(student: torch.nn.Module) -> float:
    data = DigitsDataModule(batch_size=1000)
    data.setup("validate")
    images, targets = next(iter(data.val_dataloader()))
    with torch.no_grad():
        return (student.eval()(images).argmax(1) == targets).float().mean().item()


def original_teacher() -> dict[str, torch.Tensor]:
    network = DigitsCNN()
    load_weights(network, ROOT / "configs" / "digits_teacher.safetensors")
    return network.state_dict()


def assert_untouched(teacher: Any) -> None:
    for name, value in original_teacher().items():
        assert torch.equal(teacher.module.state_dict()[name], value), name


def test_bare_loop() -> None:
    ran = example("bare_loop")
    assert accuracy(ran["student"]) > 0.7
    assert_untouched(ran["teacher"])
    assert ran["out"].temperature.student.item() != 8.0
    assert not any("teacher" in name for name in ran["checkpoint"]["distiller"])
    DigitsCNN(channels=(4, 8), hidden=16).load_state_dict(ran["checkpoint"]["student"])


def test_fabric_equals_a_loop_without_it() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    student, losses = example("fabric")["train"](fabric)
    assert accuracy(student) > 0.7

    weights = original_teacher()
    torch.manual_seed(0)
    data = DigitsDataModule(batch_size=16, train_fraction=0.2, in_memory=True)
    data.setup("fit")
    loader = data.train_dataloader()
    same, teacher = DigitsCNN(channels=(4, 8), hidden=16), DigitsCNN().eval()
    teacher.load_state_dict(weights)
    optimizer, step = torch.optim.AdamW(same.parameters(), lr=0.01), 0
    for _ in range(3):
        for images, targets in loader:
            t = 5 + 3 * torch.tensor(torch.pi * step / (3 * len(loader))).cos().item()
            logits = same(images)
            loss = 0.9 * kd_loss(logits, teacher(images).detach(), t) + 0.1 * F.cross_entropy(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert loss.item() == pytest.approx(losses[step], rel=1e-4)
            step += 1
    for name, value in same.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def _on_each_rank(fabric: Fabric, train: Callable[..., Any], folder: Path) -> None:
    torch.save(train(fabric, epochs=1)[0].state_dict(), folder / f"{fabric.global_rank}.pt")


def test_fabric_on_two_processes(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork", precision="bf16-mixed")
    fabric.launch(_on_each_rank, example("fabric")["train"], tmp_path)  # pyright: ignore[reportArgumentType]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, _ in DigitsCNN(channels=(4, 8), hidden=16).named_parameters():
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("name", ["Classifier", "ManualClassifier"])
def test_own_training_step(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = example("own_training_step")[name]()
    data = DigitsDataModule(batch_size=16, train_fraction=0.2, in_memory=True)
    callbacks = [AdaptiveTemperature(patience=1, factor=0.5, min_delta=1.0), TemperatureMonitor(plot=True)]
    trainer = Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, data)
    assert trainer.callback_metrics["val_acc"] > 0.7
    assert module.distiller.temperature.multiplier.item() < 1  # no check beats the best by 1: a plateau
    assert (tmp_path / "temperature.png").is_file()
    assert_untouched(module.distiller.teacher)
    assert not any("teacher" in key for key in module.state_dict())
