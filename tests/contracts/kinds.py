"""One of each kind of teacher, with its inputs and data, for the tests of teachers in this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_lightning import FrozenTeacher, TeacherEnsemble
from kd_lightning.export import export_student
from kd_lightning.teachers import (
    BatchTeacher,
    EMATeacher,
    FunctionTeacher,
    LogitsFile,
    MappedClasses,
    OnnxTeacher,
    Teacher,
)
from tests.helpers import NUM_CLASSES, NUM_FEATURES, make_data, make_network


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = make_network(norm=False)
    for parameter in net.parameters():
        parameter.data *= 3.0  # stands for training
    return net


class Scores:
    """A function with weights that pickles."""

    def __init__(self, seed: int) -> None:
        self.weight = torch.randn(NUM_FEATURES, NUM_CLASSES, generator=torch.Generator().manual_seed(seed))

    def __call__(self, inputs: Tensor) -> Tensor:
        return inputs.float() @ self.weight


def onnx(seed: int, folder: Path) -> Teacher:
    path = folder / f"teacher-{seed}.onnx"
    if not path.exists():
        export_student(network(seed).eval(), path, "onnx", torch.randn(4, NUM_FEATURES))
    return OnnxTeacher(path)


def ema(seed: int, folder: Path) -> Teacher:
    teacher = EMATeacher(decay=0.9 + seed / 100)
    teacher.follow(network(seed))
    return teacher


def logits_file(seed: int, folder: Path) -> Teacher:
    path = folder / f"logits-{seed}.npy"
    np.save(path, Scores(seed)(make_data().tensors[0]).numpy())
    return LogitsFile(path)


BUILD: dict[str, Callable[[int, Path], Teacher]] = {
    "BatchTeacher": lambda seed, folder: BatchTeacher(f"logits{seed}"),
    "EMATeacher": ema,
    "FrozenTeacher": lambda seed, folder: FrozenTeacher(network(seed)),
    "FunctionTeacher": lambda seed, folder: FunctionTeacher(Scores(seed), name=f"scores {seed}"),
    "LogitsFile": logits_file,
    "MappedClasses": lambda seed, folder: MappedClasses(FrozenTeacher(network(seed)), [5, 4, 3, 2, 1, 0]),
    "OnnxTeacher": onnx,
    "TeacherEnsemble": lambda seed, folder: TeacherEnsemble([network(seed), network(seed + 10)]),
}
FORKED = {"OnnxTeacher"}  # it exports
each = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.forked] if name in FORKED else []) for name in BUILD]
)


INPUTS = torch.randn(5, NUM_FEATURES, generator=torch.Generator().manual_seed(7))


def inputs_of(teacher: Teacher, inputs: Tensor = INPUTS) -> Any:
    """Return the teacher's argument: the inputs, or a batch that has the part that it reads."""
    if not teacher.reads_batch:
        return inputs
    key: str = vars(teacher)["key"]
    return {"input": inputs, key: torch.arange(len(inputs)) if key == "id" else Scores(int(key[-1]))(inputs)}


def data_of(teacher: Teacher, count: int = 64, seed: int = 0) -> Any:
    """A dataset whose batches have what the teacher reads."""
    data = make_data(count, seed)
    if not teacher.reads_batch:
        return data
    x, targets = data.tensors
    batch = inputs_of(teacher, x) | {"labels": targets}
    return [{key: value[row] for key, value in batch.items()} for row in range(count)]


def loader_of(teacher: Teacher) -> DataLoader[Any]:
    return DataLoader(data_of(teacher), batch_size=16)


def of(teacher: Teacher, inputs: Tensor = INPUTS) -> list[Tensor]:
    return list(teacher.members(teacher.logits(inputs_of(teacher, inputs))))


class Plain(LightningModule):
    """The user's own module, which the callback distils."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.net = make_network(norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, targets = (batch["input"], batch["labels"]) if isinstance(batch, dict) else batch
        return nn.functional.cross_entropy(self(x), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)
