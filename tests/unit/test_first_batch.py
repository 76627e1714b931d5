"""A Distiller looks at the values of its first batch, and at targets that select positions."""

import pytest
import torch
from torch import nn

from kd_lightning import ClassificationModule, Distiller, FrozenTeacher
from kd_lightning.functional import kd_loss
from kd_lightning.losses import BernoulliKDLoss


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), requires_grad=True)


def test_a_mask_beside_a_task_loss_selects_positions() -> None:
    student, teacher = logits(2, 2, 3, 5)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    out = Distiller(None, 4.0)(None, student, mask, teacher_logits=teacher.detach(), task_loss=torch.zeros(()))
    assert torch.equal(out.kd_loss, kd_loss(student, teacher.detach(), 4.0, targets=mask))
    assert not torch.equal(out.kd_loss, kd_loss(student, teacher.detach(), 4.0))


@pytest.mark.parametrize("row", [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
def test_soft_labels_and_samples_without_a_label_are_taken(row: list[float]) -> None:
    student, teacher = logits(2, 4, 3)
    targets = torch.tensor([row]).repeat(4, 1)
    out = Distiller(None)(None, student, targets, teacher_logits=teacher.detach())
    torch.testing.assert_close(out.task_loss, -(targets * student.log_softmax(-1)).sum(-1).mean())
    _, values, _ = ClassificationModule(nn.Identity())._loss((student, targets))
    assert values.shape == (4, 3)


def test_labels_are_no_probabilities_for_a_multi_label_task() -> None:
    student, teacher = logits(2, 4, 3)
    distiller = Distiller(None, kd_loss=BernoulliKDLoss(), task_loss=nn.BCEWithLogitsLoss())
    assert distiller(None, student, torch.ones(4, 3), teacher_logits=teacher.detach()).loss.isfinite()


def test_log_probabilities_are_logits() -> None:
    student, teacher = (side.log_softmax(-1) for side in logits(2, 4, 3))
    out = Distiller(None, 2.0)(None, student, torch.zeros(4).long(), teacher_logits=teacher.detach())
    torch.testing.assert_close(out.kd_loss, kd_loss(student, teacher.detach(), 2.0))


def test_later_batches_are_not_looked_at() -> None:
    student, teacher = logits(2, 4, 3)
    distiller = Distiller(None)
    targets = torch.zeros(4).long()
    distiller(None, student, targets, teacher_logits=teacher.detach())
    assert distiller(None, student, targets, teacher_logits=teacher.detach().softmax(-1)).loss.isfinite()
    distiller.teacher = FrozenTeacher(nn.Sequential(nn.Identity(), nn.Softmax(-1)))
    with pytest.raises(ValueError, match="the teacher's logits are probabilities"):
        distiller(teacher.detach(), student, targets)
