"""Losses on rows whose classes are sharded over ranks, as tensor parallelism leaves the logits of a vocabulary.

Three all-reduces of a few numbers per row, and none of the logits: the largest logits of both sides, their normalisers,
and the sums of the divergence with those that its gradient needs. A learned temperature adds its own gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from typing_extensions import override

from kd_lightning.functional.divergences import ClosedForm, Divergence, SoftCrossEntropy
from kd_lightning.functional.rows import Rows


@dataclass(frozen=True)
class Shards(Divergence):
    """A divergence on rows of which each rank has some classes; its values are equal on all of these ranks."""

    divergence: Divergence
    group: Any
    """The process group of the ranks that share a row."""
    first: int
    """The first class of this rank."""

    @override
    def definition(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None) -> Tensor:
        return _OverShards.apply(self, dim, labels, a, b)  # pyright: ignore[reportReturnType]

    @override
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        peaks = self._reduce(torch.stack([_amax(a, dim), _amax(b, dim)]), dist.ReduceOp.MAX)
        a, b = a - peaks[0], b - peaks[1]
        sums = self._reduce(torch.stack([z.exp().sum(dim, keepdim=True) for z in (a, b)]))
        log_p, log_q = a - sums[0].log(), b - sums[1].log()
        with torch.enable_grad():
            wanted = [log_p.requires_grad_(), *([log_q.requires_grad_()] if teacher else [])]
            terms = self.divergence.per_class(log_p, log_q)
            gradients = torch.autograd.grad(terms, wanted, torch.ones_like(terms))
        parts = [terms.detach(), *gradients]
        value, *totals = self._reduce(torch.stack([part.sum(dim, keepdim=True) for part in parts]))
        through_softmax = [
            gradient - z.detach().exp() * total for gradient, z, total in zip(gradients, wanted, totals, strict=True)
        ]
        return ClosedForm(value, *through_softmax)

    def _reduce(self, values: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        dist.all_reduce(values, op=op, group=self.group)
        return values

    def local(self, rows: Rows, dim: int) -> Rows:
        """Return the rows with this rank's classes of the logits and of temperatures by class."""
        student, teacher = rows.student.to_local(), rows.teacher.to_local()
        t_s, t_t = (self.part(t, dim, student.shape[dim]) for t in rows[2:4])
        return rows._replace(student=student, teacher=teacher, student_temperature=t_s, teacher_temperature=t_t)

    def part(self, value: Any, dim: int, size: int) -> Any:
        """Return this rank's classes of a value that all ranks have, such as a temperature."""
        value = self.summed(value)
        has_classes = isinstance(value, Tensor) and value.dim() and value.shape[dim] > 1
        return value.narrow(dim, self.first, size) if has_classes else value

    def summed(self, value: Any) -> Any:
        """Return a value that all ranks have, whose gradient is the sum of those of their classes."""
        wanted = isinstance(value, Tensor) and value.requires_grad
        return _SummedGradient.apply(value, self.group) if wanted else value


@dataclass(frozen=True)
class LabelShards(Shards):
    """The cross-entropy with labels, on rows of which each rank has some classes, as with a teacher sure of them."""

    @override
    def closed_form(self, a: Tensor, b: Tensor, dim: int, labels: Tensor | None, teacher: bool) -> ClosedForm:
        assert labels is not None
        return super().closed_form(a, one_hot(labels, a, dim, self.first), dim, None, False)


def _amax(z: Tensor, dim: int) -> Tensor:
    """Return the largest logits, −inf on a rank without classes."""
    return z.detach().amax(dim, keepdim=True) if z.shape[dim] else z.detach().sum(dim, keepdim=True) - torch.inf


class _OverShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shards: Shards, dim: int, labels: Any, a: Tensor, b: Tensor) -> Tensor:  # pyright: ignore
        form = shards.closed_form(a, b, dim, labels, ctx.needs_input_grad[4])
        ctx.save_for_backward(form.student if ctx.needs_input_grad[3] else None, form.teacher)
        return form.value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, None, *(None if saved is None else g * saved for saved in ctx.saved_tensors)


