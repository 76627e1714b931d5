r"""Divergences between forward and reverse KL, one class per equation.

The notation is that of :mod:`~kd_lightning.functional.divergences`: :math:`p = \mathrm{softmax}(a)` is the student and
:math:`q = \mathrm{softmax}(b)` the teacher. With the log-ratio :math:`x = \log p - \log q`, forward KL is
:math:`-\sum_k q_k x_k` with the student's gradient :math:`p - q`, and reverse KL is :math:`\sum_k p_k x_k` with the
student's gradient :math:`p (x - \sum_k p_k x_k)`. The teacher's gradients are those with the sides exchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from kd_lightning.functional.divergences import (
    ClosedForm,
    Divergence,
    ForwardKL,
    ReverseKL,
    nan_to_zero,
    where_positive,
)


@dataclass(frozen=True)
class SymmetricKL(Divergence):
    r""":math:`(1 - \lambda) \, \mathrm{KL}(q \| p) + \lambda \, \mathrm{KL}(p \| q)`, λ the weight of reverse KL."""

    reverse_weight: float = 0.5
    tails: ClassVar[tuple[str, ...]] = ("bucket", "uniform")

    def __post_init__(self) -> None:
        _check_between_0_and_1("reverse_weight", self.reverse_weight, "kd_loss", "reverse_kd_loss")

    @override
    def per_class(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        forward, reverse = (divergence.per_class(log_p, log_q) for divergence in (ForwardKL(), ReverseKL()))
        return (1 - self.reverse_weight) * forward + self.reverse_weight * reverse

    @override
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        p, q = a.softmax(dim), b.softmax(dim)
        return _both_ways(a, b, p, q, dim, 1 - self.reverse_weight, self.reverse_weight, teacher)


@dataclass(frozen=True)
class EntropyGatedKL(Divergence):
    r""":math:`\mathrm{KL}(p \| q) + \mathbb{1}[H(q) > \tau] \, \mathrm{KL}(q \| p)`: forward KL where q is unsure."""

    threshold: float = 0.8
    tails: ClassVar[tuple[str, ...]] = ("uniform",)

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise ValueError(
                f"threshold is an entropy in nats, at least 0 and finite, got {self.threshold}. The publication uses "
                "0.8; use reverse_kd_loss to leave the gate shut."
            )

    @override
    def definition(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None) -> Tensor:
        forward, reverse = ForwardKL().definition(a, b, dim, None), ReverseKL().definition(a, b, dim, None)
        return reverse + torch.where(self._is_open(b, b.softmax(dim), dim), forward, 0.0)

    @override
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        p, q = a.softmax(dim), b.softmax(dim)
        forward = self._is_open(b, q, dim).to(q.dtype)
        return _both_ways(a, b, p, q, dim, forward, 1.0, teacher)

    def _is_open(self, b: Tensor, q: Tensor, dim: int) -> Tensor:
        mean = (q * where_positive(q, b)).sum(dim, keepdim=True)
        return b.logsumexp(dim, keepdim=True) - mean > self.threshold


@dataclass(frozen=True)
class ToDi(Divergence):
    r""":math:`\sum_k w_k q_k (-x_k) + (1 - w_k) p_k x_k`, with the constant weights :math:`w = \sigma(-x)`.

    Since :math:`w = q / (p + q)`, the value is that of both KLs together, :math:`\sum_k (p_k - q_k) x_k`. The weights
    shape the gradient: :math:`p - q + v - p \sum_k v_k` with :math:`v = p (1 - w) x`.
    """

    tails: ClassVar[tuple[str, ...]] = ("bucket", "uniform")

    @override
    def definition(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None) -> Tensor:
        log_p, log_q = a.log_softmax(dim), b.log_softmax(dim)
        p, q = log_p.exp(), log_q.exp()
        x = log_p - log_q
        weight = torch.where((p > 0) | (q > 0), x, 0.0).sigmoid().detach()
        of_p = p * where_positive(p, weight * x)
        return (of_p - q * where_positive(q, (1 - weight) * x)).sum(dim, keepdim=True)

    @override
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        p, q = a.softmax(dim), b.softmax(dim)
        x = _log_ratio(a, b, dim)
        difference = p - q
        value = torch.mul(difference, x, out=b).sum(dim, keepdim=True)
        teacher_gradient = None
        if teacher:
            of_q = nan_to_zero(torch.sigmoid(-x).mul_(x).mul_(q))
            teacher_gradient = of_q.sub_(q * of_q.sum(dim, keepdim=True)).add_(difference).neg_()
        of_p = nan_to_zero(torch.sigmoid(x, out=b).mul_(x).mul_(p))
        gradient = difference.add_(of_p).sub_(p.mul_(of_p.sum(dim, keepdim=True)))
        return ClosedForm(value, gradient, teacher_gradient)


@dataclass(frozen=True)
class SkewKL(Divergence):
    r""":math:`\mathrm{KL}(q \| m)`, :math:`m = \alpha q + (1 - \alpha) p`; reverse: p and q exchanged.

    With :math:`u` the outer side, :math:`v` the inner one and :math:`\ell = \log m/u`, the gradient of the inner side
    is :math:`(1 - \alpha) v (\sum_k v_k r_k - r)`, :math:`r = u/m - 1`, and that of the outer side
    :math:`u (g - \sum_k u_k g_k)`, :math:`g = -\ell - \alpha r`.
    """

    skew: float = 0.1
    reverse: bool = False
    tails: ClassVar[tuple[str, ...]] = ("bucket", "uniform", "renormalize")

    def __post_init__(self) -> None:
        _check_between_0_and_1("skew", self.skew, "reverse_kd_loss" if self.reverse else "kd_loss", None)

    @override
    def per_class(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_u, log_v = (log_p, log_q) if self.reverse else (log_q, log_p)
        u = log_u.exp()
        either = (u > 0) | (log_v > -math.inf)
        log_ratio = torch.where(either, log_v - log_u, 0.0).clamp(-80.0, 80.0)  # as in JensenShannon
        return -u * ((1 - self.skew) * log_ratio.expm1()).log1p()

    @override
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        p, q = a.softmax(dim), b.softmax(dim)
        u, v = (p, q) if self.reverse else (q, p)
        difference = torch.sub(v, u, out=a)
        at_least_u = torch.clamp(u, min=torch.finfo(u.dtype).tiny, out=b)  # no ratio is infinite
        log_m = torch.div(difference, at_least_u, out=b).mul_(1 - self.skew).log1p_()
        value = difference.mul_(1 - self.skew).sub_(u * log_m).sum(dim, keepdim=True)
        r = torch.expm1(-log_m)
        inner = outer = None
        if teacher or self.reverse:
            g = log_m.add_(r, alpha=self.skew).neg_()
            outer = u * (g - (u * g).sum(dim, keepdim=True))
        if teacher or not self.reverse:
            inner = ((v * r).sum(dim, keepdim=True) - r).mul_(v).mul_(1 - self.skew)
        student, teacher_gradient = (outer, inner) if self.reverse else (inner, outer)
        assert student is not None
        return ClosedForm(value, student, teacher_gradient)


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    r"""ABKD: :math:`\frac{1}{\alpha \beta} \sum_k \frac{\beta p^{s} + \alpha q^{s}}{s} - q^\alpha p^\beta`, s = α + β.

    With :math:`\delta_c = (p^c - q^c) / c`, which tends to :math:`x` for c → 0, it is
    :math:`\frac{1}{s} \sum_k h_k - g_k` with :math:`h = p^\beta \delta_\alpha` and :math:`g = q^\alpha \delta_\beta`.
    The gradient of the student is :math:`h - p \sum_k h_k`, that of the teacher :math:`q \sum_k g_k - g`.
    """

    alpha: float
    beta: float
    tails: ClassVar[tuple[str, ...]] = ("uniform",)

    def __post_init__(self) -> None:
        if not (0 <= self.alpha < math.inf and 0 <= self.beta < math.inf and self.alpha + self.beta > 0):
            raise ValueError(
                "alpha and beta must be finite, at least 0 and not both 0, got "
                f"alpha={self.alpha}, beta={self.beta}. (1, 0) is kd_loss, (0, 1) reverse_kd_loss."
            )

    @override
    def definition(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None) -> Tensor:
        log_p, log_q = a.log_softmax(dim), b.log_softmax(dim)
        (p_a, q_a), (p_b, q_b) = ([_power(side, c) for side in (log_p, log_q)] for c in (self.alpha, self.beta))
        x = log_p - log_q
        h = (p_a - q_a) / self.alpha if self.alpha else torch.where(p_b > 0, x, 0.0)
        g = (p_b - q_b) / self.beta if self.beta else torch.where(q_a > 0, x, 0.0)
        return (p_b * h - q_a * g).sum(dim, keepdim=True) / (self.alpha + self.beta)

    @override
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        log_p, log_q = a.log_softmax(dim), b.log_softmax(dim)
        p_a, q_a = _power(log_p, self.alpha, a), _power(log_q, self.alpha, b)
        p_b, q_b = _power(log_p, self.beta), _power(log_q, self.beta)
        h = p_a.sub_(q_a).div_(self.alpha) if self.alpha else log_p - log_q
        h = nan_to_zero(h.mul_(p_b))
        g = p_b.sub_(q_b).div_(self.beta) if self.beta else log_p - log_q
        g = nan_to_zero(g.mul_(q_a))
        of_h, of_g = h.sum(dim, keepdim=True), g.sum(dim, keepdim=True)
        gradient = h.sub_(log_p.exp_().mul_(of_h))
        teacher_gradient = log_q.exp_().mul_(of_g).sub_(g) if teacher else None
        return ClosedForm((of_h - of_g) / (self.alpha + self.beta), gradient, teacher_gradient)


def _power(log_probability: Tensor, exponent: float, out: Tensor | None = None) -> Tensor:
    """Return a power of the probability, by its logarithm: small exponents keep what underflows."""
    if not exponent:  # because 0 · ∞ is NaN
        return torch.ones_like(log_probability)
    power = torch.mul(log_probability, exponent, out=out)
    return power.exp() if out is None else power.exp_()


def _check_between_0_and_1(name: str, value: float, at_0: str, at_1: str | None) -> None:
    if not 0 < value < 1:
        ends = f"use {at_0} in place of 0, {at_1} in place of 1" if at_1 else f"use {at_0} in place of 0; 1 is no loss"
        raise ValueError(f"{name} must lie between 0 and 1, got {value}: {ends}.")


def _log_ratio(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Return ``log p − log q``, 0 where both sides are masked; ``a`` and ``b`` are written over."""
    log_z_ratio = a.logsumexp(dim, keepdim=True).sub_(b.logsumexp(dim, keepdim=True))
    return nan_to_zero(a.sub_(b).sub_(log_z_ratio))


def _both_ways(
    a: Tensor, b: Tensor, p: Tensor, q: Tensor, dim: int, forward: float | Tensor, reverse: float, teacher: bool
) -> ClosedForm:
    """Return the weighted sum of both KLs; weights are numbers, or one number per row."""
    x = _log_ratio(a, b, dim)
    of_q, of_p = nan_to_zero(torch.mul(x, q, out=b)), nan_to_zero(x.mul_(p))
    mean_p, mean_q = of_p.sum(dim, keepdim=True), of_q.sum(dim, keepdim=True)
    difference = p - q
    teacher_gradient = None
    if teacher:
        teacher_gradient = of_q.sub_(q.mul_(mean_q)).mul_(forward).add_(difference, alpha=reverse).neg_()
    gradient = of_p.sub_(p.mul_(mean_p)).mul_(reverse).add_(difference.mul_(forward))
    return ClosedForm(reverse * mean_p - nan_to_zero(forward * mean_q), gradient, teacher_gradient)
