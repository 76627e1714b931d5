r"""The divergence between two rows of tempered logits, one class per equation.

Each class says the same thing twice. :meth:`~Divergence.definition` is the equation in plain differentiable torch: it
serves double backward, ``torch.func`` and ``torch.compile``, which fuses it into one pass. ``closed_form`` returns the
value together with its gradient, written out by hand: it serves the eager fast path, which never builds a graph. The
tests hold the two to each other and to a third, independent formula.

Here :math:`a = s / T_s` and :math:`b = t / T_t` are already divided, :math:`p = \mathrm{softmax}(a)` is the student and
:math:`q = \mathrm{softmax}(b)` the teacher. A logit of −inf is probability 0 and contributes nothing where both sides
have it: :math:`0 \cdot (−∞ − (−∞)) = 0`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override


class ClosedForm(NamedTuple):
    """A divergence with its gradient.

    Attributes:
        value: Per row, class dimension kept with size 1.
        student: Gradient with respect to ``a``.
        teacher: Gradient with respect to ``b``; None unless asked for. NaN stands for 0 where ``b`` is −inf.
    """

    value: Tensor
    student: Tensor
    teacher: Tensor | None = None


class Divergence(ABC):
    """An equation on rows.

    Attributes:
        needs_labels: Whether it looks at the target class.
        min_classes: The fewest classes for which the equation is defined.
        counts_classes: Whether a class of no probability counts, so that finite masks must be replaced by −inf.
        tails: The tails of :class:`~kd_lightning.functional.Sparse` targets for which it is defined.
    """

    needs_labels: ClassVar[bool] = False
    min_classes: ClassVar[int] = 2
    counts_classes: ClassVar[bool] = False
    tails: ClassVar[tuple[str, ...]] = ()

    def definition(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None) -> Tensor:
        """Return the divergence per row, in differentiable torch. Default: the sum of :meth:`per_class`.

        Args:
            a: Tempered student logits.
            b: Tempered teacher logits, same shape.
            dim: The class dimension.
            labels: Class indices with the class dimension kept with size 1; None unless ``needs_labels``.

        Returns:
            The shape of the logits, class dimension 1.
        """
        return self.per_class(a.log_softmax(dim), b.log_softmax(dim)).sum(dim, keepdim=True)

    @abstractmethod
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        """Return value and gradient. ``a`` and ``b`` are scratch, which the method may overwrite.

        Args:
            a: Tempered student logits.
            b: Tempered teacher logits.
            dim: The class dimension.
            labels: As in :meth:`definition`.
            teacher: True to compute the gradient with respect to ``b``.
        """

    def per_class(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return the terms whose sum over the classes is the divergence, in differentiable torch.

        Args:
            log_p: Student log-probabilities of some classes, normalised over all.
            log_q: The teacher's, same shape.

        Raises:
            ValueError: If the divergence is no such sum, so that classes sharded over ranks cannot be combined.
        """
        raise ValueError(
            f"{type(self).__name__} is no sum over classes of a function of both probabilities, so that it cannot be "
            "computed on logits whose classes are sharded over ranks. Take KDLoss, ReverseKDLoss, JSDLoss, "
            "TotalVariationLoss or SoftCrossEntropyLoss, or gather the logits: logits.full_tensor()."
        )