class _SummedGradient(torch.autograd.Function):
    """A value that all ranks of a group have, of which each computes its classes' part of the gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        g = g.contiguous()
        dist.all_reduce(g, group=ctx.group)
        return g, None


def as_shards(divergence: Divergence, student: Tensor, teacher: Any, class_dim: int) -> tuple[DTensor, DTensor, Shards]:
    """Return both logits sharded alike, and how.

    A plain tensor beside a DTensor counts as equal on all ranks, so that no logits are sent. Raises if logits are
    not sharded by class, on one mesh and alike, or if the divergence cannot be computed on shards.
    """
    class_dim %= student.dim()
    sharded = [z for z in (student, teacher) if isinstance(z, DTensor)]
    mesh, placements = sharded[0].device_mesh, sharded[0].placements
    if any(z.device_mesh != mesh or z.placements != placements for z in sharded):
        raise ValueError(
            f"student and teacher logits must be sharded alike, on one mesh, got {sharded[0].placements} and "
            f"{sharded[1].placements}. Redistribute one: "
            "teacher_logits.redistribute(student_logits.device_mesh, student_logits.placements)."
        )
    over = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if len(over) != 1 or not placements[over[0]].is_shard(class_dim):
        raise ValueError(
            f"logits that are a DTensor must be sharded by class in one dimension of the mesh, Shard({class_dim}), and "
            f"replicated in others, got {placements}. Give each rank the logits of its own samples, as a plain tensor: "
            "logits.to_local()."
        )
    shape = getattr(teacher, "shape", None)
    if shape != student.shape:
        what = "targets of a few classes" if shape is None else f"logits of shape {tuple(shape)}"
        raise ValueError(
            f"logits that are sharded by class need a teacher's logits of the same shape, {tuple(student.shape)}, got "
            f"{what}. Give the teacher the student's classes, or gather the logits: logits.full_tensor()."
        )
    divergence.per_class(torch.zeros(1), torch.zeros(1))  # raises if the divergence is no such sum
    shards = Shards(divergence, *_group_and_first(mesh, over[0], student.shape[class_dim]))
    return sharded_as(sharded[0], student), sharded_as(sharded[0], teacher), shards


def _group_and_first(mesh: DeviceMesh, dim: int, classes: int) -> tuple[Any, int]:
    """Return the ranks that share a row, and the first class of this one, as torch.chunk cuts."""
    return mesh.get_group(dim), min(-(-classes // mesh.size(dim)) * mesh.get_local_rank(dim), classes)


def shards_of_heads(
    divergence: Divergence, tensors: Sequence[tuple[Tensor | None, int]]
) -> tuple[list[Any], Shards, LabelShards]:
    """Return this rank's classes of the tensors of output layers, and both terms of the fused loss on them.

    Plain tensors beside a DTensor count as equal on all ranks.

    Args:
        divergence: The divergence of whole rows.
        tensors: Weights, biases and logits with their class dimension, one of them a DTensor.

    Raises:
        ValueError: If a DTensor is not sharded by class, or not as the others, if their classes differ in number, or if
            the divergence cannot be computed on shards.
    """
    sharded = [(x, dim) for x, dim in tensors if isinstance(x, DTensor)]
    mesh, placements = sharded[0][0].device_mesh, sharded[0][0].placements
    over = [dim for dim, placement in enumerate(placements) if placement.is_shard(sharded[0][1])]

    def layout(class_dim: int) -> tuple[Any, ...]:
        return tuple(Shard(class_dim) if dim == over[0] else Replicate() for dim in range(mesh.ndim))

    if len(over) != 1 or any(x.device_mesh != mesh or x.placements != layout(dim) for x, dim in sharded):
        raise ValueError(
            "the fused loss takes output layers whose classes are sharded alike in one dimension of one mesh, weights "
            f"and biases with Shard(0), logits by their last, got {', '.join(str(x.placements) for x, _ in sharded)}. "
            "Parallelise both output layers by ColwiseParallel, or give whole tensors: tensor.full_tensor()."
        )
    classes = {x.shape[dim] for x, dim in tensors if x is not None}
    if len(classes) > 1:
        raise ValueError(
            "output layers that are sharded by class must have the same number of classes, got "
            f"{' and '.join(map(str, sorted(classes)))}. Cut the teacher's padding of the vocabulary before it is "
            "sharded."
        )
    divergence.per_class(torch.zeros(1), torch.zeros(1))  # raises if the divergence is no such sum
    where = _group_and_first(mesh, over[0], classes.pop())
    local = [None if x is None else _sharded(x, mesh, layout(dim)).to_local() for x, dim in tensors]
    return local, Shards(divergence, *where), LabelShards(SoftCrossEntropy(), *where)


def sharded_as(like: Tensor, tensor: Tensor) -> Any:
    """Return a tensor that is equal on all ranks in the layout of another, if that is a DTensor. Sends nothing."""
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor):
        return tensor
    return _sharded(tensor, like.device_mesh, like.placements)


def _sharded(tensor: Tensor, mesh: DeviceMesh, placements: Any) -> DTensor:
    if isinstance(tensor, DTensor):
        return tensor
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, placements)


def one_hot_logits(targets: Tensor, like: DTensor, class_dim: int) -> DTensor:
    """Return logits whose softmax is 1 for the target and 0 for other classes, sharded as other logits are."""
    _, _, shards = as_shards(SoftCrossEntropy(), like, like, class_dim)
    values = one_hot(targets.unsqueeze(class_dim), like.to_local(), class_dim, shards.first)
    return DTensor.from_local(
        values, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def one_hot(labels: Tensor, like: Tensor, dim: int, first: int) -> Tensor:
    """Return logits of some classes whose softmax over all is 1 for the label, which has a class dimension of 1."""
    classes = torch.arange(first, first + like.shape[dim], device=labels.device)
    hot = labels == classes.view(-1, *[1] * (-1 - dim if dim < 0 else like.dim() - 1 - dim))
    return torch.zeros_like(like).masked_fill_(~hot, -torch.inf)
