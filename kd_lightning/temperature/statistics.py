"""Statistics that several policies share: over classes, over valid positions, over ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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


def mean_over_valid(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of ``(…, 1)`` values over the valid positions, shape ``(1,)``; 0 where none is valid."""
    if valid is None:
        return values.mean().reshape(1)
    mask = valid.unsqueeze(-1)
    return (torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)).reshape(1)


def median_over_valid(values: Tensor, valid: Tensor | None) -> Tensor:
    """Median (the lower of two middle values) over the valid positions, shape ``(1,)``; inf where none is valid.

    By sorting, since ``torch.nanmedian`` waits for the device.
    """
    if valid is None:
        return values.flatten().median().reshape(1)
    ordered = torch.where(valid.unsqueeze(-1), values, math.inf).flatten().sort().values
    return ordered.gather(0, (valid.sum().reshape(1) - 1).clamp(min=0) // 2)


def sum_and_count(values: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of ``(…,)`` values over the valid positions, and their number, both ``(1,)`` in float32."""
    if valid is None:
        count = torch.full((1,), values.numel(), dtype=torch.float32, device=values.device)
        return values.sum().reshape(1).float(), count
    return torch.where(valid, values, 0.0).sum().reshape(1).float(), valid.sum().reshape(1).float()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum over all processes, or the values themselves where there is one. Every rank must call it."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return values
    values = values.detach().clone()
    distributed.all_reduce(values)
    return values


def class_targets(signals: Signals, policy: str) -> Tensor:
    """Return the targets as class indices, positions to ignore set to 0.

    Raises:
        ValueError: If the batch has no class indices as targets.
    """
    targets = signals.class_targets
    if targets is None:
        received = "none" if signals.targets is None else f"{signals.targets.dtype} {tuple(signals.targets.shape)}"
        raise ValueError(
            f"{policy} reads the label of each position: it needs class indices as targets in the shape "
            f"{tuple(signals.student_logits.shape[:-1])}, got {received}. Pass them, or choose a policy that needs no "
            "labels, such as EntropyTemperature."
        )
    valid = signals.valid
    return targets if valid is None else targets.masked_fill(~valid, 0)


def check_class_count(logits: Tensor, policy: str) -> None:
    """Refuse fewer than three classes.

    Raises:
        ValueError: If the logits have fewer than three classes: with two, standardised logits are always ±0.71.
    """
    if logits.shape[-1] < 3:
        raise ValueError(
            f"{policy} divides by the standard deviation over the classes, which says nothing for fewer than three: "
            f"with two, every sample becomes ±0.71. Got {logits.shape[-1]} classes; use a constant or scheduled T."
        )
