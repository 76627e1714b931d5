"""Losses that single out one class: the teacher's decision, and the likeliest class of soft targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_lightning import Distiller
from kd_lightning.functional import dkd_loss, hard_label_loss, kd_loss, nkd_loss
from kd_lightning.losses import CrossEntropyLoss, DKDLoss, HardLabelLoss


def test_hard_label_is_deit_s_equation_whatever_the_temperature() -> None:
    """½ CE(ψ(Z_s), y) + ½ CE(ψ(Z_s), argmax Z_t), and its gradient (p − onehot) / N, by NumPy."""
    student, teacher = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.randn(6, 5).double()
    targets = torch.tensor([0, 1, 2, 3, 4, 0])
    distiller = Distiller(None, 4.0, HardLabelLoss(), kd_weight=0.5, task_weight=0.5)
    loss = distiller(None, student, targets, teacher_logits=teacher).loss
    (gradient,) = torch.autograd.grad(loss, student)
    z = student.detach().numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    decided, rows = teacher.numpy().argmax(1), np.arange(6)
    assert loss.item() == pytest.approx(-0.5 * (np.log(p[rows, targets]) + np.log(p[rows, decided])).mean(), rel=1e-12)
    expected = p - 0.5 * np.eye(5)[targets] - 0.5 * np.eye(5)[decided]
    np.testing.assert_allclose(gradient.numpy(), expected / 6, rtol=1e-9)


def test_a_learned_temperature_gets_the_gradient_zero() -> None:
    temperature = torch.tensor(3.0, requires_grad=True)
    hard_label_loss(torch.randn(4, 3), torch.randn(4, 3), temperature).backward()
    assert temperature.grad == 0


def mixed(count: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets as mixup makes them, λ of one class and 1 − λ of another, and the class of the larger share."""
    first, second = torch.arange(count) % classes, (torch.arange(count) + 1) % classes
    share = torch.linspace(0.05, 0.95, count, dtype=torch.float64)[:, None]
    soft = share * F.one_hot(first, classes) + (1 - share) * F.one_hot(second, classes)
    return soft, torch.where(share.squeeze(1) > 0.5, first, second)


@pytest.mark.parametrize("loss", [dkd_loss, nkd_loss])
@pytest.mark.parametrize("class_dim", [1, 0])
def test_soft_targets_stand_for_their_likeliest_class(loss: Any, class_dim: int) -> None:
    student, teacher = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    soft, likeliest = mixed(8, 4)
    given = [z.movedim(1, class_dim) for z in (student, teacher, soft)]
    got = loss(*given[:2], 3.0, targets=given[2], class_dim=class_dim)
    torch.testing.assert_close(got, loss(student, teacher, 3.0, targets=likeliest))


def test_mixup_in_a_distiller() -> None:
    """The task loss takes the mixture, DKD its likeliest class."""
    network, inputs = nn.Linear(3, 4).double(), torch.randn(8, 3, dtype=torch.float64)
    soft, likeliest = mixed(8, 4)
    distiller = Distiller(None, 2.0, DKDLoss(), CrossEntropyLoss(), kd_weight=1.0, task_weight=1.0)
    student, teacher = network(inputs), torch.randn(8, 4, dtype=torch.float64)
    out = distiller(inputs, student, soft, teacher_logits=teacher)
    torch.testing.assert_close(out.kd_loss, dkd_loss(student, teacher, 2.0, targets=likeliest))
    torch.testing.assert_close(out.task_loss, -(soft * student.log_softmax(1)).sum(1).mean())


def test_hard_labels_of_a_padded_vocabulary_are_real_tokens() -> None:
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 8)
    teacher[..., 7] = 100.0
    with pytest.warns(UserWarning, match="the last 3 of the teacher are cut"):
        got = hard_label_loss(student, teacher, 1.0)
    expected = F.cross_entropy(student.flatten(0, 1), teacher[..., :5].argmax(-1).flatten())
    torch.testing.assert_close(got, expected)


def test_hard_and_soft_labels_agree_for_a_certain_teacher() -> None:
    student = torch.randn(6, 5, dtype=torch.float64)
    certain = 1e3 * F.one_hot(torch.arange(6) % 5, 5).double()
    torch.testing.assert_close(hard_label_loss(student, certain, 1.0), kd_loss(student, certain, 1.0))


@pytest.mark.parametrize("loss", [dkd_loss, nkd_loss])
def test_ordinary_rows_are_the_same_beside_a_row_without_other_classes(loss: Any) -> None:
    """A batch in which a row has no class but its target takes another way to the same bits."""
    student, teacher, targets = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    masked = teacher.clone()
    masked[3] = torch.full((5,), -torch.inf).index_fill(0, torch.tensor(3), 1.0)
    alone, beside = (student.clone().requires_grad_() for _ in range(2))
    rows = loss(alone[:3], teacher[:3], 4.0, targets=targets[:3], reduction="none")
    with_it = loss(beside, masked, 4.0, targets=targets, reduction="none")
    assert torch.equal(rows, with_it[:3])
    rows.sum().backward()
    with_it[:3].sum().backward()
    assert torch.equal(alone.grad[:3], beside.grad[:3])  # pyright: ignore[reportOptionalSubscript]
