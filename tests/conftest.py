"""Settings and the small, real problem that most tests share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule
from kd_lightning.temperature import Signals, Temperature, TemperaturePolicy

torch.set_num_threads(1)  # forked processes hang where the parent has used OpenMP threads; and CI has two cores

collect_ignore_glob = ["integration/examples/[!t]*.py"]  # test_examples.py beside them runs them

NUM_CLASSES, NUM_FEATURES = 6, 8


def pytest_collectstart() -> None:
    """Networks made while a test module is imported are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # of an earlier test: Lightning reseeds its processes with it


class LearnedTemperature(TemperaturePolicy):
    """A minimal policy with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(1))

    def compute(self, signals: Signals) -> Temperature:
        t = 1 + 8 * torch.sigmoid(self.raw)
        return Temperature(t, t)


def make_network(hidden: int = 16, norm: bool = True, num_classes: int = NUM_CLASSES) -> nn.Sequential:
    """A small network; batch norm is what stock callbacks damage in a registered teacher."""
    layers = [nn.Linear(NUM_FEATURES, hidden), *([nn.BatchNorm1d(hidden)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, num_classes))


def make_data(count: int = 64, seed: int = 0) -> TensorDataset:
    """Gaussian classes that overlap a little."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(NUM_CLASSES, NUM_FEATURES, generator=torch.Generator().manual_seed(99)) * 1.5
    targets = torch.arange(count) % NUM_CLASSES
    return TensorDataset(centres[targets] + torch.randn(count, NUM_FEATURES, generator=generator), targets)


def make_loader(count: int = 64, batch_size: int = 16, seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(make_data(count, seed), batch_size=batch_size)


@pytest.fixture(scope="session")
def _trained() -> nn.Module:
    torch.manual_seed(1)
    network = make_network(32)
    inputs, targets = make_data(512, seed=5).tensors
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), targets).backward()
        optimizer.step()
    return network


@pytest.fixture
def teacher(_trained: nn.Module) -> nn.Module:
    """A trained network, a fresh copy for each test."""
    return copy.deepcopy(_trained)


@pytest.fixture
def make_module(teacher: nn.Module) -> Callable[..., DistillationModule]:
    """Make a DistillationModule over the trained teacher; keywords as its own."""

    def make(student: nn.Module | None = None, **options: Any) -> DistillationModule:
        torch.manual_seed(2)
        options.setdefault("optimizer", lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9))
        options.setdefault("teacher", teacher)
        return DistillationModule(student=make_network() if student is None else student, **options)

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """Make a quiet Trainer on the CPU that writes under tmp_path; keywords as its own."""

    def make(**options: Any) -> Trainer:
        quiet: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return Trainer(**(quiet | options))

    return make
