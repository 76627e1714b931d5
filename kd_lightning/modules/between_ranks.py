"""What the ranks of a run tell each other where the strategy does not: state, gradients, and whether they agree."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from kd_lightning._lightning import accumulates
from kd_lightning.distiller import Distiller
from kd_lightning.functional.rows import gathered, local_part
from kd_lightning.schedules import Progress, weight_at
from kd_lightning.teachers import Teacher


def check_teachers(trainer: Trainer, teacher: Teacher) -> None:
    """Raise if the ranks have different teachers. A collective: every rank must call it."""
    fingerprints = gather(trainer, teacher.fingerprint())
    if len(set(fingerprints)) > 1:
        listed = ", ".join(f"rank {rank} {value[:8]}" for rank, value in enumerate(fingerprints))
        raise RuntimeError(
            f"the ranks have different teachers: fingerprints {listed}. A teacher is not synchronised; load it "
            "from a checkpoint (FrozenTeacher(network, checkpoint=...)), the same on every rank."
        )


def check_sharded(student: nn.Module) -> None:
    """Raise if a strategy that reduces the gradients of sharded parameters alone has others to train."""
    whole = [name for name, p in student.named_parameters() if p.requires_grad and _is_whole(p)]
    if whole and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"ModelParallelStrategy reduces the gradients of sharded parameters alone, but the student has whole "
            f"ones, which would differ between ranks: {', '.join(whole[:5])}{', …' if len(whole) > 5 else ''}. "
            "Take ShardedDistillationModule(blocks=...), or end configure_model with fully_shard(self.student)."
        )


def broadcast(trainer: Trainer, distiller: nn.Module) -> None:
    """Give every rank rank 0's policies, losses and projectors, where the strategy does not. A collective."""
    if is_distributed(trainer):
        for tensor in filter(_is_whole, distiller.state_dict().values()):
            dist.broadcast(tensor, src=0)


def average_gradients(trainer: Trainer, distiller: nn.Module) -> None:
    """Average the gradients of policies, losses and projectors over the ranks, once per optimiser step.

    For strategies that reduce the gradients of the student alone. A collective: every rank must call it.
    """
    if is_distributed(trainer) and not accumulates(trainer):
        for parameter in filter(_is_whole, distiller.parameters()):
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()


def local_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the gradients that there are: this rank's part of a DTensor."""
    gradients = (parameter.grad for parameter in parameters)
    return [local_part(grad) for grad in gradients if grad is not None]


def clip_gradients(trainer: Trainer, optimizer: Optimizer, most: float | None, by_norm: bool) -> bool:
    """Clip gradients that are sharded over the ranks, by their norm or by value; return False where Lightning clips."""
    if most and by_norm and isinstance(trainer.model, FullyShardedDataParallel):
        trainer.model.clip_grad_norm_(most)
        return True
    if not (most and isinstance(trainer.strategy, ModelParallelStrategy)):
        return False
    # some are DTensors and some whole, which torch's functions do not combine
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    kinds = [[p for p in with_gradient if isinstance(p, DTensor) == sharded] for sharded in (True, False)]
    if not by_norm:
        for kind in kinds:
            nn.utils.clip_grad_value_(kind, most)
        return True
    norms = [gathered(nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in kinds if kind]
    total = torch.stack([norm.double() for norm in norms]).square().sum().sqrt()
    for parameter in with_gradient:
        if parameter.grad is not None:
            parameter.grad.mul_((most / (total + 1e-6)).clamp(max=1.0).to(parameter.dtype))
    return True


def _is_whole(tensor: Tensor) -> bool:
    """Return False for a DTensor, whose gradients its own hooks reduce."""
    return not isinstance(tensor, DTensor)


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
    """Return what the ranks of a run must agree on: policies, losses, a checksum of the teacher.

    Without a progress the weights of the losses are left out.
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
