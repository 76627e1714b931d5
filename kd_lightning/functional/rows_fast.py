"""The fast path of the losses on rows: value and gradient in one pass.

One :class:`torch.autograd.Function` walks over the rows in chunks that stay in the cache and writes the gradient
into the buffer that backward returns. It holds one copy of the logits, where autograd over softmax and log-softmax
holds five. Half-precision logits are widened one chunk at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.functional.divergences import Divergence
from kd_lightning.functional.rows import Rows, definition
from kd_lightning.functional.temperature import widened_over

CHUNK_CPU = 2**17
"""Elements of logits per chunk; up to twice as many stay whole. The three to six chunks in use (1.5 to 3 MB in float32)
fit in the cache of a core. ``benchmarks/loss.py --chunks`` compares other sizes."""
CHUNK_ACCELERATOR = 2**22
"""Elements of logits per chunk on an accelerator, which needs larger kernels to be busy: 64 MB of float32 scratch."""


_NO_GRADIENT = Rows(*[False] * 7)


def closed_form_applies(rows: Rows, class_dim: int) -> bool:
    """Return True if the fast path computes every gradient that is asked for."""
    if type(rows.student) not in (Tensor, nn.Parameter):  # a DTensor, say
        return False
    if not torch.is_grad_enabled():
        return True
    return not (
        rows.teacher.requires_grad
        or _learnt_per_class(rows.student_temperature, class_dim)
        or _learnt_per_class(rows.teacher_temperature, class_dim)
    )


def _learnt_per_class(t: Any, class_dim: int) -> bool:
    return isinstance(t, Tensor) and t.requires_grad and t.dim() > 0 and t.shape[class_dim] > 1


def closed_form(divergence: Divergence, class_dim: int, summed: bool, rows: Rows) -> Tensor:
    """Return the loss per position, or its sum, and compute its gradient in the same pass."""
    return _ClosedFormLoss.apply(divergence, class_dim, summed, torch.is_grad_enabled(), *rows)  # pyright: ignore


class _ClosedFormLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, divergence: Divergence, class_dim: int, summed: bool, differentiable: bool, *tensors: Any
    ) -> Tensor:
        rows = Rows(*tensors)
        wanted = Rows(*ctx.needs_input_grad[4:]) if differentiable else _NO_GRADIENT
        parts = _chunks(rows.student, class_dim)
        if len(parts) == 1:
            value, d_student, d_t_s, d_t_t = _with_gradients(divergence, class_dim, rows, wanted)
        else:
            value, d_student, d_t_s, d_t_t = _part_by_part(divergence, class_dim, rows, wanted, parts)
        if rows.valid is not None:
            value, d_t_s, d_t_t = (
                None if x is None else torch.where(rows.valid, x, 0.0) for x in (value, d_t_s, d_t_t)
            )
        ctx.equation, ctx.d_student = (divergence, class_dim, summed), d_student
        ctx.constants = [None if isinstance(x, Tensor) else x for x in tensors]
        saved = [x if isinstance(x, Tensor) else None for x in tensors]
        ctx.save_for_backward(*saved, value if wanted.factor else None, d_t_s, d_t_t)
        loss = value * rows.factor  # pyright: ignore[reportOptionalOperand]
        return loss.sum() if summed else loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (g,) = upstream
        *tensors, value, d_t_s, d_t_t = ctx.saved_tensors
        rows, wanted = Rows(*tensors), Rows(*ctx.needs_input_grad[4:])
        d_student, ctx.d_student = ctx.d_student, None
        if torch.is_grad_enabled() or (wanted.student and d_student is None):
            pairs = zip(rows, ctx.constants, strict=True)
            rows = Rows(*(constant if x is None else x for x, constant in pairs))
            divergence, class_dim, summed = ctx.equation
            loss = lambda *given: definition(divergence, class_dim, summed, Rows(*given))  # noqa: E731
            return None, None, None, None, *gradients_of(loss, rows, wanted, g)
        if d_student is not None:
            d_student = times_upstream(d_student, g).to(rows.student.dtype)
        gradients = Rows(
            student=d_student,
            teacher=None,
            student_temperature=unbroadcast(g, d_t_s, rows.student_temperature),
            teacher_temperature=unbroadcast(g, d_t_t, rows.teacher_temperature),
            factor=unbroadcast(g, value, rows.factor),
            valid=None,
            labels=None,
        )
        return None, None, None, None, *gradients


def _with_gradients(
    divergence: Divergence, class_dim: int, rows: Rows, wanted: Rows, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the divergence of each row, and the gradients of the student's logits, its temperature and the teacher's.

    The gradients are those of the divergence times the factor. ``out`` takes the gradient of the logits.
    """
    student, teacher, t_s, t_t, factor, valid, labels = rows
    a, b = widened_over(student, t_s), widened_over(teacher, t_t)
    form = divergence.closed_form(a, b, class_dim, labels, wanted.teacher_temperature)
    d_student = d_t_s = d_t_t = None
    if wanted.student_temperature:
        d_t_s = (form.student * student).nansum(class_dim, keepdim=True) * (-factor / (t_s * t_s))
    if wanted.teacher_temperature:
        d_t_t = (form.teacher * teacher).nansum(class_dim, keepdim=True) * (-factor / (t_t * t_t))
    if wanted.student:
        if valid is not None:  # because 0 · NaN is NaN
            form.student.masked_fill_(~valid, 0.0)
        if out is None:
            d_student = form.student.mul_(factor / t_s).to(buffer_dtype(student))
        else:
            d_student = torch.mul(form.student, factor / t_s, out=out)
    return form.value, d_student, d_t_s, d_t_t


