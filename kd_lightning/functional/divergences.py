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

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

__all__ = ["ClosedForm", "Divergence", "ForwardKL"]


class ClosedForm(NamedTuple):
    """A divergence with its gradient.

    Attributes:
        value: Per row, class dimension kept with size 1.
        student: Gradient with respect to ``a``.
        teacher: Gradient with respect to ``b``; None unless asked for.
    """

    value: Tensor
    student: Tensor
    teacher: Tensor | None = None


class Divergence(ABC):
    """An equation on rows.

    Attributes:
        needs_labels: Whether it looks at the target class.
        min_classes: The fewest classes for which it means something.
    """

    needs_labels: ClassVar[bool] = False
    min_classes: ClassVar[int] = 2

    @abstractmethod
    def definition(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None) -> Tensor:
        """The divergence per row, in differentiable torch.

        Args:
            a: Tempered student logits.
            b: Tempered teacher logits, same shape.
            dim: The class dimension.
            labels: Class indices with the class dimension kept with size 1; None unless ``needs_labels``.

        Returns:
            The shape of the logits, class dimension 1.
        """

    @abstractmethod
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        """Value and gradient. ``a`` and ``b`` are scratch: it may write over them.

        Args:
            a: Tempered student logits.
            b: Tempered teacher logits.
            dim: The class dimension.
            labels: As in :meth:`definition`.
            teacher: Whether the gradient with respect to ``b`` is wanted.
        """


@dataclass(frozen=True)
class ForwardKL(Divergence):
    r""":math:`\mathrm{KL}(q \| p) = \sum_k q_k (\log q_k - \log p_k)`, with gradient :math:`p - q`."""

    @override
    def definition(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None) -> Tensor:
        """With the normalisers outside the sum autograd's gradient is p − q to the last bit: 0 for equal logits."""
        log_z_a, log_z_b = a.logsumexp(dim, keepdim=True), b.logsumexp(dim, keepdim=True)
        q = (b - log_z_b).exp()
        return (q * torch.where(q > 0, b - a, 0.0)).sum(dim, keepdim=True) - log_z_b + log_z_a

    @override
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        p, q = a.softmax(dim), b.softmax(dim)
        log_z_ratio = _log_z_ratio(a, p, b, q, dim)
        difference = b.sub_(a)
        weighted = difference * q if teacher else difference.mul_(q)
        mean = weighted.nansum(dim, keepdim=True)
        teacher_gradient = weighted.nan_to_num_(0.0).sub_(q * mean) if teacher else None
        return ClosedForm(mean + log_z_ratio, p.sub_(q), teacher_gradient)


def _log_z_ratio(a: Tensor, p: Tensor, b: Tensor, q: Tensor, dim: int) -> Tensor:
    """``log Σ exp(a) − log Σ exp(b)`` from the softmaxes: at its peak ``log p = a − log Z``. No second exponential."""
    peaks = a.amax(dim, keepdim=True).sub_(b.amax(dim, keepdim=True))
    return peaks.add_(q.amax(dim, keepdim=True).div_(p.amax(dim, keepdim=True)).log_())
