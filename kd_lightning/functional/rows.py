"""From an equation on rows to a loss: layout, masks, scale and reduction in one place, and the fast path.

The fast path is one :class:`torch.autograd.Function`. It walks over the rows in chunks that stay in the cache, and
writes the gradient straight into the buffer that backward returns: beside the logits it holds one copy of them, where
autograd over softmax and log-softmax holds five. Half-precision logits are widened one chunk at a time. Small batches
with constant temperatures, where calls cost more than arithmetic, take a shorter one with nothing beside the equation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from kd_lightning.functional.divergences import Divergence
from kd_lightning.functional.temperature import (
    Temperature,
    as_temperature,
    checked_number,
    compute_dtype,
    in_transform,
    is_number,
    widened_over,
)

__all__ = [
    "REDUCTIONS",
    "SCALES",
    "Reduction",
    "Scale",
    "check_logits",
    "check_num_items",
    "check_option",
    "in_compute_dtype",
    "known_to_be_one",
    "loss_factor",
    "loss_scale",
    "row_loss",
    "valid_positions",
    "without_padding",
]

Scale = Literal["student_teacher", "student", "teacher", "none"]
Reduction = Literal["mean", "sum", "none"]
SCALES: tuple[Scale, ...] = get_args(Scale)
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)

CHUNK_CPU = 2**17
"""Elements of logits per chunk; up to twice as many stay whole. The three to six chunks in use (1.5 to 3 MB in float32)
stay near the core. ``benchmarks/loss.py --chunks``: with less a call takes 1.1 to 2.4 times as long; with 2 to 8 times
as much up to 20 % less at tens of thousands of classes, for as many times the scratch."""
CHUNK_ACCELERATOR = 2**22
"""On an accelerator a kernel must be large enough to fill the device: 64 MB of float32 scratch."""


def row_loss(
    divergence: Divergence,
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor | Temperature,
    *,
    targets: Tensor | None,
    scale: Scale,
    class_dim: int,
    ignore_index: int | None,
    reduction: Reduction,
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Apply a divergence to every row and reduce. The arguments are those of :func:`kd_loss`, all given."""
    check_option("scale", scale, SCALES)
    check_option("reduction", reduction, REDUCTIONS)
    check_num_items(num_items, reduction)
    if teacher_logits.shape != student_logits.shape:
        teacher_logits = without_padding(student_logits, teacher_logits, class_dim)
    check_logits(student_logits, teacher_logits, class_dim, divergence.min_classes)
    class_dim %= student_logits.dim()
    if compute_dtype(student_logits) != compute_dtype(teacher_logits):  # one of them is float64: then both
        student_logits, teacher_logits = student_logits.double(), teacher_logits.double()
    traced = torch.compiler.is_compiling() or in_transform()
    temp = _with_plain_numbers(temperature, student_logits, traced)
    valid = valid_positions(targets, student_logits, class_dim, ignore_index)
    if valid is not None:
        everywhere = valid.is_cpu and not traced and valid.all()  # to look costs nothing on the CPU
        valid = None if everywhere else valid.unsqueeze(class_dim)
    factor = loss_factor(temp, student_logits, scale, class_dim, valid, reduction, num_items)
    labels = _labels(targets, valid, class_dim) if divergence.needs_labels else None

    rows = _Rows(student_logits, teacher_logits, temp.student, temp.teacher, factor, valid, labels)
    fast = not traced and _closed_form_applies(rows, class_dim)
    loss = (_closed_form if fast else _definition)(divergence, class_dim, reduction != "none", rows)
    return loss.squeeze(class_dim) if reduction == "none" else loss


def check_option(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not among the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def check_logits(student: Tensor, teacher: Tensor, class_dim: int, min_classes: int = 2) -> None:
    """Refuse logits that do not belong together."""
    if student.dim() == 0 or not -student.dim() <= class_dim < student.dim():
        raise ValueError(f"class_dim={class_dim} is not a dimension of student logits of shape {tuple(student.shape)}.")
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher logits must have the same shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}."
            + (
                f" Their class counts differ ({student.shape[class_dim]} and {teacher.shape[class_dim]}): "
                "give both models the same classes. If the surplus is padding of a vocabulary, cut it: "
                "teacher_logits[..., :num_classes]."
                if student.dim() == teacher.dim() and student.shape[class_dim] != teacher.shape[class_dim]
                else ""
            )
        )
    if student.shape[class_dim] < min_classes:
        raise ValueError(
            f"this loss needs at least {_count_word(min_classes)} classes, got logits of shape {tuple(student.shape)} "
            f"with class_dim={class_dim}"
            + (
                ": a softmax over one class is always 1. For one binary logit z use the two logits (0, z)."
                if student.shape[class_dim] < 2
                else ": without its target, a row of two classes is one class, and its softmax is always 1."
            )
        )
    for name, logits in (("student", student), ("teacher", teacher)):
        if not logits.is_floating_point():
            raise ValueError(f"{name} logits must be floating point, got {logits.dtype}.")