def _part_by_part(
    divergence: Divergence, class_dim: int, rows: Rows, wanted: Rows, parts: list[Any]
) -> tuple[Tensor | None, ...]:
    """Return the same for logits that are cut into parts."""
    student = rows.student
    d_student = torch.empty_like(student, dtype=buffer_dtype(student)) if wanted.student else None
    found = []
    for part in parts:
        out = None if d_student is None else d_student[part]
        value, _, d_t_s, d_t_t = _with_gradients(
            divergence, class_dim, Rows(*(_take(x, part) for x in rows)), wanted, out
        )
        found.append((value, d_t_s, d_t_t))
    value, d_t_s, d_t_t = (_joined(student, class_dim, parts, values) for values in zip(*found, strict=True))
    return value, d_student, d_t_s, d_t_t


def buffer_dtype(logits: Tensor) -> torch.dtype:
    """Return the dtype of the gradient buffer: float32 for float16, which underflows before a gradient scaler acts."""
    return torch.float32 if logits.dtype == torch.float16 else logits.dtype


def _joined(logits: Tensor, class_dim: int, parts: list[Any], values: tuple[Any, ...]) -> Tensor | None:
    """Return the values of the parts as one tensor over all positions."""
    if values[0] is None:
        return None
    whole = values[0].new_empty([1 if dim == class_dim else size for dim, size in enumerate(logits.shape)])
    for part, value in zip(parts, values, strict=True):
        whole[part] = value
    return whole


def unbroadcast(g: Tensor, per_position: Tensor | None, to: Any) -> Tensor | None:
    """Return the gradient of an input that was broadcast over the positions."""
    return None if per_position is None else (g * per_position).sum_to_size(to.shape)


def gradients_of(
    loss: Callable[..., Tensor], given: Sequence[Any], wanted: Sequence[bool], g: Tensor
) -> list[Tensor | None]:
    """Return the gradients of a loss by autograd, None where a gradient is not wanted.

    Double backward needs it, and so does a second backward through one graph, because the first frees the buffer.
    """
    with torch.enable_grad():
        # as aliases, because the path from the temperatures to the factor belongs to the outer graph
        aliases = [x.view_as(x) if want else x for x, want in zip(given, wanted, strict=True)]
        value = loss(*aliases)
    inputs = [x for x, want in zip(aliases, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(value, inputs, g, create_graph=torch.is_grad_enabled()))
    return [next(found) if want else None for want in wanted]


def times_upstream(gradient: Tensor, g: Tensor) -> Tensor:
    """Multiply a gradient in place by the upstream one, unless that is 1: a third of the time on large CPU logits."""
    is_one = g.is_cpu and g.numel() == 1 and not torch.compiler.is_compiling() and g.item() == 1  # no host sync
    return gradient if is_one else gradient.mul_(g)


def _take(x: Any, part: Any) -> Any:
    """Return the part of a tensor whose dimensions are full or 1."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    return x[tuple(along if size > 1 else slice(None) for along, size in zip(part, x.shape, strict=True))]


def _chunks(logits: Tensor, class_dim: int) -> list[Any]:
    """Return indices that cut the logits into parts of whole rows, each of about one chunk."""
    size = CHUNK_CPU if logits.is_cpu else CHUNK_ACCELERATOR
    elements = logits.numel()
    if elements <= 2 * size:
        return [...]
    cuts = []
    for dim, length in enumerate(logits.shape):
        if dim == class_dim or elements <= size:
            cuts.append([slice(None)])
            continue
        elements //= length  # of one index along this dimension
        count = math.ceil(length * elements / size)
        step = math.ceil(length / count)
        cuts.append([slice(i, i + step) for i in range(0, length, step)])
    return list(itertools.product(*cuts))
