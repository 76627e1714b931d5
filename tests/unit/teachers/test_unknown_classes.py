"""Classes that a teacher does not know, in other orders and layouts, alone and in an ensemble."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from kd_lightning import DistillationModule, Distiller, FrozenTeacher, TeacherEnsemble
from kd_lightning.functional import Temperature, kd_loss
from kd_lightning.losses import DKDLoss, JSDLoss, KDLoss, MSELogitsLoss, NKDLoss, ReverseKDLoss
from kd_lightning.teachers import FunctionTeacher, MappedClasses
from kd_lightning.temperature import LogitStandardization, MaxLogitTemperature
from tests.helpers import LearnedTemperature, make_loader, make_network

PICKS = [3, None, 5, 0, None]
KNOWN = [0, 2, 3]


def identity(x: Tensor) -> Tensor:
    return x


def taught(logits: Tensor, classes: Any) -> MappedClasses:
    return MappedClasses(FunctionTeacher(lambda inputs: logits, name=str(id(logits))), classes)


def double(*shape: int) -> Tensor:
    return 2 * torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("t", [1.0, 4.0])
def test_both_softmaxes_are_over_the_known_classes(t: float) -> None:
    logits, student, targets = double(6, 8), double(6, 5).requires_grad_(), torch.tensor([0, 1, 2, 3, 4, 0])
    distiller = Distiller(taught(logits, PICKS), t, kd_weight=1.0, task_weight=0.5)
    out = distiller(logits, student, targets)
    (of_kd,) = torch.autograd.grad(out.kd_loss, student, retain_graph=True)
    (of_task,) = torch.autograd.grad(out.task_loss, student)
    p, q = (logits[:, [3, 5, 0]] / t).softmax(1), (student.detach()[:, KNOWN] / t).softmax(1)
    torch.testing.assert_close(out.kd_loss, t**2 * (p * (p.log() - q.log())).sum(1).mean())
    expected = torch.zeros(6, 5, dtype=torch.float64)
    expected[:, KNOWN] = t * (q - p) / 6
    torch.testing.assert_close(of_kd, expected)
    one_hot = torch.eye(5, dtype=torch.float64)[targets]
    torch.testing.assert_close(of_task, (student.detach().softmax(1) - one_hot) / 6)  # the task sees all classes


LOSSES = [KDLoss(), ReverseKDLoss(), JSDLoss(), MSELogitsLoss(), DKDLoss(), NKDLoss()]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("temperature", [2.0, MaxLogitTemperature(2.0), LogitStandardization()], ids=repr)
def test_as_if_the_student_had_the_known_classes_only(loss: nn.Module, temperature: Any) -> None:
    """This holds for every loss, and for every policy that reads either side."""
    logits, student = double(6, 8), double(6, 5)
    targets = torch.tensor([0, 2, 3, 3, 2, 0])
    whole, part = student.clone().requires_grad_(), student[:, KNOWN].clone().requires_grad_()
    options: Any = {"temperature": temperature, "kd_loss": loss, "task_weight": 0.0}
    out = Distiller(taught(logits, PICKS), **options)(logits, whole, targets)
    numbers = torch.tensor([0, -1, 1, 2])[targets]
    alone = Distiller(None, **options)(None, part, numbers, teacher_logits=logits[:, [3, 5, 0]])
    torch.testing.assert_close(out.kd_loss, alone.kd_loss)
    (of_whole,), (of_part,) = torch.autograd.grad(out.kd_loss, whole), torch.autograd.grad(alone.kd_loss, part)
    torch.testing.assert_close(of_whole[:, KNOWN], of_part)
    assert of_whole[:, [1, 4]].eq(0).all()


def test_merged_classes_and_unknown_ones_with_a_learned_temperature() -> None:
    logits, student = double(6, 8), double(6, 4)
    policy = LearnedTemperature()
    classes = [[3, 4], None, [0, 1, 2], 7]
    Distiller(taught(logits, classes), policy, kd_weight=1.0, task_weight=0.0)(logits, student).loss.backward()
    raw = torch.zeros(1, requires_grad=True)
    t = 1 + 8 * torch.sigmoid(raw)
    named = (logits[:, [3, 4, 0, 1, 2, 7]] / t).softmax(1)
    p = torch.stack([named[:, :2].sum(1), named[:, 2:5].sum(1), named[:, 5]], 1)
    (t**2 * (p * (p.log() - (student[:, [0, 2, 3]] / t).log_softmax(1))).sum(1).mean()).backward()
    torch.testing.assert_close(policy.raw.grad, raw.grad)


def test_tokens_of_a_vocabulary_in_another_order() -> None:
    """A wider vocabulary is not cut as padding, and a token that the teacher lacks carries nothing."""
    logits, student = double(2, 7, 9), double(2, 7, 5).requires_grad_()
    targets = torch.randint(5, (2, 7))
    targets[1, 4:] = -100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = Distiller(taught(logits, PICKS), 2.0, task_weight=0.0)(logits, student, targets)
    keep = targets >= 0
    expected = kd_loss(student[keep][:, KNOWN], logits[keep][:, [3, 5, 0]], 2.0)
    torch.testing.assert_close(out.kd_loss, expected)
    merged = Distiller(taught(logits, [[3, 8], 5, [0, 1, 2], 6, 7]), 2.0, task_weight=0.0)(logits, student, targets)
    p = (logits[keep] / 2.0)[:, [3, 8, 5, 0, 1, 2, 6, 7]].softmax(-1)
    p = torch.stack([p[:, :2].sum(1), p[:, 2], p[:, 3:6].sum(1), p[:, 6], p[:, 7]], 1)
    q = (student[keep] / 2.0).log_softmax(-1)
    torch.testing.assert_close(merged.kd_loss, 4.0 * (p * (p.log() - q)).sum(1).mean())


def test_pixels() -> None:
    logits, student = double(2, 8, 3, 4), double(2, 5, 3, 4)
    out = Distiller(taught(logits, PICKS), 2.0, KDLoss(class_dim=1), task_weight=0.0)(logits, student)
    one, two = (z.movedim(1, -1).flatten(0, -2) for z in (student[:, KNOWN], logits[:, [3, 5, 0]]))
    torch.testing.assert_close(out.kd_loss, kd_loss(one, two, 2.0))
    assert out.teacher_logits.shape == student.shape


def test_names_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"teacher": ["cat", "dog"], "student": {"dog": "dog", "fish": None, "cat": ["cat"]}}))
    assert MappedClasses(FunctionTeacher(identity), path).groups == [[1], [], [0]]


# ---- ensembles ------------------------------------------------------------------------------------------------------


def test_members_merge_at_their_own_temperatures() -> None:
    """p̄ = Σ w_k p_k, each p_k summed over its groups at its own T."""
    one, two, student = double(6, 8), double(6, 3), double(6, 3).requires_grad_()
    teacher = TeacherEnsemble(
        [taught(one, [[3, 4], [0, 1], [7]]), taught(two, [2, 0, 1])], temperatures=[2.0, 5.0], weights=[0.25, 0.75]
    )
    out = Distiller(teacher, 3.0, kd_weight=1.0, task_weight=0.0)(one, student)
    (gradient,) = torch.autograd.grad(out.loss, student)
    named = (one[:, [3, 4, 0, 1, 7]] / 2.0).softmax(1)
    first = torch.stack([named[:, :2].sum(1), named[:, 2:4].sum(1), named[:, 4]], 1)
    mixture = 0.25 * first + 0.75 * (two[:, [2, 0, 1]] / 5.0).softmax(1)
    q = (student.detach() / 3.0).softmax(1)
    scale = 3.0 * (0.25 * 2.0 + 0.75 * 5.0)
    torch.testing.assert_close(out.loss, scale * (mixture * (mixture.log() - q.log())).sum(1).mean())
    torch.testing.assert_close(gradient, scale / 3.0 * (q - mixture) / 6)


def test_members_of_different_classes_teach_those_that_they_know() -> None:
    """Two teachers whose classes overlap in one, and a student of all of them."""
    one, two, student = double(6, 4), double(6, 3), double(6, 5).requires_grad_()
    teacher = TeacherEnsemble(
        [taught(one, [[0, 1], 2, 3, None, None]), taught(two, [None, None, 0, 1, 2])],
        weights=[0.25, 0.75],
        combine="losses",
    )
    out = Distiller(teacher, 2.0, kd_weight=1.0, task_weight=0.0)(one, student)
    (gradient,) = torch.autograd.grad(out.loss, student)
    named = (one / 2.0).softmax(1)
    first = torch.stack([named[:, :2].sum(1), named[:, 2], named[:, 3]], 1)
    expected, value = torch.zeros(6, 5, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for weight, p, classes in ((0.25, first, [0, 1, 2]), (0.75, (two / 2.0).softmax(1), [2, 3, 4])):
        q = (student.detach()[:, classes] / 2.0).softmax(1)
        value += weight * 4.0 * (p * (p.log() - q.log())).sum(1).mean()
        expected[:, classes] += weight * 2.0 * (q - p) / 6
    torch.testing.assert_close(out.loss, value)
    torch.testing.assert_close(gradient, expected)
    assert out.teacher_logits.isfinite().all()


def test_routing_by_class_over_teachers_of_disjoint_classes() -> None:
    """Each row has the loss of the teacher that knows its label; the other's share of it is nothing, not NaN."""
    one, two, student = double(4, 2), double(4, 2), double(4, 4).requires_grad_()
    targets = torch.tensor([0, 1, 2, 3])
    teacher = TeacherEnsemble(
        [taught(one, [0, 1, None, None]), taught(two, [None, None, 1, 0])],
        temperatures=[LearnedTemperature(), MaxLogitTemperature(2.0)],
        combine="losses",
        routing=[[0, 1], [2, 3]],
    )
    distiller = Distiller(teacher, 2.0, kd_weight=1.0, task_weight=0.0)
    out = distiller(one, student, targets)
    (gradient,) = torch.autograd.grad(out.loss, student, retain_graph=True)
    out.loss.backward()
    first = kd_loss(student[:2, :2], one[:2], Temperature(torch.tensor(2.0), torch.tensor(5.0)), reduction="sum") / 4
    (expected,) = torch.autograd.grad(first, student)
    torch.testing.assert_close(gradient[:2], expected[:2])
    assert gradient.isfinite().all()
    assert gradient[2:, :2].eq(0).all()
    assert gradient[2:, 2:].ne(0).all()
    assert all(parameter.grad.isfinite().all() for parameter in distiller.parameters())  # pyright: ignore