def without_padding(student: Tensor, teacher: Tensor, class_dim: int = -1) -> Tensor:
    """Cut the surplus columns of a token model's teacher, and say so: vocabularies are padded to different multiples.

    The softmax over what is left is the teacher's distribution renormalised. Only logits of three or more dimensions,
    ``(B, L, V)``, are cut: in ``(N, C)`` a wider teacher is most likely a mistake, and stays one.

    Args:
        student: Student logits.
        teacher: Teacher logits, of the same shape or with more classes.
        class_dim: The dimension of the classes.

    Returns:
        The teacher's logits, as many classes as the student has.

    Example:
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     without_padding(torch.zeros(1, 2, 5), torch.zeros(1, 2, 8)).shape
        torch.Size([1, 2, 5])
    """
    if teacher.shape == student.shape or student.dim() != teacher.dim() or student.dim() < 3:
        return teacher
    if not -student.dim() <= class_dim < student.dim():
        return teacher
    have, want = teacher.shape[class_dim], student.shape[class_dim]
    if have <= want:
        return teacher
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"the teacher has {have} classes, the student {want}: the last {have - want} of the teacher are cut, as "
            "padding of the vocabulary, and its distribution is renormalised. If the classes do not correspond, this "
            "is wrong; if they do, slice the teacher's logits yourself to silence this.",
            stacklevel=4,
        )
    return teacher.narrow(class_dim, 0, want)


def check_num_items(num_items: float | Tensor | None, reduction: Reduction) -> None:
    """Refuse a count that is not one, or that nothing would be divided by."""
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items is what the mean divides by; with reduction={reduction!r} nothing is.")
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be one number, got a tensor of shape {tuple(num_items.shape)}.")
    elif not 0 < num_items < math.inf:
        raise ValueError(f"num_items must be positive and finite, got {num_items}.")


def valid_positions(targets: Tensor | None, logits: Tensor, class_dim: int, ignore_index: int | None) -> Tensor | None:
    """A boolean mask of the positions that count, or None where all do."""
    if targets is None:
        return None
    if targets.is_floating_point() and targets.shape == logits.shape:
        return None
    class_dim %= logits.dim()
    positions = logits.shape[:class_dim] + logits.shape[class_dim + 1 :]
    if targets.shape != positions:
        raise ValueError(
            f"targets must have the logits' shape without the class dimension, {tuple(positions)}, got "
            f"{tuple(targets.shape)} for logits of shape {tuple(logits.shape)} with class_dim={class_dim}."
        )
    return None if ignore_index is None else targets != ignore_index


def _labels(targets: Tensor | None, valid: Tensor | None, class_dim: int) -> Tensor:
    """Class indices with the class dimension kept with size 1; 0 where the position does not count."""
    assert targets is not None
    labels = targets.unsqueeze(class_dim)
    return labels if valid is None else torch.where(valid, labels, 0)


def _count_word(number: int) -> str:
    return {1: "one", 2: "two", 3: "three"}[number]


def in_compute_dtype(temperature: Temperature, logits: Tensor) -> Temperature:
    """A bfloat16 T must not round T², nor a float64 one widen the loss; one element fits any layout as a 0-d tensor."""
    dtype = compute_dtype(logits)

    def convert(value: Tensor) -> Tensor:
        if value.dim() > 0 and value.numel() == 1:
            value = value.reshape(())
        return value if value.dtype == dtype else value.to(dtype)

    student, teacher, scale = temperature
    shared = teacher is student
    student = convert(student)
    return Temperature(student, student if shared else convert(teacher), None if scale is None else convert(scale))


