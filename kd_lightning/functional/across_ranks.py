"""Statistics of a batch that is spread over the processes of a run. Every rank must call them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from kd_lightning.functional.temperature import check_values


def several_ranks() -> bool:
    """Return True in a run of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum over all processes, or the values themselves where there is one."""
    if not several_ranks():
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values


def gather_over_ranks(values: Tensor) -> Tensor:
    """Return the samples ``(N, …)`` of all processes, ``(W · N, …)``, or the samples themselves where there is one.

    For a loss that each rank computes of all samples. Its gradient is that of this rank's samples times W, since it is
    averaged over the ranks afterwards: without a collective in backward.

    Raises:
        ValueError: If the ranks have different numbers of samples.
    """
    if not several_ranks():
        return values
    extremes = torch.tensor([len(values), -len(values)], device=values.device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    check_values(
        extremes[0] == -extremes[1],
        "sync=True compares the samples of all ranks, which must have equally many in each step. Give the loader "
        "drop_last=True or a DistributedSampler, or take sync=False.",
    )
    fixed, ranks = values.detach().contiguous(), dist.get_world_size()
    parts = [torch.empty_like(fixed) for _ in range(ranks)]
    dist.all_gather(parts, fixed)
    parts[dist.get_rank()] = fixed + ranks * (values - fixed)  # the same values, gradient times W
    return torch.cat(parts)


def smallest_over_ranks(values: Tensor, counted: Tensor, number: Tensor) -> Tensor:
    """Return the value of a place in the order of all processes' values, by counting digits of 8 bits.

    The ranks may have different numbers of values. Four all-reduces of 2 KB, eight for float64, and no host sync.

    Args:
        values: Any shape; float32 or float64, and other types as float32.
        counted: Which of them count, in the same shape.
        number: The place, from 0, ``()``; the same on all ranks.

    Returns:
        ``()``; without a meaning where no value counts.
    """
    values = values.detach().flatten()
    values = values if values.dtype == torch.float64 else values.float()
    bits = 8 * values.dtype.itemsize
    key = _sortable(values.view(torch.int64 if bits == 64 else torch.int32)).long()
    counted, chosen = counted.flatten(), torch.zeros_like(key[:1]).sum()
    for shift in range(bits - 8, -1, -8):
        digit = key >> shift & 255
        digit = digit ^ 128 if shift == bits - 8 else digit  # because the sign bit orders the other way round
        counts = torch.zeros(256, dtype=torch.int64, device=values.device).scatter_add_(0, digit, counted.long())
        ends = sum_over_ranks(counts).cumsum(0)
        place = (ends <= number).sum().clamp(max=255)
        number = number - torch.where(place > 0, ends[(place - 1).clamp(min=0)], 0)
        counted = counted & (digit == place)
        chosen = chosen << 8 | (place ^ 128 if shift == bits - 8 else place)
    if bits == 32:
        return _sortable(chosen.to(torch.int32)).view(torch.float32)
    return _sortable(chosen).view(torch.float64)


def _sortable(bits: Tensor) -> Tensor:
    """Return integers in the order of the numbers that these are the bits of, and the bits of such integers."""
    largest = torch.iinfo(bits.dtype).max
    return torch.where(bits < 0, bits ^ largest, bits)
