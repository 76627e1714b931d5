"""Statistics that several policies share: over classes, over valid positions, over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kd_lightning.functional.across_ranks import smallest_over_ranks, sum_over_ranks
from kd_lightning.functional.masks import masked_classes
from kd_lightning.temperature.signals import Signals


def centre(logits: Tensor) -> Tensor:
    """Subtract the mean over the classes (last dimension), in float32 (float64 stays): in float16 the sum overflows.

    Masked classes do not count; −inf stays −inf.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    masked = masked_classes(logits)
    count = (~masked).sum(-1, keepdim=True).clamp(min=1)
    return logits - logits.masked_fill(masked, 0.0).sum(-1, keepdim=True) / count


def standard_deviation(logits: Tensor) -> Tensor:
    """Unbiased standard deviation over the classes, ``(…, 1)``; masked classes do not count.

    For constant logits it is 0 with a zero gradient, where ``torch.std`` has NaN.
    """
    masked = masked_classes(logits)
    deviation = centre(logits).masked_fill(masked, 0.0)
    degrees = ((~masked).sum(-1, keepdim=True) - 1).clamp(min=1)
    variance = deviation.square().sum(-1, keepdim=True) / degrees
    spread = variance > 0
    return torch.where(spread, variance, 1.0).sqrt() * spread


def sum_and_count(values: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of ``(…,)`` values over the valid positions, and their number, both ``(1,)`` in float32 (float64 stays)."""
    mask = torch.ones_like(values, dtype=torch.bool) if valid is None else valid
    dtype = torch.promote_types(values.dtype, torch.float32)  # which holds the count
    return torch.where(mask, values, 0.0).sum().reshape(1).to(dtype), mask.sum().reshape(1).to(dtype)


def mean_over_valid(values: Tensor, valid: Tensor | None, sync: bool = False) -> Tensor:
    """Mean of ``(…, 1)`` values over the valid positions, of all ranks if ``sync``; ``(1,)``, 0 where none is valid."""
    total, count = sum_and_count(values.squeeze(-1), valid)
    if sync:
        total, count = sum_over_ranks(torch.cat([total, count])).split(1)
    return (total / count.clamp(min=1)).to(values.dtype)


def smallest_valid(values: Tensor, valid: Tensor | None, place: Callable[[Tensor], Tensor], sync: bool) -> Tensor:
    """Value at a place in the order of the valid positions, of all ranks if ``sync``, ``(1,)``.

    It is −inf at a place below 0, and inf where none is valid. By sorting, since ``torch.nanmedian`` waits for the
    device.

    Args:
        values: ``(…, 1)``.
        valid: ``(…)``, or None: all.
        place: Function from the number of valid positions to the place, from 0.
        sync: Whether to order the positions of all ranks.
    """
    mask = torch.ones_like(values, dtype=torch.bool) if valid is None else valid.unsqueeze(-1)
    count = sum_over_ranks(mask.sum()) if sync else mask.sum()
    at = place(count)
    if sync:
        found = smallest_over_ranks(values, mask, at.clamp(min=0)).to(values.dtype)
        found = torch.where(count > 0, found, math.inf)
    else:
        ordered = torch.where(mask, values, math.inf).flatten().sort().values
        found = ordered.gather(0, at.clamp(min=0).reshape(1))
    return torch.where(at < 0, -math.inf, found).reshape(1)


def median_over_valid(values: Tensor, valid: Tensor | None, sync: bool = False) -> Tensor:
    """Median (the lower of two middle values) over the valid positions, of all ranks if ``sync``; see above."""
    return smallest_valid(values, valid, lambda count: (count - 1).clamp(min=0) // 2, sync)


def class_targets(signals: Signals, policy: str) -> Tensor:
    """Return the targets as class indices, positions to ignore set to 0.

    Raises:
        ValueError: If the batch has no class indices as targets.
    """
    targets = signals.class_targets
    if targets is None:
        given = signals.targets
        received = "none" if given is None else f"{given.dtype} {tuple(given.shape)}"
        if given is not None and given.dtype == torch.bool:  # such as the attention_mask in the place of labels
            received = "a mask of positions alone"
        raise ValueError(
            f"{policy} reads the label of each position: it needs class indices as targets in the shape "
            f"{tuple(signals.student_logits.shape[:-1])}, got {received}. Pass them, or choose a policy that needs no "
            "labels, such as EntropyTemperature."
        )
    valid = signals.valid
    return targets if valid is None else targets.masked_fill(~valid, 0)


def check_class_count(logits: Tensor, policy: str) -> None:
    """Refuse fewer than three classes."""
    if logits.shape[-1] < 3:
        raise ValueError(
            f"{policy} divides by the standard deviation over the classes, which says nothing for fewer than three: "
            f"with two, every sample becomes ±0.71. Got {logits.shape[-1]} classes; use a constant or scheduled T."
        )