def test_members_of_the_same_known_classes_mix() -> None:
    one, two, student = double(6, 8), double(6, 8), double(6, 5)
    for combine in ("probs", "logits"):
        teacher = TeacherEnsemble([taught(one, PICKS), taught(two, PICKS)], combine=combine)
        out = Distiller(teacher, 2.0, task_weight=0.0)(one, student)
        narrow = TeacherEnsemble([taught(z, [3, 5, 0]) for z in (one, two)], combine=combine)
        alone = Distiller(narrow, 2.0, task_weight=0.0)(one, student[:, KNOWN])
        torch.testing.assert_close(out.kd_loss, alone.kd_loss)


# ---- in a module ----------------------------------------------------------------------------------------------------


@pytest.fixture
def narrow(teacher: nn.Module) -> nn.Module:
    """The trained teacher without two of its six classes, the others in another order."""
    head: Any = teacher[-1]  # pyright: ignore[reportIndexIssue]
    cut = nn.Linear(head.in_features, 4)
    cut.weight.data, cut.bias.data = head.weight.data[[4, 0, 2, 5]], head.bias.data[[4, 0, 2, 5]]
    return nn.Sequential(*list(teacher.children())[:-1], cut)


CLASSES = [1, None, 2, None, 0, 3]


def test_in_a_module_with_metrics_and_resume(
    narrow: nn.Module,
    make_module: Callable[..., DistillationModule],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    def module() -> DistillationModule:
        return make_module(teacher=MappedClasses(copy.deepcopy(narrow), CLASSES), temperature=3.0)

    whole = module()
    trainer = make_trainer(max_epochs=2)
    trainer.fit(whole, make_loader(), make_loader(32, seed=1))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert metrics["val_teacher_acc"] < 0.75  # two of six classes are never its choice

    half = module()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(half, make_loader(), make_loader(32, seed=1))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = module()
    make_trainer(max_epochs=2).fit(
        resumed, make_loader(), make_loader(32, seed=1), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    other = make_module(teacher=MappedClasses(copy.deepcopy(narrow), [*CLASSES[1:], 1]), temperature=3.0)
    with pytest.raises(RuntimeError, match="teacher"):
        make_trainer().fit(other, make_loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)


def test_a_consensus_to_draw(narrow: nn.Module) -> None:
    """plot-temperature asks for a consensus without a student."""
    inputs = torch.randn(3, 8)
    merges = MappedClasses(narrow, [[0, 1], None, [2], None, None, [3]])
    distiller = Distiller(merges, task_weight=0.0)
    consensus = distiller.consensus(inputs, distiller.teacher_logits(inputs))
    given = FrozenTeacher(narrow)(inputs)
    torch.testing.assert_close(consensus[:, 0], given[:, :2].logsumexp(1))
    torch.testing.assert_close(consensus[:, [2, 5]], given[:, 2:])
    assert consensus[:, [1, 3, 4]].isneginf().all()
    assert make_network()(inputs).shape == consensus.shape
