"""The one call behind every loss on rows, and the options that all losses between logits take."""

from __future__ import annotations

import math
from typing import Any, TypedDict

import torch
from torch import Tensor

from kd_lightning.functional.divergences import Divergence
from kd_lightning.functional.masks import masked_on_both_sides
from kd_lightning.functional.rows import (
    Reduction,
    Rows,
    Scale,
    check_labels,
    check_layout,
    check_logits,
    check_options,
    definition,
    in_compute_dtype,
    is_sharded,
    labels_of,
    loss_factor,
    plain,
    valid_positions,
    without_padding,
)
from kd_lightning.functional.rows_fast import closed_form, closed_form_applies
from kd_lightning.functional.sparse import Sparse, TeacherTarget, check_tail, sparse_rows
from kd_lightning.functional.temperature import (
    Temperature,
    as_temperature,
    checked_number,
    compute_dtype,
    in_transform,
    is_number,
)

CLASS_DIM = -1
"""The dimension of the classes unless the caller names another."""
IGNORE_INDEX = -100
"""The target value of the positions to leave out unless the caller names another."""


class LayoutOptions(TypedDict, total=False):
    """Keywords that function and module of a loss share, with the defaults of :func:`row_loss`."""

    class_dim: int
    ignore_index: int | None
    reduction: Reduction


class UnscaledOptions(LayoutOptions, total=False):
    """Keywords of a loss whose scale is fixed."""

    targets: Tensor | None
    num_items: float | Tensor | None


class LossOptions(UnscaledOptions, total=False):
    """Keywords of every loss between logits; :func:`kd_loss` explains them."""

    scale: Scale


def row_loss(
    divergence: Divergence,
    student_logits: Tensor,
    teacher_logits: TeacherTarget,
    temperature: float | Tensor | Temperature,
    *,
    targets: Tensor | None = None,
    scale: Scale = "student_teacher",
    class_dim: int = CLASS_DIM,
    ignore_index: int | None = IGNORE_INDEX,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    **unknown: Any,
) -> Tensor:
    """Apply a divergence to every row and reduce. The options are those of :func:`kd_loss`.

    Raises:
        TypeError: If an option has an unknown name.
    """
    if unknown:
        raise TypeError(
            f"a loss between logits got an unexpected keyword argument {next(iter(unknown))!r}: its options are "
            f"{', '.join(sorted(LossOptions.__optional_keys__))}. A mask of the positions that count goes to targets, "
            "as a boolean tensor."
        )
    check_options(scale, reduction, num_items)
    traced = torch.compiler.is_compiling() or in_transform()
    shards = None
    if is_sharded(student_logits, teacher_logits):
        student_logits, teacher_logits = plain(student_logits), plain(teacher_logits)
    if is_sharded(student_logits, teacher_logits):
        from kd_lightning.functional.sharded import as_shards  # because DTensor is slow to import

        check_layout(student_logits, class_dim, targets)
        student_logits, teacher_logits, shards = as_shards(divergence, student_logits, teacher_logits, class_dim)
    if isinstance(teacher_logits, Sparse):
        check_tail(divergence, teacher_logits)
        check_logits(student_logits, student_logits, class_dim, divergence.min_classes, targets)
    else:
        teacher_logits = without_padding(student_logits, teacher_logits, class_dim)
        check_logits(student_logits, teacher_logits, class_dim, divergence.min_classes, targets)
        if divergence.counts_classes:
            masked = masked_on_both_sides(student_logits, teacher_logits, class_dim)
            if masked is not None:
                student_logits = student_logits.masked_fill(masked, -math.inf)
                teacher_logits = teacher_logits.masked_fill(masked, -math.inf)
        if compute_dtype(student_logits) != compute_dtype(teacher_logits):  # as float64 on one side widens both
            student_logits, teacher_logits = student_logits.double(), teacher_logits.double()
    class_dim %= student_logits.dim()
    temp, dtype = _with_plain_numbers(temperature, student_logits, traced), compute_dtype(student_logits)
    if isinstance(teacher_logits, Tensor) and not traced and _loses_digits(temp, student_logits):
        student_logits, teacher_logits = student_logits.double(), teacher_logits.double()
        temp = _with_plain_numbers(temperature, student_logits, traced)
    if divergence.needs_labels or ignore_index is not None:  # else the targets are not read
        all_are_classes = check_labels(targets, student_logits, class_dim, ignore_index)
        if all_are_classes and ignore_index is not None and ignore_index < 0:
            ignore_index = None  # because no target is it
    valid = valid_positions(targets, student_logits, class_dim, ignore_index)
    if valid is not None:
        everywhere = valid.is_cpu and not traced and valid.all()  # without a host sync, because the mask is on the CPU
        valid = None if everywhere else valid.unsqueeze(class_dim)
    factor = loss_factor(temp, student_logits, scale, class_dim, valid, reduction, num_items)
    if isinstance(teacher_logits, Sparse):
        divergence, teacher_logits, labels = sparse_rows(
            divergence, student_logits, teacher_logits, temp, valid, class_dim
        )
    else:
        labels = labels_of(targets, valid, class_dim) if divergence.needs_labels else None

    rows = Rows(student_logits, teacher_logits, temp.student, temp.teacher, factor, valid, labels)
    if shards is not None:
        divergence, rows = shards, shards.local(rows, class_dim)
    fast = shards is None and not traced and closed_form_applies(rows, class_dim)
    loss = (closed_form if fast else definition)(divergence, class_dim, reduction != "none", rows)
    return (loss.squeeze(class_dim) if reduction == "none" else loss).to(dtype)


def _with_plain_numbers(temperature: float | Tensor | Temperature, logits: Tensor, traced: bool) -> Temperature:
    """Return :func:`in_compute_dtype` of the temperature, with a Python number for every constant of one element.

    Numbers spare the kernels on scalars. Only CPU tensors are read: on an accelerator ``item()`` is a host sync, and
    under ``torch.compile`` each value would compile a graph of its own.
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


_FLOAT32_FROM, _FLOAT32_TO = 0.5, 10.0
"""The temperatures for which float32 does: above, a divergence of order 1/T² is what is left of terms of order 1, below
it is left of terms of order 1/T."""


def _loses_digits(temperature: Temperature, logits: Tensor) -> bool:
    """Return True if a temperature asks for more than float32, where it is known without a host sync."""
    outside = any(
        not _FLOAT32_FROM <= t <= _FLOAT32_TO
        if not isinstance(t, Tensor)
        else t.is_cpu and bool(((t.detach() < _FLOAT32_FROM) | (t.detach() > _FLOAT32_TO)).any())
        for t in temperature[:2]
    )
    return outside and logits.dtype != torch.float64 and logits.device.type not in ("mps", "meta")


def _is_plain(value: Tensor, logits: Tensor) -> bool:
    """Return True if the value is a constant of one element that is read without a host sync."""
    one = value.numel() == 1 and value.is_cpu and logits.is_cpu
    return one and not (value.requires_grad and torch.is_grad_enabled())
