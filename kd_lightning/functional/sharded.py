"""Losses on rows whose classes are sharded over ranks, as tensor parallelism leaves the logits of a vocabulary.

Three all-reduces of a few numbers per row, and none of the logits: the largest logits of both sides, their normalisers,
and the sums of the divergence with those that its gradient needs. A learned temperature adds its own gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Replicate
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
        return _OverShards.apply(self, dim, a, b)  # pyright: ignore[reportReturnType]

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

        def part(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            if t.requires_grad:
                t = _SummedGradient.apply(t, self.group)
            return t.narrow(dim, self.first, student.shape[dim]) if t.dim() and t.shape[dim] > 1 else t  # pyright: ignore

        temperatures = {name: part(getattr(rows, name)) for name in ("student_temperature", "teacher_temperature")}
        return rows._replace(student=student, teacher=teacher, **temperatures)


def _amax(z: Tensor, dim: int) -> Tensor:
    """Return the largest logits, −inf on a rank without classes."""
    return z.detach().amax(dim, keepdim=True) if z.shape[dim] else z.detach().sum(dim, keepdim=True) - torch.inf


class _OverShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shards: Shards, dim: int, a: Tensor, b: Tensor) -> Tensor:  # pyright: ignore
        form = shards.closed_form(a, b, dim, None, ctx.needs_input_grad[3])
        ctx.save_for_backward(form.student if ctx.needs_input_grad[2] else None, form.teacher)
        return form.value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, *(None if saved is None else g * saved for saved in ctx.saved_tensors)


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
    classes, ranks = student.shape[class_dim], mesh.size(over[0])
    first = min(-(-classes // ranks) * mesh.get_local_rank(over[0]), classes)  # as torch.chunk cuts
    shards = Shards(divergence, mesh.get_group(over[0]), first)
    return sharded_as(sharded[0], student), sharded_as(sharded[0], teacher), shards


def sharded_as(like: Tensor, tensor: Tensor) -> Any:
    """Return a tensor that is equal on all ranks in the layout of another, if that is a DTensor. Sends nothing."""
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, like.placements)


def one_hot_logits(targets: Tensor, like: DTensor, class_dim: int) -> DTensor:
    """Return logits whose softmax is 1 for the target and 0 for other classes, sharded as other logits are."""
    _, _, shards = as_shards(SoftCrossEntropy(), like, like, class_dim)
    local = like.to_local()
    size = local.shape[class_dim]
    classes = torch.arange(shards.first, shards.first + size, device=targets.device)
    hot = targets.unsqueeze(-1) == classes
    values = torch.zeros_like(hot, dtype=like.dtype).masked_fill_(~hot, -torch.inf).movedim(-1, class_dim)
    return DTensor.from_local(
        values, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
