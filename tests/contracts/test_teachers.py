"""Properties of every exported teacher: a class of ``kd_lightning.teachers`` without a case here fails."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_lightning import DistillationModule, Distiller, FrozenTeacher, TeacherEnsemble, teachers
from kd_lightning.callbacks import DistillationCallback
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
from tests.helpers import NUM_CLASSES, NUM_FEATURES, in_a_fork, make_data, make_loader, make_network

NO_TEACHERS = {"Teacher", "GivenLogits"}  # the protocol, and the stand-in of a Distiller without a teacher
OF_TOKENS = {"ServedTeacher"}  # needs a server, and gives Sparse targets: tests/unit/teachers/test_served.py


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
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX files of both seeds, exported once: an export takes seconds."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("exported")
    in_a_fork(lambda: [onnx(seed, folder) for seed in (0, 1)])
    return folder


@pytest.fixture
def folder(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("exported") if name in FORKED else tmp_path


INPUTS = torch.randn(5, NUM_FEATURES, generator=torch.Generator().manual_seed(7))


def inputs_of(teacher: Teacher, inputs: Tensor) -> Any:
    """What the teacher is called with: the inputs, or a batch that has what it reads."""
    if not teacher.reads_batch:
        return inputs
    key: str = vars(teacher)["key"]
    return {"input": inputs, key: torch.arange(len(inputs)) if key == "id" else Scores(int(key[-1]))(inputs)}


def loader_of(teacher: Teacher) -> DataLoader[Any]:
    x, targets = make_data().tensors
    if not teacher.reads_batch:
        return make_loader()
    batch = inputs_of(teacher, x) | {"labels": targets}
    return DataLoader([{key: value[row] for key, value in batch.items()} for row in range(len(x))], 16)  # pyright: ignore


def of(teacher: Teacher, inputs: Tensor = INPUTS) -> list[Tensor]:
    return list(teacher.members(teacher.logits(inputs_of(teacher, inputs))))


def test_every_exported_teacher_has_a_case() -> None:
    exported = (getattr(teachers, name) for name in teachers.__all__)
    found = {value.__name__ for value in exported if isinstance(value, type) and issubclass(value, Teacher)}
    assert set(BUILD) == found - NO_TEACHERS - OF_TOKENS


@each
def test_logits_are_finite_and_have_no_gradient(name: str, folder: Path) -> None:
    for logits in of(BUILD[name](0, folder), INPUTS.clone().requires_grad_()):
        assert logits.shape == (5, NUM_CLASSES)
        assert logits.isfinite().all()
        assert not logits.requires_grad
        assert not logits.is_inference()  # else a learnable temperature could not save it for its backward


@each
def test_the_fingerprint_tells_teachers_apart(name: str, folder: Path) -> None:
    teacher, twin, other = (BUILD[name](seed, folder) for seed in (0, 0, 1))
    of(teacher)
    assert teacher.fingerprint() == twin.fingerprint() == teacher.fingerprint()
    assert teacher.fingerprint() != other.fingerprint()


@each
def test_moves_and_casts_with_the_distiller(name: str, folder: Path) -> None:
    teacher = BUILD[name](0, folder)
    expected = of(teacher)
    Distiller(teacher).double().to("cpu")
    assert {parameter.dtype for parameter in teacher.parameters()} <= {torch.float64}
    for logits, value in zip(of(teacher, INPUTS.double()), expected, strict=True):
        torch.testing.assert_close(logits.float(), value, rtol=1e-4, atol=1e-5)


@each
def test_copies(name: str, folder: Path) -> None:
    teacher = BUILD[name](0, folder)
    expected = of(teacher)
    for twin in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert twin.fingerprint() == teacher.fingerprint()
        for logits, value in zip(of(twin), expected, strict=True):
            assert torch.equal(logits, value)
        assert repr(twin) == repr(teacher)


class Plain(LightningModule):
    """The user's own module, which the callback distils."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, targets = (batch["input"], batch["labels"]) if isinstance(batch, dict) else batch
        return nn.functional.cross_entropy(self(x), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@each
def test_serves_distiller_module_and_callback(name: str, folder: Path, make_trainer: Callable[..., Trainer]) -> None:
    teacher = BUILD[name](0, folder)
    distiller = Distiller(teacher, task_weight=0.0)
    student = torch.zeros(5, NUM_CLASSES, requires_grad=True)
    distiller(inputs_of(teacher, INPUTS), student).loss.backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0

    module = DistillationModule(student=make_network(), teacher=teacher)
    make_trainer(max_epochs=1).fit(module, loader_of(teacher))
    callback = DistillationCallback(teacher=teacher)
    plain = Plain()
    make_trainer(max_epochs=1, callbacks=[callback]).fit(plain, loader_of(teacher))

    secret = {id(parameter) for parameter in teacher.parameters()}
    for holder in (distiller, module, plain):
        assert not secret & {id(parameter) for parameter in holder.parameters()}
        assert not any("teacher" in key for key in holder.state_dict())
    if teacher.state_dict():
        return  # it follows the student, and is in checkpoints
    before = of(BUILD[name](0, folder))
    for logits, value in zip(of(teacher), before, strict=True):  # training has changed nothing
        torch.testing.assert_close(logits, value, rtol=0, atol=0)