def _with_plain_numbers(temperature: float | Tensor | Temperature, logits: Tensor, traced: bool) -> Temperature:
    """As :func:`in_compute_dtype`, with a Python number in place of every constant of one element.

    It spares the kernel calls on scalars. To look at a value costs nothing on the CPU; elsewhere it would wait for the
    device, and under ``torch.compile`` each value would be a graph of its own.
    """
    if traced:
        return in_compute_dtype(as_temperature(temperature, logits), logits)
    if isinstance(temperature, Tensor) and temperature.is_floating_point() and _is_plain(temperature, logits):
        temperature = temperature.item()
    if is_number(temperature):
        number: Any = checked_number(temperature)
        return Temperature(number, number)
    fields = in_compute_dtype(as_temperature(temperature, logits), logits)
    plain: Any = [x.item() if x is not None and _is_plain(x, logits) else x for x in fields]
    return Temperature(*plain)


def _is_plain(value: Tensor, logits: Tensor) -> bool:
    """Whether it is a constant of one element that can be looked at without a wait."""
    one = value.numel() == 1 and value.is_cpu and logits.is_cpu
    return one and not (value.requires_grad and torch.is_grad_enabled())


def loss_scale(temperature: Temperature, rule: Scale, class_dim: int = -1) -> Tensor:
    """The factor of the loss per position, see ``scale`` in :func:`kd_loss`.

    Args:
        temperature: One whose fields are all of one layout.
        rule: What to take where ``temperature.scale`` is not set.
        class_dim: The dimension of the classes, over which a class-wise factor is averaged.

    Returns:
        A tensor with one element, or in the shape of the temperatures with one class.

    Example:
        >>> loss_scale(Temperature(torch.tensor(2.0), torch.tensor(4.0)), "student_teacher")
        tensor(8.)
    """
    student, teacher, factor = temperature
    factor: Any
    if factor is None and rule == "none":
        factor = student.new_ones(()) if isinstance(student, Tensor) else 1.0
    elif factor is None:
        left = teacher if rule == "teacher" else student
        factor = left * (student if rule == "student" else teacher)
    return factor.mean(class_dim, keepdim=True) if isinstance(factor, Tensor) and factor.dim() > 0 else factor


