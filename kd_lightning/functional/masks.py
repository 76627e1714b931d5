"""Classes that a network masks: by −inf, or by a large finite number."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd_lightning.functional.temperature import compute_dtype, in_transform

_SENTINEL = -9e3
"""A class with a logit below may be masked: −1e4 is the smallest number that is used, in float16."""


def masked_classes(logits: Tensor, dim: int = -1) -> Tensor:
    """Return where classes are masked: by −inf, or by large finite numbers from −1e4 on.

    A finite logit is a mask if it is below −9,000 and further below the other classes than 100 times their range, since
    a softmax at any temperature up to 100 gives it no probability and no such gap stands within a row of real logits.
    The logits are those before the division by a temperature.

    Example:
        >>> masked_classes(torch.tensor([3.0, 0.0, -1e4, float("-inf")]))
        tensor([False, False,  True,  True])
    """
    logits = logits.detach()
    if _none_is_masked(logits):
        return torch.zeros_like(logits, dtype=torch.bool)
    logits = logits.to(compute_dtype(logits))  # because a gap overflows in float16
    masked = logits == -math.inf
    lowest = logits.masked_fill(masked, math.inf).amin(dim, keepdim=True)
    low = ~masked & (logits <= lowest / 2) & (lowest < _SENTINEL)
    rest = ~(masked | low)
    bottom = logits.masked_fill(~rest, math.inf).amin(dim, keepdim=True)
    top = logits.masked_fill(~rest, -math.inf).amax(dim, keepdim=True)
    gap = bottom - logits.masked_fill(~low, -math.inf).amax(dim, keepdim=True)
    apart = rest.any(dim, keepdim=True) & (gap >= 100 * (top - bottom).clamp(min=1.0))
    return masked | (low & apart)


def _none_is_masked(logits: Tensor) -> bool:
    """Return True if it is known without a host sync that no logit is low enough for a mask."""
    readable = logits.is_cpu and logits.numel() > 0 and not torch.compiler.is_compiling() and not in_transform()
    return readable and logits.amin().item() >= _SENTINEL  # as a tensor, bfloat16 would round the bound


def masked_on_both_sides(student: Tensor, teacher: Tensor, dim: int = -1) -> Tensor | None:
    """Return where classes are masked in both logits, of the same shape; None if it is known that none is."""
    student, teacher = student.detach(), teacher.detach()
    if _none_is_masked(student) or _none_is_masked(teacher):
        return None
    return masked_classes(student, dim) & masked_classes(teacher, dim)
