"""Settings and the small, real problem that most tests share."""

from __future__ import annotations

import copy
import gc
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

# torch and Lightning are imported in functions, because pytest-xdist's controller loads this file and runs no test
if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import nn

    from kd_lightning import DistillationModule

# the dozens of processes that tests start take eight seconds less each where what they import is compiled already
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

hypothesis.settings.register_profile("suite", derandomize=True)  # the same examples in every run of the suite
hypothesis.settings.load_profile("suite")

collect_ignore_glob = ["integration/examples/[!t]*.py"]  # test_examples.py beside them runs them


def pytest_collection_finish() -> None:
    """Leave what was imported out of each collection of garbage, which takes half a second with it."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else triton reports leaked types when Python ends


def pytest_collectstart() -> None:
    """Networks made while a test module is imported are the same in every run."""
    import torch

    torch.set_num_threads(1)  # forked processes hang where the parent has used OpenMP threads; and CI has two cores
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that run a Trainer, whole runs, and tests in a process of their own are slow."""
    for item in items:
        trains = "make_trainer" in getattr(item, "fixturenames", ())
        if trains or "integration" in item.path.parts or item.get_closest_marker("forked"):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is marked ``forked`` in a process of its own."""
    if pyfuncitem.get_closest_marker("forked") is None:
        return None
    from tests.helpers import in_a_fork

    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    in_a_fork(lambda: pyfuncitem.obj(**arguments))
    return True


@pytest.fixture(autouse=True)
def _no_onnx_export_here() -> Iterator[None]:
    """After an ONNX export and a backward, torch refuses to train in a fork of the process, as tests of ranks do."""
    exporter = "torch.onnx._internal.exporter._core"
    before = exporter in sys.modules
    yield
    assert before or exporter not in sys.modules, "mark the test as forked, or export in_a_fork"


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    torch.manual_seed(0)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # of an earlier test: Lightning reseeds its processes with it


@pytest.fixture(scope="session")
def _trained() -> nn.Module:
    import torch
    from torch import nn

    from tests.helpers import make_data, make_network

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
    import torch

    from kd_lightning import DistillationModule
    from tests.helpers import make_network

    def make(student: nn.Module | None = None, **options: Any) -> DistillationModule:
        torch.manual_seed(2)
        options.setdefault("optimizer", lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9))
        options.setdefault("teacher", teacher)
        return DistillationModule(student=make_network() if student is None else student, **options)

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    """Make a quiet Trainer on the CPU that writes under tmp_path; keywords as its own."""
    from lightning.pytorch import Trainer

    from tests.helpers import safe_to_fork

    forks = ExitStack()

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
        if str(options.get("strategy")).endswith("fork"):
            forks.enter_context(safe_to_fork())
        return Trainer(**(quiet | options))

    with forks:
        yield make
