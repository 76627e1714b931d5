"""Properties of every exported teacher: a class of ``kd_lightning.teachers`` without a case here fails."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from kd_lightning import DistillationModule, Distiller, teachers
from kd_lightning.callbacks import DistillationCallback
from kd_lightning.teachers import Teacher
from tests.contracts.kinds import BUILD, INPUTS, Plain, each, inputs_of, loader_of, of
from tests.helpers import NUM_CLASSES, make_network

NO_TEACHERS = {"Teacher", "GivenLogits"}  # the protocol, and the stand-in of a Distiller without a teacher
OF_TOKENS = {"ServedTeacher"}  # needs a server, and gives Sparse targets: tests/unit/teachers/test_served.py
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


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
