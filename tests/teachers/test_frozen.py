from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from kd_lightning import FrozenTeacher
from kd_lightning.models import DigitsCNN
from tests.teachers.helpers import assert_same_state, network, state


def test_no_gradient_reaches_teacher_or_its_inputs(teacher: nn.Module) -> None:
    frozen = FrozenTeacher(teacher)
    inputs = torch.randn(4, 8, requires_grad=True)
    logits = frozen(inputs)
    assert not logits.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    (logits * torch.ones(1, requires_grad=True)).sum().backward()  # inference tensors would fail here
    assert inputs.grad is None


@pytest.mark.parametrize("sabotage", [lambda m: m.train(), lambda m: m[1].train()])
def test_stays_in_eval_whoever_calls_train(teacher: nn.Module, sabotage: Callable[[nn.Module], object]) -> None:
    frozen, before = FrozenTeacher(teacher), state(teacher)
    expected = frozen(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    sabotage(teacher)
    assert torch.equal(frozen(torch.randn(4, 8, generator=torch.Generator().manual_seed(0))), expected)
    assert_same_state(teacher, before)


def test_untrained_teacher_warns() -> None:
    for untrained in (network(), nn.Linear(4, 3), DigitsCNN(), nn.TransformerEncoderLayer(8, 2)):
        with pytest.warns(UserWarning, match="weights of its initialisation"):
            FrozenTeacher(untrained)


def test_trained_teacher_does_not_warn(teacher: nn.Module) -> None:
    without_norm = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(without_norm.parameters(), lr=0.5)
    for _ in range(20):
        nn.functional.cross_entropy(without_norm(torch.eye(4)), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FrozenTeacher(teacher)
        FrozenTeacher(without_norm)
        FrozenTeacher(network(), checkpoint="later.pt")  # its weights are yet to come


def test_deepcopy_shares_and_pickle_carries_the_weights(teacher: nn.Module) -> None:
    frozen = FrozenTeacher(teacher)
    assert copy.deepcopy(frozen) is frozen
    assert pickle.loads(pickle.dumps(frozen)).fingerprint() == frozen.fingerprint()


@pytest.mark.parametrize("wrong", [nn.Linear, "resnet18", None])
def test_not_a_module(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        FrozenTeacher(wrong)  # pyright: ignore[reportArgumentType]


def test_fingerprint_does_not_depend_on_later_casts(teacher: nn.Module) -> None:
    frozen = FrozenTeacher(teacher)
    before = frozen.fingerprint()
    assert frozen.to(torch.bfloat16).fingerprint() == before


def test_the_file_is_read_on_first_use_only(tmp_path: Path) -> None:
    frozen = FrozenTeacher(network(), checkpoint=tmp_path / "absent.pt")
    assert not frozen.available()
    with pytest.raises(FileNotFoundError, match="no teacher checkpoint at"):
        frozen(torch.ones(1, 4))
