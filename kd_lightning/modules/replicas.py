"""The check that what should be equal on every rank is equal."""

from __future__ import annotations

import hashlib
import re
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from kd_lightning.distiller import Distiller
from kd_lightning.functional.rows import gathered
from kd_lightning.schedules import Progress, weight_at

_T = TypeVar("_T")


def is_distributed(trainer: Trainer) -> bool:
    """Return True if the run has several processes and they can communicate."""
    return trainer.world_size > 1 and dist.is_available() and dist.is_initialized()


def gather(trainer: Trainer, value: _T) -> list[_T]:
    """Return each rank's value, in the order of ranks. A collective: every rank must call it."""
    if not is_distributed(trainer):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def distiller_state(distiller: Distiller, progress: Progress | None) -> dict[str, Any]:
    """Return what the ranks of a run must agree on: policies, losses, their weights, and a checksum of the teacher.

    Args:
        distiller: The Distiller of the run.
        progress: Where training stands; None leaves out the weights of the losses.
    """
    state: dict[str, Any] = {
        f"distiller.{prefix}.{name}": tensor
        for prefix, policy in distiller.policies().items()
        for name, tensor in [*policy.named_parameters(), *policy.named_buffers()]
    }
    parts: dict[str, nn.Module] = {**distiller.policies()}
    parts |= {"kd_loss": distiller.kd_loss, "task_loss": distiller.task_loss}
    parts |= {f"layers.{index}": term for index, term in enumerate(distiller.layers)}
    for prefix, part in parts.items():  # without addresses of functions, which differ by process
        state[f"distiller.{prefix}"] = re.sub(r" at 0x[0-9a-f]+", "", repr(part))
    state["distiller.kd_enabled"] = distiller.kd_enabled
    if progress is not None:
        for name in ("kd_weight", "task_weight"):
            state[f"distiller.{name}"] = weight_at(getattr(distiller, name), progress, name)
    networks = () if distiller.teacher is None else distiller.teacher.modules()
    tensors = (tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))
    counted = (x for x in tensors if x.is_floating_point() and x.numel() and not x.is_meta)
    sums = [_checksum(x.detach()) for x in counted]
    if sums:
        state["a checksum of the teacher's weights"] = torch.stack(sums).sum()
    return state


def _checksum(tensor: Tensor) -> Tensor:
    """Return a sum that differs too where rows, or values of a row, have changed places."""
    if isinstance(tensor, DTensor):
        return gathered(tensor.double().sum())
    matrix = (tensor if tensor.dtype.itemsize > 1 else tensor.float()).reshape(len(tensor) if tensor.dim() else 1, -1)
    sums = (matrix.sum(dim, dtype=torch.float64) for dim in (0, 1))
    return sum((x @ torch.arange(1, len(x) + 1, device=x.device, dtype=x.dtype) for x in sums), matrix.new_zeros(()))


def check_replicas(trainer: Trainer, state: dict[str, Any]) -> None:
    """Compare a state between the ranks by its hash. A collective: every rank must call it.

    Parameters of which FSDPStrategy keeps a part on each rank are left out.

    Raises:
        RuntimeError: If the ranks differ; names the values and the ranks.
    """
    model = trainer.model
    parts = {id(p) for p in model.parameters()} if isinstance(model, FullyShardedDataParallel) else set()
    state = {name: value for name, value in state.items() if id(value) not in parts}
    digests = {name: _digest(value) for name, value in state.items()}
    if len(set(gather(trainer, _digest(repr(digests))))) == 1:
        return
    ranks = gather(trainer, {name: (digests[name], _show(value)) for name, value in state.items()})
    names = sorted({name for rank in ranks for name in rank})
    lines = [line for name in names if (line := _difference(name, [rank.get(name) for rank in ranks]))]
    raise RuntimeError(
        f"the ranks differ after step {trainer.global_step}: {'; '.join(lines)}. State that the temperature depends on "
        "must be reduced over ranks before it is kept (torch.distributed.all_reduce), and moved on all of them."
    )


def _digest(value: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    else:
        digest.update(repr(value).encode())
    return digest.hexdigest()


def _show(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{value.item():.9g}" if value.numel() == 1 else f"mean {value.detach().double().mean().item():.9g}"


def _difference(name: str, ranks: list[tuple[str, str] | None]) -> str:
    """``name: rank 0 has 1, ranks 1, 2 have 2``; nothing where all have the same."""
    groups: dict[tuple[str, str] | None, list[int]] = {}
    for rank, value in enumerate(ranks):
        groups.setdefault(value, []).append(rank)
    if len(groups) == 1:
        return ""
    parts = []
    for value, members in groups.items():
        shown = "nothing of this name" if value is None else value[1]
        who = f"rank {members[0]} has" if len(members) == 1 else f"ranks {', '.join(map(str, members))} have"
        parts.append(f"{who} {shown}")
    return f"{name}: {', '.join(parts)}"
