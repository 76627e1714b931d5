r"""Divergences that split off the target class :math:`y`, one class per equation.

The notation is that of :mod:`~kd_lightning.functional.divergences`; a hat marks a distribution over the rest, the
classes without :math:`y`. Rows without a rest, because all of its logits are −inf, are possible, and so are targets of
−inf. On the CPU one look shows that a batch has neither, and the ordinary equation does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from kd_lightning.functional.divergences import (
    ClosedForm,
    Divergence,
    ForwardKL,
    SoftCrossEntropy,
    nan_to_zero,
    where_positive,
)


@dataclass(frozen=True)
class DecoupledKL(Divergence):
    r"""DKD: :math:`\alpha \, \mathrm{KL}(q_y \| p_y) + \beta \, \mathrm{KL}(\hat q \| \hat p)`.

    The first term is between two-point distributions, target against rest. The log-odds of the target, :math:`z = a_y -
    \log \sum_{k \ne y} e^{a_k}`, carry it alone.
    """

    alpha: float = 1.0
    beta: float = 8.0
    needs_labels: ClassVar[bool] = True
    min_classes: ClassVar[int] = 3

    @override
    def definition(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None) -> Tensor:
        assert labels is not None
        a_y, b_y = a.gather(dim, labels), b.gather(dim, labels)
        a, b = a.scatter(dim, labels, -math.inf), b.scatter(dim, labels, -math.inf)
        odds_a, odds_b = a_y - log_sum(a, dim), b_y - log_sum(b, dim)
        empty = _is_empty(b, dim)
        rest = ForwardKL().definition(a.masked_fill(empty, 0.0), b.masked_fill(empty, 0.0), dim, None)
        return self.alpha * _two_point_kl(odds_b, odds_a) + self.beta * rest.masked_fill(empty, 0.0)

    @override
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        assert labels is not None
        a_y, b_y = a.gather(dim, labels), b.gather(dim, labels)
        a, b = (z.scatter_(dim, labels, -math.inf) for z in (a, b))
        peak_a, peak_b = a.amax(dim, keepdim=True), b.amax(dim, keepdim=True)
        finite = a.is_cpu and math.isfinite((peak_a + peak_b + a_y + b_y).sum().item())  # without a host sync
        p, log_z_a = softmax_and_log_z(a, peak_a, dim, finite)
        q, log_z_b = softmax_and_log_z(b, peak_b, dim, finite)
        odds_a, odds_b = a_y.sub_(log_z_a), b_y.sub_(log_z_b)
        weighted = b.sub_(a).mul_(q)
        mean = weighted.nansum(dim, keepdim=True)
        beta: Tensor | float = self.beta
        if finite:
            rest = mean - log_z_b + log_z_a
        else:
            rest = mean - log_z_b + torch.where(peak_a == -math.inf, 0.0, log_z_a)
            rest, beta = torch.where(peak_b == -math.inf, 0.0, rest), torch.where(peak_b == -math.inf, 0.0, self.beta)
        value = self.alpha * _two_point_kl(odds_b, odds_a, finite) + self.beta * rest

        to_target = self.alpha * (odds_a.sigmoid() - odds_b.sigmoid())  # by the odds; the rest loses it as p has it
        teacher_gradient = None
        if teacher:
            of_odds = nan_to_zero(self.alpha * odds_b.sigmoid() * (-odds_b).sigmoid() * (odds_b - odds_a))
            teacher_gradient = weighted.mul_(self.beta).sub_(q * (self.beta * mean + of_odds))
            teacher_gradient.scatter_(dim, labels, of_odds)
        gradient = torch.mul(p, beta - to_target, out=p).sub_(q.mul_(self.beta))
        return ClosedForm(value, gradient.scatter_(dim, labels, to_target), teacher_gradient)


def softmax_and_log_z(z: Tensor, peak: Tensor, dim: int, finite: bool = False) -> tuple[Tensor, Tensor]:
    """Return the softmax and the logsumexp: 0 and −inf for a row of nothing but −inf, if not ``finite``."""
    p = z.softmax(dim) if finite else nan_to_zero(z.softmax(dim))
    log_z = peak - p.amax(dim, keepdim=True).log_()
    return p, log_z if finite else torch.where(peak == -math.inf, peak, log_z)


@dataclass(frozen=True)
class NonTargetCrossEntropy(Divergence):
    r""":math:`-\sum_{k \ne y} \hat q_k \log \hat p_k`: NKD's second term."""

    needs_labels: ClassVar[bool] = True
    min_classes: ClassVar[int] = 3

    @override
    def definition(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None) -> Tensor:
        assert labels is not None
        a, b = a.scatter(dim, labels, -math.inf), b.scatter(dim, labels, -math.inf)
        empty = _is_empty(b, dim)
        value = SoftCrossEntropy().definition(a.masked_fill(empty, 0.0), b.masked_fill(empty, 0.0), dim, None)
        return value.masked_fill(empty, 0.0)

    @override
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        assert labels is not None
        a, b = (z.scatter_(dim, labels, -math.inf) for z in (a, b))
        empty = _is_empty(b, dim)
        if empty.is_cpu and not empty.any():  # without a host sync
            return SoftCrossEntropy().closed_form(a, b, dim, None, teacher)
        parts = SoftCrossEntropy().closed_form(
            a.masked_fill_(empty, 0.0), b.masked_fill_(empty, 0.0), dim, None, teacher
        )
        return ClosedForm(*(None if part is None else part.masked_fill_(empty, 0.0) for part in parts))  # pyright: ignore


