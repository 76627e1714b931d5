"""Losses between forward and reverse KL: limits, bounds and constant weights. The contract tests have the rest."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kd_lightning.functional import (
    Temperature,
    alpha_beta_kd_loss,
    entropy_gated_kd_loss,
    kd_loss,
    mse_logits_loss,
    reverse_kd_loss,
    row_loss,
    skew_kd_loss,
    symmetric_kd_loss,
    todi_loss,
)


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    s, t = (torch.randn(6, 9, dtype=torch.float64) * 3 for _ in range(2))
    return s.requires_grad_(), t


@pytest.fixture(params=["fast", "definition"])
def path(request: Any) -> Any:
    if request.param == "fast":
        yield
    else:
        with mock.patch.object(row_loss, "closed_form_applies", return_value=False):
            yield


def both(loss: Tensor, *inputs: Tensor) -> Any:
    return (loss.detach(), *torch.autograd.grad(loss, inputs))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("exponents", [(1.0, 0.0), (0.0, 1.0), (1.0, 1e-6), (1e-6, 1.0)])
def test_alpha_beta_ends_in_both_kls(logits, exponents):
    s, t = logits
    kl = kd_loss if exponents[0] == 1 else reverse_kd_loss
    alpha, beta = exponents
    got = both(alpha_beta_kd_loss(s, t, 2.0, alpha=alpha, beta=beta), s)
    assert_close(got, both(kl(s, t, 2.0), s), rtol=1e-9 if 0 in exponents else 1e-4, atol=1e-9)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.0), (0.0, 0.6)])
def test_alpha_beta_is_continuous_where_an_exponent_vanishes(logits, alpha, beta):
    """Also off the line α + β = 1, where the official code is not."""
    s, t = logits
    got = both(alpha_beta_kd_loss(s, t, 2.0, alpha=alpha, beta=beta), s)
    near = both(alpha_beta_kd_loss(s, t, 2.0, alpha=alpha or 1e-6, beta=beta or 1e-6), s)
    assert_close(got, near, rtol=1e-4, atol=1e-7)
    q, p = (z.softmax(-1) ** 0.6 for z in ((t / 2, s / 2) if beta == 0 else (s / 2, t / 2)))
    expected = (q * (q / p).log() - q + p).sum(-1).mean() / 0.36
    assert_close(got[0], 4 * expected.detach())


@pytest.mark.usefixtures("path")
def test_alpha_beta_of_exponents_one_is_half_the_squared_distance(logits):
    s, t = logits
    expected = (s.softmax(-1) - t.softmax(-1)).square().sum(-1).mean() / 2
    assert_close(both(alpha_beta_kd_loss(s, t, 1.0, alpha=1, beta=1), s), both(expected, s))


@pytest.mark.usefixtures("path")
def test_alpha_beta_exchanges_the_sides_with_the_exponents(logits):
    s, t = logits
    assert_close(alpha_beta_kd_loss(s, t, 3.0, alpha=0.4, beta=0.9), alpha_beta_kd_loss(t, s, 3.0, alpha=0.9, beta=0.4))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("reverse", [False, True])
def test_skew_is_kl_without_skew_and_bounded_by_its_logarithm(logits, reverse):
    s, t = logits
    kl = reverse_kd_loss if reverse else kd_loss
    got = both(skew_kd_loss(s, t, 2.0, skew=1e-9, reverse=reverse), s)
    assert_close(got, both(kl(s, t, 2.0), s), rtol=1e-6, atol=1e-7)
    apart = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    for a, b in (apart, (apart[0].masked_fill(apart[0] == 0, -math.inf), apart[1])):
        bound = skew_kd_loss(a, b, 1.0, skew=0.1, reverse=reverse)
        assert bound.item() == pytest.approx(math.log(10), rel=1e-6)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("weight", [0.3, 0.5])
def test_symmetric_is_the_weighted_sum(logits, weight):
    s, t = logits
    expected = (1 - weight) * kd_loss(s, t, 2.0) + weight * reverse_kd_loss(s, t, 2.0)
    assert_close(both(symmetric_kd_loss(s, t, 2.0, reverse_weight=weight), s), both(expected, s))


@pytest.mark.usefixtures("path")
def test_gate_opens_for_the_unsure_rows_alone(logits):
    s, t = logits
    entropy = -(t.softmax(-1) * t.log_softmax(-1)).sum(-1)
    threshold = entropy.median().item() + 1e-9
    per_row: Any = {"reduction": "none", "scale": "none"}
    expected = reverse_kd_loss(s, t, 1.0, **per_row)
    expected = expected + torch.where(entropy > threshold, kd_loss(s, t, 1.0, **per_row), 0.0)
    assert 0 < (entropy > threshold).sum() < 6
    got = entropy_gated_kd_loss(s, t, 1.0, threshold=threshold, **per_row)
    assert_close(both(got.sum(), s), both(expected.sum(), s))


@pytest.mark.usefixtures("path")
def test_a_shut_gate_hides_an_infinite_forward_kl():
    s, t = torch.tensor([[2.0, 0.0, -math.inf]], requires_grad=True), torch.tensor([[9.0, 0.0, 0.0]])
    value, gradient = both(entropy_gated_kd_loss(s, t, 1.0), s)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert entropy_gated_kd_loss(s, t, 1.0, threshold=0.0) == math.inf


@pytest.mark.usefixtures("path")
def test_todi_holds_its_weights_constant(logits):
    """Values and all gradients by autograd over the publication's sum, its weights detached."""
    s, t = logits
    ts, tt = (torch.rand(6, 1, dtype=torch.float64).add(0.7).requires_grad_() for _ in range(2))
    log_p, log_q = (s / ts).log_softmax(-1), (t / tt).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    weight = (q / (p + q)).detach()
    rows = (weight * q * (log_q - log_p) + (1 - weight) * p * (log_p - log_q)).sum(-1)
    expected = (rows * (ts * tt).squeeze(-1)).mean()
    got = both(todi_loss(s, t, Temperature(ts, tt)), s, ts, tt)
    assert_close(got, both(expected, s, ts, tt))


def test_todi_differentiates_its_gradient(logits):
    s, t = logits
    (gradient,) = torch.autograd.grad(todi_loss(s, t, 2.0), s, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), s)
    assert second.isfinite().all()
    assert second.abs().sum() > 0


@pytest.mark.parametrize("loss", [todi_loss, symmetric_kd_loss, skew_kd_loss, entropy_gated_kd_loss])
def test_high_temperature_is_the_squared_error(loss):
    """All are of second order, which is why T² belongs to them: a multiple of the centred squared error."""
    s, t = (torch.randn(8, 5, dtype=torch.float64) for _ in range(2))
    s, t = (z - z.mean(-1, keepdim=True) for z in (s, t))
    of_forward = {todi_loss: 2.0, symmetric_kd_loss: 1.0, skew_kd_loss: 0.81, entropy_gated_kd_loss: 2.0}[loss]
    expected = of_forward / 2 * mse_logits_loss(s, t, 1.0)
    assert loss(s, t, 1e4).item() == pytest.approx(expected.item(), rel=1e-3)
