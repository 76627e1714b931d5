"""Losses at temperatures from 0.01 to a million: T² magnifies what rounding leaves of a divergence of order 1/T²."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kd_lightning import functional
from kd_lightning.functional import Temperature, kd_loss

Loss = Callable[..., Tensor]


def expected(student: Tensor, teacher: Tensor, t_s: float, t_t: float) -> tuple[Tensor, Tensor]:
    """KL · T_s · T_t of each row and the gradient of its mean, as sums of terms that are of second order by themselves.

    With ``d = log q − log p`` the terms are ``q (d + exp(−d) − 1)``, which is ``q (d²/2 − d³/6 + d⁴/24)`` near 0.
    """
    a, b = student.double() / t_s, teacher.double() / t_t
    q, x = b.softmax(-1), b - a
    ratio = a.logsumexp(-1, keepdim=True) - b.logsumexp(-1, keepdim=True)
    near_0 = (q * torch.expm1(-x)).sum(-1, keepdim=True).log1p()
    d = x + torch.where(x.abs().amax(-1, keepdim=True) < 0.1, near_0, ratio)
    far = q * d + a.softmax(-1) - q
    terms = torch.where(d.abs() < 1e-3, q * (d**2 / 2 - d**3 / 6 + d**4 / 24), far)
    gradient = torch.where(d.abs() < 0.1, q * torch.expm1(-d), a.softmax(-1) - q)
    return terms.nansum(-1) * t_s * t_t, gradient * t_t / len(student)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0, 4.0, 10.0, 11.0, 30.0, 100.0, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 10), (8, 100), (300, 1000)])
def test_value_and_gradient(temperature: float, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(2, *shape, generator=generator) * 2).to(dtype)
    value, gradient = expected(student, teacher, temperature, temperature)
    student.requires_grad_()
    loss = kd_loss(student, teacher, temperature)
    (loss * 2**10).backward()  # a gradient scaler's factor, because a gradient may underflow in float16
    assert student.grad is not None
    assert loss.dtype == torch.float32
    assert student.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), value.mean(), rtol=1e-4, atol=1e-38)
    digits = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]  # of the gradient's own type
    assert (student.grad.double() / 2**10 - gradient).norm() <= digits * gradient.norm() + 1e-38


@pytest.mark.parametrize("kind", ["per sample", "two sides", "learnt", "per class"])
@pytest.mark.parametrize("temperature", [30.0, 1e4, 1e5])
def test_temperatures_that_are_tensors(kind: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(4)
    student, teacher = torch.randn(2, 6, 20, generator=generator)
    t = torch.tensor(temperature)
    given = {
        "per sample": t.expand(6, 1),
        "two sides": Temperature(t, 2 * t),
        "learnt": t.clone().requires_grad_(),
        "per class": t.expand(1, 20).clone().requires_grad_(),  # by the definition
    }[kind]
    value, _ = expected(student, teacher, temperature, (2 if kind == "two sides" else 1) * temperature)
    loss = kd_loss(student.requires_grad_(), teacher, given, reduction="none")
    torch.testing.assert_close(loss.double(), value, rtol=1e-4, atol=0.0)


def test_a_class_that_only_the_teacher_masks() -> None:
    student, teacher = torch.randn(2, 4, 6)
    teacher[:, 2] = -torch.inf
    q = (teacher.double() / 50).softmax(-1)
    log_p = (student.double() / 50).log_softmax(-1)
    value = torch.where(q > 0, q * (q.log() - log_p), 0.0).sum(-1).mean() * 50**2
    torch.testing.assert_close(kd_loss(student, teacher, 50.0).double(), value, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    ("loss", "factor"),
    [
        (functional.reverse_kd_loss, 1.0),
        (functional.jsd_loss, 0.25),  # β (1 − β)
        (functional.symmetric_kd_loss, 1.0),
        (functional.skew_kd_loss, 0.81),  # (1 − skew)²
    ],
)
def test_the_limit_of_other_divergences(loss: Loss, factor: float) -> None:
    """All are half the variance over the classes of the logits' differences, times a factor."""
    student, teacher = torch.randn(2, 40, 50, generator=torch.Generator().manual_seed(5))
    student.requires_grad_()
    value = loss(student, teacher, 1e5)
    value.backward()
    assert student.grad is not None
    difference = (student - teacher).detach()
    torch.testing.assert_close(value.detach(), factor * difference.var(-1, correction=0).mean() / 2, rtol=1e-3, atol=0)
    centred = difference - difference.mean(-1, keepdim=True)
    torch.testing.assert_close(student.grad, factor * centred / 50 / 40, rtol=2e-3, atol=1e-7)