@dataclass(frozen=True)
class TargetCrossEntropy(Divergence):
    r""":math:`-q_y \log p_y`, the teacher's confidence in the target as a constant weight: NKD's first term."""

    needs_labels: ClassVar[bool] = True

    @override
    def definition(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None) -> Tensor:
        assert labels is not None
        q_y = _confidence(b, dim, labels)
        return where_positive(q_y, a.logsumexp(dim, keepdim=True) - a.gather(dim, labels)) * q_y

    @override
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        assert labels is not None
        q_y = _confidence(b, dim, labels)
        value = where_positive(q_y, a.logsumexp(dim, keepdim=True) - a.gather(dim, labels)).mul_(q_y)
        gradient = a.softmax(dim).mul_(q_y).scatter_add_(dim, labels, -q_y)
        return ClosedForm(value, gradient, torch.zeros_like(b) if teacher else None)


def _confidence(b: Tensor, dim: int, labels: Tensor) -> Tensor:
    return (b.gather(dim, labels) - b.logsumexp(dim, keepdim=True)).exp().detach()


def _two_point_kl(teacher_odds: Tensor, student_odds: Tensor, finite: bool = False) -> Tensor:
    """Return the KL between two yes-or-no distributions that are given by their log-odds; 0 where both are sure."""
    t, s = teacher_odds, student_odds
    if not finite:
        both_sure = (t == s) & (t.abs() == math.inf)
        t, s = t.masked_fill(both_sure, 0.0), s.masked_fill(both_sure, 0.0)
    q, rest = t.sigmoid(), (-t).sigmoid()
    yes, no = F.logsigmoid(t) - F.logsigmoid(s), F.logsigmoid(-t) - F.logsigmoid(-s)
    if not finite:
        yes, no = where_positive(q, yes), where_positive(rest, no)
    return q * yes + rest * no


def log_sum(logits: Tensor, dim: int) -> Tensor:
    """Return the logsumexp, with gradient 0 where all logits are −inf; torch's own has NaN there."""
    empty = _is_empty(logits, dim)
    return torch.where(empty, -math.inf, logits.masked_fill(empty, 0.0).logsumexp(dim, keepdim=True))


def _is_empty(logits: Tensor, dim: int) -> Tensor:
    """Return the rows without a class: a softmax over nothing but −inf is NaN."""
    return logits.amax(dim, keepdim=True) == -math.inf