def loss_factor(
    temperature: Temperature,
    logits: Tensor,
    rule: Scale,
    class_dim: int,
    valid: Tensor | None,
    reduction: Reduction,
    num_items: float | Tensor | None,
) -> Tensor:
    """Scale over count, per position (class dimension of size 1) or one element: what a row is multiplied by."""
    factor = loss_scale(temperature, rule, class_dim)
    if reduction != "mean":
        return factor
    if isinstance(num_items, Tensor):
        return factor / num_items.reshape(()).to(compute_dtype(logits))
    if num_items is not None:
        return factor / num_items
    if valid is None:
        return factor / max(logits.numel() // logits.shape[class_dim], 1)
    return factor / valid.sum().clamp(min=1).to(compute_dtype(logits))


class _Rows(NamedTuple):
    """What a loss is computed from, class dimension kept: the order of the fast path's arguments and gradients.

    Temperatures and factor are tensors, or numbers where they are constants.
    """

    student: Any
    teacher: Any
    student_temperature: Any
    teacher_temperature: Any
    factor: Any
    """Scale over count, per position or one element: the gradient needs it before the sum is there."""
    valid: Any
    labels: Any


def _definition(divergence: Divergence, class_dim: int, summed: bool, rows: _Rows) -> Tensor:
    """The loss per position, or its sum, by autograd: the readable form."""
    student, teacher, valid = rows.student, rows.teacher, rows.valid
    if valid is not None:  # a row that is left out may hold anything, NaN included
        student, teacher = student.masked_fill(~valid, 0.0), teacher.masked_fill(~valid, 0.0)
    a, b = widened_over(student, rows.student_temperature), widened_over(teacher, rows.teacher_temperature)
    value = divergence.definition(a, b, class_dim, rows.labels)
    loss = (value if valid is None else torch.where(valid, value, 0.0)) * rows.factor
    return loss.sum() if summed else loss


def _closed_form_applies(rows: _Rows, class_dim: int) -> bool:
    """Whether the fast path knows every gradient that is asked for."""
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


def _closed_form(divergence: Divergence, class_dim: int, summed: bool, rows: _Rows) -> Tensor:
    """The loss per position, or its sum, its gradient computed on the way: the fast path."""
    numbers = all(type(x) is float for x in (rows.student_temperature, rows.teacher_temperature, rows.factor))
    if summed and numbers and rows.valid is None and rows.student.numel() <= 2 * _chunk_size(rows.student):
        return _SmallLoss.apply(divergence, class_dim, rows, rows.student)  # pyright: ignore[reportReturnType]
    enabled = torch.is_grad_enabled()
    wanted = [enabled and isinstance(x, Tensor) and x.requires_grad for x in rows]
    return _ClosedFormLoss.apply(divergence, class_dim, summed, _Rows(*wanted), *rows)  # pyright: ignore


class _SmallLoss(torch.autograd.Function):
    """The sum over the rows of one chunk, all else constant: of the kernels and checks only those that are needed."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, divergence: Divergence, class_dim: int, rows: _Rows, student: Tensor
    ) -> Tensor:
        _, teacher, t_s, t_t, factor, _, labels = rows
        form = divergence.closed_form(widened_over(student, t_s), widened_over(teacher, t_t), class_dim, labels, False)
        ctx.equation, ctx.constants, ctx.d_student = (divergence, class_dim, True), (t_s, t_t, factor), form.student
        ctx.save_for_backward(student, teacher, labels)
        return form.value.sum().mul_(factor)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (g,) = upstream
        student, teacher, labels = ctx.saved_tensors
        t_s, t_t, factor = ctx.constants
        d_student, ctx.d_student = ctx.d_student, None
        if d_student is None or torch.is_grad_enabled():
            rows = _Rows(student, teacher, t_s, t_t, factor, None, labels)
            d_student, *_ = _gradients_of_definition(ctx.equation, _Rows(True, *[False] * 6), rows, g)
        else:
            d_student = d_student.mul_(_plain(g) * (factor / t_s)).to(student.dtype)
        return None, None, None, d_student


class _ClosedFormLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, divergence: Divergence, class_dim: int, summed: bool, wanted: _Rows, *tensors: Any
    ) -> Tensor:
        everything = _Rows(*tensors)
        student, valid = everything.student, everything.valid
        parts = _chunks(student, class_dim)
        d_student = None
        if wanted.student and len(parts) > 1:
            d_student = torch.empty_like(student, dtype=_buffer_dtype(student))
        per_position: list[tuple[Tensor | None, ...]] = []
        for part in parts:
            s, t, t_s, t_t, c, ok, labels = everything if part is ... else (_take(x, part) for x in everything)
            form = divergence.closed_form(
                widened_over(s, t_s), widened_over(t, t_t), class_dim, labels, wanted.teacher_temperature
            )
            d_t_s = d_t_t = None
            if wanted.student_temperature:
                d_t_s = (form.student * s).nansum(class_dim, keepdim=True) * (-c / (t_s * t_s))
            if wanted.teacher_temperature:
                d_t_t = (form.teacher * t).nansum(class_dim, keepdim=True) * (-c / (t_t * t_t))
            per_position.append((form.value, d_t_s, d_t_t))
            if wanted.student:
                if ok is not None:  # 0 · NaN is NaN
                    form.student.masked_fill_(~ok, 0.0)
                if d_student is None:
                    d_student = form.student.mul_(c / t_s).to(_buffer_dtype(student))
                else:
                    torch.mul(form.student, c / t_s, out=d_student[part])

        value, d_t_s, d_t_t = per_position[0]
        if len(parts) > 1:
            value, d_t_s, d_t_t = (_joined(student, class_dim, parts, x) for x in zip(*per_position, strict=True))
        if valid is not None:
            value, d_t_s, d_t_t = (None if x is None else torch.where(valid, x, 0.0) for x in (value, d_t_s, d_t_t))
        ctx.equation, ctx.wanted, ctx.d_student = (divergence, class_dim, summed), wanted, d_student
        ctx.constants = [None if isinstance(x, Tensor) else x for x in tensors]
        saved = (x if isinstance(x, Tensor) else None for x in tensors)
        ctx.save_for_backward(*saved, value if wanted.factor else None, d_t_s, d_t_t)
        loss = value * everything.factor  # pyright: ignore[reportOptionalOperand]
        return loss.sum() if summed else loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (g,) = upstream
        *tensors, value, d_t_s, d_t_t = ctx.saved_tensors
        everything = _Rows(*tensors)
        d_student, ctx.d_student = ctx.d_student, None
        if torch.is_grad_enabled() or (ctx.wanted.student and d_student is None):
            pairs = zip(everything, ctx.constants, strict=True)
            rows = _Rows(*(constant if x is None else x for x, constant in pairs))
            return None, None, None, None, *_gradients_of_definition(ctx.equation, ctx.wanted, rows, g)
        if d_student is not None:
            if not known_to_be_one(g):
                d_student.mul_(g)
            d_student = d_student.to(everything.student.dtype)
        gradients = _Rows(
            student=d_student,
            teacher=None,
            student_temperature=_summed(g, d_t_s, everything.student_temperature),
            teacher_temperature=_summed(g, d_t_t, everything.teacher_temperature),
            factor=_summed(g, value, everything.factor),
            valid=None,
            labels=None,
        )
        return None, None, None, None, *gradients


def _buffer_dtype(logits: Tensor) -> torch.dtype:
    """That of the logits, but float16 would underflow before a gradient scaler's factor comes in backward."""
    return torch.float32 if logits.dtype == torch.float16 else logits.dtype


def _joined(logits: Tensor, class_dim: int, parts: list[Any], values: tuple[Any, ...]) -> Tensor | None:
    """What was computed for the parts, as one tensor over all positions."""
    if values[0] is None:
        return None
    whole = values[0].new_empty([1 if dim == class_dim else size for dim, size in enumerate(logits.shape)])
    for part, value in zip(parts, values, strict=True):
        whole[part] = value
    return whole


def _summed(g: Tensor, per_position: Tensor | None, to: Any) -> Tensor | None:
    """The gradient of an input that was broadcast over the positions."""
    return None if per_position is None else (g * per_position).sum_to_size(to.shape)


def _gradients_of_definition(
    equation: tuple[Divergence, int, bool], wanted: _Rows, rows: _Rows, g: Tensor
) -> list[Tensor | None]:
    """For double backward, and for a second backward through one graph, whose buffer the first has given away."""
    divergence, class_dim, summed = equation
    with torch.enable_grad():
        # aliases: the factor was computed from the temperatures, and that path is not this function's to differentiate
        rows = _Rows(*(x.view_as(x) if want else x for x, want in zip(rows, wanted, strict=True)))
        loss = _definition(divergence, class_dim, summed, rows)
    inputs = [x for x, want in zip(rows, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(loss, inputs, g, create_graph=torch.is_grad_enabled()))
    return [next(found) if want else None for want in wanted]


def known_to_be_one(g: Tensor) -> bool:
    """Whether the gradient from above is 1, as far as looking at it costs nothing."""
    return not isinstance(g := _plain(g), Tensor) and g == 1


def _plain(g: Tensor) -> Any:
    """The gradient from above as a number, where looking at it costs nothing: on an accelerator it would wait."""
    return g.item() if g.is_cpu and g.numel() == 1 and not torch.compiler.is_compiling() else g


def _take(x: Any, part: Any) -> Any:
    """What belongs to this part of the rows, of a tensor whose dimensions are full or 1."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    return x[tuple(along if size > 1 else slice(None) for along, size in zip(part, x.shape, strict=True))]


def _chunks(logits: Tensor, class_dim: int) -> list[Any]:
    """Indices that cut the logits into parts of whole rows, each about as large as the device likes."""
    size = _chunk_size(logits)
    return [...] if logits.numel() <= 2 * size else list(_cuts(logits.shape, class_dim, 0, logits.numel(), size))


def _chunk_size(logits: Tensor) -> int:
    return CHUNK_CPU if logits.is_cpu else CHUNK_ACCELERATOR


def _cuts(shape: torch.Size, class_dim: int, dim: int, elements: int, size: int) -> Iterator[tuple[slice, ...]]:
    """The indices for the dimensions from ``dim`` on, which hold so many elements."""
    if dim == len(shape):
        yield ()
    elif dim == class_dim:
        for rest in _cuts(shape, class_dim, dim + 1, elements, size):
            yield (slice(None), *rest)
    else:
        elements //= shape[dim]  # of one index along this dimension
        if elements > size:
            for i in range(shape[dim]):
                for rest in _cuts(shape, class_dim, dim + 1, elements, size):
                    yield (slice(i, i + 1), *rest)
        else:
            whole = (slice(None),) * (len(shape) - dim - 1)
            count = math.ceil(shape[dim] * elements / size)
            for i in range(0, shape[dim], step := math.ceil(shape[dim] / count)):
                yield (slice(i, i + step), *whole)
