"""What the ranks of a run tell each other where the strategy does not: state, gradients, and their norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from kd_lightning._lightning import accumulates
from kd_lightning.functional.rows import gathered
from kd_lightning.modules.replicas import gather, is_distributed
from kd_lightning.teachers import Teacher


def check_teachers(trainer: Trainer, teacher: Teacher) -> None:
    """Raise if the ranks have different teachers. A collective: every rank must call it.

    Raises:
        RuntimeError: If the teacher's fingerprint differs between ranks.
    """
    fingerprints = gather(trainer, teacher.fingerprint())
    if len(set(fingerprints)) > 1:
        listed = ", ".join(f"rank {rank} {value[:8]}" for rank, value in enumerate(fingerprints))
        raise RuntimeError(
            f"the ranks have different teachers: fingerprints {listed}. A teacher is not synchronised; load it "
            "from a checkpoint (FrozenTeacher(network, checkpoint=...)), the same on every rank."
        )


def check_sharded(student: nn.Module) -> None:
    """Raise if a strategy that reduces the gradients of sharded parameters alone has others to train.

    Raises:
        ValueError: If a parameter of the student is whole on each rank.
    """
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
    return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients if grad is not None]


def clip_gradients(trainer: Trainer, optimizer: Optimizer, most: float | None, by_norm: bool) -> bool:
    """Clip gradients that are sharded over the ranks, and return False where Lightning clips them.

    Args:
        trainer: The trainer of the run.
        optimizer: The optimiser of the parameters.
        most: The greatest norm of all gradients together, or the greatest value; None or 0 for no clipping.
        by_norm: Whether the norm is clipped.
    """
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
