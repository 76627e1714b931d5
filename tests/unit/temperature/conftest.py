"""A batch with known values, and the formula of the loss written out, for comparison with the policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kd_lightning.functional import Temperature, kd_loss
from kd_lightning.temperature import Progress, Signals, TemperaturePolicy

STUDENT = [
    [1.125, -0.5, 0.25, -2.5, 0.75],
    [0.25, 0.375, 0.875, -1.5, 2.0],
    [-0.125, 1.625, 0.0, 0.125, -3.0],
    [0.5, -0.625, -0.25, -1.625, 4.0],
]
TEACHER = [
    [3.0, -1.25, -1.25, 0.125, 0.5],
    [-0.75, 0.5, 1.5, 0.125, 4.25],
    [0.75, 2.0, 0.75, 0.375, -2.0],
    [-1.5, 0.5, 0.625, 0.375, 1.0],
]

#: From (student logits, teacher logits, targets), all float64, to (T_s, T_t, scale): a paper's formula by hand.
Formula = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Batch(NamedTuple):
    student: Tensor
    teacher: Tensor
    targets: Tensor

    def signals(self, **changes: object) -> Signals:
        return Signals(self.student, self.teacher, self.targets).replace(**changes)


@pytest.fixture
def batch() -> Batch:
    """Four samples, five classes, float64; the student's logits take a gradient."""
    student = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    return Batch(student, torch.tensor(TEACHER, dtype=torch.float64), torch.tensor([0, 4, 1, 2]))


@pytest.fixture
def tokens() -> Batch:
    """Two sequences of seven tokens, eleven words, float64; four tokens are left out."""
    student = torch.randn(2, 7, 11, dtype=torch.float64).mul(2).requires_grad_()
    targets = torch.randint(0, 11, (2, 7))
    targets[0, 5:] = -100
    targets[1, 0] = targets[1, 3] = -100
    return Batch(student, torch.randn(2, 7, 11, dtype=torch.float64).mul(3), targets)


def divergence(student: Tensor, teacher: Tensor, t_s: Tensor, t_t: Tensor) -> Tensor:
    """KL per position, from the definition."""
    p_t = (teacher / t_t).exp() / (teacher / t_t).exp().sum(-1, keepdim=True)
    p_s = (student / t_s).exp() / (student / t_s).exp().sum(-1, keepdim=True)
    return (p_t * (p_t / p_s).log()).sum(-1)


@pytest.fixture
def check() -> Callable[..., None]:
    """Compare a policy's temperatures, loss and gradients with a formula."""

    def check(
        policy: TemperaturePolicy,
        batch: Batch,
        formula: Formula,
        *,
        progress: Progress | None = None,
        rtol: float = 1e-9,
        loss_sees: Callable[[Tensor], Tensor] = lambda logits: logits,
    ) -> None:
        signals = batch.signals(progress=progress or Progress())
        computed = policy(signals)
        assert isinstance(computed, Temperature)
        loss = kd_loss(
            policy.transform(batch.student), policy.transform(batch.teacher), computed, targets=batch.targets
        )
        (gradient,) = torch.autograd.grad(loss, batch.student)

        student = batch.student.detach().clone().requires_grad_()
        t_s, t_t, scale = formula(student, batch.teacher, batch.targets)
        losses = divergence(loss_sees(student), loss_sees(batch.teacher), t_s, t_t) * scale.squeeze(-1)
        expected = losses[batch.targets != -100].mean()
        (expected_gradient,) = torch.autograd.grad(expected, student)

        valid = batch.targets != -100
        for ours, theirs in ((computed.student, t_s), (computed.teacher, t_t)):
            ours = ours.double().expand_as(theirs)
            if theirs.shape[:-1] == valid.shape:
                ours, theirs = ours[valid], theirs[valid]
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)
        torch.testing.assert_close(loss.double(), expected, rtol=10 * rtol, atol=0)
        torch.testing.assert_close(gradient, expected_gradient, rtol=100 * rtol, atol=10 * rtol)

    return check