@dataclass(frozen=True)
class ForwardKL(Divergence):
    r""":math:`\mathrm{KL}(q \| p) = \sum_k q_k (\log q_k - \log p_k)`, with gradient :math:`p - q`."""

    tails: ClassVar[tuple[str, ...]] = ("bucket", "uniform", "renormalize", "drop")

    @override
    def definition(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None) -> Tensor:
        """Return the KL with the normalisers outside the sum, whose gradient is exactly p − q: 0 for equal logits."""
        log_z_a, log_z_b = (z.logsumexp(dim, keepdim=True) for z in (a, b))
        q = (b - log_z_b).exp()
        return (q * where_positive(q, b - a)).sum(dim, keepdim=True) - log_z_b + log_z_a

    @override
    def per_class(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        q = log_q.exp()
        return q * where_positive(q, log_q - log_p)

    @override
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        q, peaks = b.softmax(dim), _peaks(a, b, dim)
        difference = b.sub_(a)
        near_0 = _log_z_ratio_near_0(difference, q, dim) if a.dtype == torch.float64 else None
        weighted = difference * q if teacher else difference.mul_(q)
        mean = weighted.nansum(dim, keepdim=True)
        teacher_gradient = weighted.sub_(q * mean) if teacher else None
        p = torch.softmax(a, dim, out=b)  # in place, because the copies of a chunk decide the fused loss's memory
        log_z_ratio = _log_z_ratio(peaks, p, q, dim)
        if near_0 is not None:  # because at T = 10⁶ the rounding of p and q is 10⁻³ of the divergence
            log_z_ratio = torch.where((near_0 - log_z_ratio).abs() < 1e-12, near_0, log_z_ratio)
        return ClosedForm(log_z_ratio.add_(mean), p.sub_(q), teacher_gradient)


def _peaks(a: Tensor, b: Tensor, dim: int) -> Tensor:
    return a.amax(dim, keepdim=True).sub_(b.amax(dim, keepdim=True))


def _log_z_ratio(peaks: Tensor, p: Tensor, q: Tensor, dim: int) -> Tensor:
    """Return ``log Σ exp(a) − log Σ exp(b)`` without a second exponential: at the peak ``log p = a − log Z``.

    ``peaks`` is the largest ``a`` minus the largest ``b``, and is written over.
    """
    return peaks.add_(q.amax(dim, keepdim=True).div_(p.amax(dim, keepdim=True)).log_())


def _log_z_ratio_near_0(difference: Tensor, q: Tensor, dim: int) -> Tensor:
    """Return the same as ``log Σ q exp(a − b)``, exact near 0; wrong where ``q`` lacks a class that ``p`` has."""
    return difference.neg().expm1_().mul_(q).nansum(dim, keepdim=True).log1p_()


@dataclass(frozen=True)
class ReverseKL(Divergence):
    r""":math:`\mathrm{KL}(p \| q) = \sum_k p_k x_k`, :math:`x = \log p - \log q`; gradient :math:`p (x - KL)`."""

    tails: ClassVar[tuple[str, ...]] = ("bucket", "uniform")

    @override
    def definition(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None) -> Tensor:
        log_z_a, log_z_b = a.logsumexp(dim, keepdim=True), b.logsumexp(dim, keepdim=True)
        p = (a - log_z_a).exp()
        return (p * where_positive(p, a - b)).sum(dim, keepdim=True) - log_z_a + log_z_b

    @override
    def per_class(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        p = log_p.exp()
        return p * where_positive(p, log_p - log_q)

    @override
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        p, q = a.softmax(dim), b.softmax(dim)
        log_z_ratio = _log_z_ratio(_peaks(a, b, dim), p, q, dim)
        weighted = a.sub_(b).mul_(p)
        mean = weighted.nansum(dim, keepdim=True)
        gradient = nan_to_zero(weighted).sub_(p * mean)
        return ClosedForm(mean - log_z_ratio, gradient, q.sub_(p) if teacher else None)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    r""":math:`\beta \mathrm{KL}(q \| m) + (1 - \beta) \mathrm{KL}(p \| m)` with :math:`m = \beta q + (1 - \beta) p`.

    With the ratio :math:`r = q / p` the logarithms are :math:`\log p/m = -\log(1 + \beta (r - 1))` and
    :math:`\log q/m = -\log(1 + (1 - \beta) (1/r - 1))`: exactly 0 where the sides agree.
    """

    beta: float = 0.5
    tails: ClassVar[tuple[str, ...]] = ("bucket", "uniform", "renormalize")

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(
                f"beta must lie between 0 and 1, got {self.beta}. There the divergence is 0: use kd_loss in place of "
                "beta=0, reverse_kd_loss in place of beta=1."
            )

    @override
    def per_class(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        p, q = log_p.exp(), log_q.exp()
        log_r = torch.where((p > 0) | (q > 0), log_q - log_p, 0.0).clamp(-_FAR, _FAR)
        log_p_over_m = -(1 + self.beta * (log_r.exp() - 1)).log()
        of_p, of_q = p * log_p_over_m, q * (log_r + log_p_over_m)
        return (1 - self.beta) * of_p + self.beta * of_q

    @override
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        one, least = a.new_ones(()), torch.finfo(a.dtype).tiny  # no ratio is infinite
        p, q = a.softmax(dim), b.softmax(dim)
        at_least_p, at_least_q = torch.clamp(p, min=least, out=a), torch.clamp(q, min=least, out=b)
        log_m_over_p = torch.lerp(one, at_least_q / at_least_p, self.beta).log_()
        log_m_over_q = torch.lerp(one, at_least_p.div_(at_least_q), 1 - self.beta).log_()
        kl_p = -torch.mul(p, log_m_over_p, out=a).sum(dim, keepdim=True)
        kl_q = -torch.mul(q, log_m_over_q, out=b).sum(dim, keepdim=True)
        return ClosedForm(
            (1 - self.beta) * kl_p + self.beta * kl_q,
            log_m_over_p.add_(kl_p).mul_(p).mul_(self.beta - 1),
            log_m_over_q.add_(kl_q).mul_(q).mul_(-self.beta) if teacher else None,
        )


_FAR = 80.0
"""Two probabilities further apart than e^80 differ by all there is: the smaller one no longer counts in float32."""


@dataclass(frozen=True)
class TotalVariation(Divergence):
    r""":math:`\tfrac{1}{2} \sum_k |q_k - p_k|`: between 0 and 1, and bounded where KL is not."""

    tails: ClassVar[tuple[str, ...]] = ("bucket", "uniform", "renormalize")

    @override
    def per_class(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() - log_q.exp()).abs() / 2

    @override
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        p, q = a.softmax(dim), b.softmax(dim)
        difference = torch.sub(p, q, out=a)
        value = difference.abs().sum(dim, keepdim=True) / 2
        half_sign = difference.sign_().div_(2)
        teacher_gradient = _through_softmax(half_sign, q, dim).neg_() if teacher else None
        return ClosedForm(value, _through_softmax(half_sign, p, dim), teacher_gradient)


def _through_softmax(gradient: Tensor, p: Tensor, dim: int) -> Tensor:
    weighted = gradient * p
    return weighted.sub_(p.mul_(weighted.sum(dim, keepdim=True)))


@dataclass(frozen=True)
class SoftCrossEntropy(Divergence):
    r""":math:`-\sum_k q_k \log p_k = \mathrm{KL}(q \| p) + H(q)`, with the gradient of KL, :math:`p - q`."""

    tails: ClassVar[tuple[str, ...]] = ("bucket", "uniform", "renormalize")

    @override
    def per_class(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        q = log_q.exp()
        return -q * where_positive(q, log_p)

    @override
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        p, q = a.softmax(dim), b.softmax(dim)
        log_z = a.amax(dim, keepdim=True).sub_(p.amax(dim, keepdim=True).log_())
        weighted = a.mul_(q)
        mean = weighted.nansum(dim, keepdim=True)
        teacher_gradient = (q * mean).sub_(weighted) if teacher else None
        return ClosedForm(log_z - mean, p.sub_(q), teacher_gradient)


@dataclass(frozen=True)
class SquaredError(Divergence):
    r""":math:`\tfrac{1}{C} \sum_k (a_k - b_k)^2`: between logits, not distributions; it sees a shift.

    C is the number of classes that are not masked on both sides.
    """

    counts_classes: ClassVar[bool] = True
    min_classes: ClassVar[int] = 1

    @override
    def definition(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None) -> Tensor:
        both_masked = (a == -math.inf) & (b == -math.inf)
        squares = (a.masked_fill(both_masked, 0.0) - b.masked_fill(both_masked, 0.0)).square()
        return squares.sum(dim, keepdim=True) / (~both_masked).sum(dim, keepdim=True).clamp(min=1)

    @override
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        both_masked = (a == -math.inf).logical_and_(b == -math.inf)
        count: Tensor | int = a.shape[dim]
        if not both_masked.is_cpu or both_masked.any():  # without a host sync
            count = (~both_masked).sum(dim, keepdim=True).clamp(min=1).to(a.dtype)
        difference = a.sub_(b).masked_fill_(both_masked, 0.0)
        value = difference.square().sum(dim, keepdim=True) / count
        gradient = difference.mul_(2 / count)
        return ClosedForm(value, gradient, -gradient if teacher else None)


@dataclass(frozen=True)
class BernoulliKL(Divergence):
    r"""One yes-or-no per class, for multi-label tasks: :math:`\sum_k \mathrm{KL}(\sigma(b_k) \| \sigma(a_k))`.

    The gradient is :math:`\sigma(a) - \sigma(b)`.
    """

    min_classes: ClassVar[int] = 1

    @override
    def definition(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None) -> Tensor:
        q = b.sigmoid()
        cross = q * where_positive(q, b - a)
        return (cross + F.logsigmoid(-b) - F.logsigmoid(-a)).sum(dim, keepdim=True)

    @override
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        p, q = a.sigmoid(), b.sigmoid()
        normaliser = F.logsigmoid(-b).sub_(F.logsigmoid(-a))
        cross = nan_to_zero(b.sub_(a).mul_(q))
        value = normaliser.add_(cross).sum(dim, keepdim=True)
        teacher_gradient = cross.mul_(1 - q) if teacher else None
        return ClosedForm(value, p.sub_(q), teacher_gradient)


def check_fusible(divergence: Divergence) -> None:
    """Raise if the divergence looks at the target class."""
    if divergence.needs_labels:
        raise ValueError(
            f"the fused loss takes a divergence that needs no labels, got {divergence!r}: compute that one from logits."
        )


def nan_to_zero(x: Tensor) -> Tensor:
    """Replace the NaN of 0 · ∞ by 0 in place, and keep ∞."""
    return x.nan_to_num_(0.0, math.inf, -math.inf)


def where_positive(probability: Tensor, logits: Tensor) -> Tensor:
    """Return 0 where the probability is 0, because 0 · (±∞) is 0 by continuity and NaN in floating point."""
    return torch.where(probability > 0, logits, 0.0)
