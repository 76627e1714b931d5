"""The way from an equation on rows to a loss: layout, masks, scale, reduction, and the differentiable definition."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from kd_lightning.functional.divergences import Divergence
from kd_lightning.functional.temperature import Temperature, compute_dtype, in_transform, widened_over

Scale = Literal["student_teacher", "student", "teacher", "none"]
Reduction = Literal["mean", "sum", "none"]
SCALES: tuple[Scale, ...] = get_args(Scale)
Target = TypeVar("Target")
"""Logits of a teacher, or targets of a few classes."""
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


def check_option(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise if the value is not among the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def is_sharded(*logits: Any) -> bool:
    """Return True if a tensor is a DTensor, told without an import of the module, which is slow."""
    return any(hasattr(z, "device_mesh") for z in logits)


def check_whole(name: str, *tensors: Any) -> None:
    """Raise if a loss that needs whole rows is given a DTensor."""
    if is_sharded(*tensors):
        raise ValueError(
            f"{name} takes plain tensors, got a DTensor, whose classes may be sharded over ranks. Give whole tensors, "
            "tensor.full_tensor(), or take kd_loss, which needs no more than sums over the ranks."
        )


def plain(logits: Target) -> Target:
    """Return a DTensor that is replicated as the tensor that each rank has, and others as they are.

    Its gradient is equal on all ranks.
    """
    given: Any = logits
    if is_sharded(given) and all(placement.is_replicate() for placement in given.placements):
        return given.to_local(grad_placements=given.placements)
    return logits


def local_part(tensor: Target) -> Target:
    """Return the part of a DTensor that this rank has, and others as they are."""
    given: Any = tensor
    return given.to_local() if is_sharded(given) else tensor


def gathered(tensor: Target) -> Target:
    """Return a DTensor as the whole tensor, on the device of its ranks, and others as they are. A collective."""
    given: Any = tensor
    return given.to(given.device_mesh.device_type).full_tensor() if is_sharded(given) else tensor


def check_layout(logits: Tensor, class_dim: int, targets: Tensor | None = None) -> None:
    """Raise if the logits lack ``class_dim``, or fit two layouts.

    The last dimension, ``class_dim=-1``, is a default that nobody may have meant; ``class_dim=2`` was meant.
    """
    shape = tuple(logits.shape)
    if logits.dim() == 0 or not -logits.dim() <= class_dim < logits.dim():
        raise ValueError(f"class_dim={class_dim} is not a dimension of student logits of shape {shape}.")
    if logits.dim() > 3 and class_dim == -1:
        raise ValueError(
            f"logits of shape {shape} do not tell their class dimension, and class_dim=-1 is the width "
            f"of an image. Give class_dim=1 for (N, C, H, W), or class_dim={logits.dim() - 1} if the classes are last."
        )
    if class_dim == -1 and logits.dim() == 3 and targets is not None and logits.shape[1] == logits.shape[2]:
        raise ValueError(
            f"logits of shape {shape} and targets of shape {tuple(targets.shape)} fit (B, C, L) and "
            "(B, L, C) alike. Give class_dim=1 or class_dim=2 to the loss."
        )


def check_labels(targets: Tensor | None, logits: Tensor, class_dim: int, ignore_index: int | None) -> bool:
    """Raise if targets that are class indices do not fit the logits. Values are read on the CPU alone.

    Returns True if every target is known to be a class.
    """
    if targets is None or targets.dtype == torch.bool or targets.is_floating_point():
        return False
    if targets.dim() != logits.dim() - 1 or torch.compiler.is_compiling() or in_transform():
        return False
    _check_positions(targets, logits, class_dim)
    classes = logits.shape[class_dim]
    if not targets.is_cpu or not targets.numel() or classes < 2:
        return False
    low, high = (int(x) for x in targets.aminmax())
    if low >= 0 and high < classes:
        return True
    wrong = targets[(targets < 0) | (targets >= classes)]
    wrong = wrong if ignore_index is None else wrong[wrong != ignore_index]
    if len(wrong):
        raise ValueError(
            f"targets must be class indices from 0 to {classes - 1}"
            + ("" if ignore_index is None else f", or ignore_index={ignore_index} where there is no label")
            + f", got {int(wrong[0])}. Return such targets from unpack_batch(batch), or give the losses the "
            "ignore_index of the data."
        )
    return False


def check_logits(
    student: Tensor, teacher: Tensor, class_dim: int, min_classes: int = 2, targets: Tensor | None = None
) -> None:
    """Raise if the logits differ in shape, have too few classes, are no floats, or :func:`check_layout` raises."""
    check_layout(student, class_dim, targets)
    if not isinstance(teacher, Tensor):
        raise TypeError(
            f"this loss needs the logits of all classes, got {type(teacher).__name__}. Take a loss that compares "
            "distributions, such as KDLoss."
        )
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
        fewest = {1: "one", 2: "two", 3: "three"}[min_classes]
        raise ValueError(
            f"this loss needs at least {fewest} classes, got logits of shape {tuple(student.shape)} "
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


def without_padding(student: Tensor, teacher: Target, class_dim: int = -1) -> Target:
    """Cut the classes by which a token model's teacher exceeds the student, and warn.

    Vocabularies are padded to different multiples, so that the surplus classes are padding. The softmax over the rest
    is the teacher's distribution renormalised. Only logits ``(B, L, V)`` are cut: in ``(N, C)`` a wider teacher is most
    likely a mistake, which :func:`check_logits` reports.
    """
    if not isinstance(teacher, Tensor) or teacher.shape == student.shape:
        return teacher
    if student.dim() != teacher.dim() or student.dim() < 3:
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
    cut: Any = teacher.narrow(class_dim, 0, want)
    return cut


def check_options(scale: Scale, reduction: Reduction, num_items: float | Tensor | None) -> None:
    """Raise if an option is unknown, or if ``num_items`` is not one positive number to divide a mean by."""
    check_option("scale", scale, SCALES)
    check_option("reduction", reduction, REDUCTIONS)
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
    """Return a boolean mask of the positions that count, or None if all do.

    Boolean targets are the mask themselves; positions whose class index is ``ignore_index`` do not count.
    """
    if targets is None:
        return None
    if targets.is_floating_point() and targets.shape == logits.shape:
        return None
    _check_positions(targets, logits, class_dim)
    if targets.dtype == torch.bool:
        return targets
    return None if ignore_index is None else targets != ignore_index


def _check_positions(targets: Tensor, logits: Tensor, class_dim: int) -> None:
    class_dim %= logits.dim()
    positions = logits.shape[:class_dim] + logits.shape[class_dim + 1 :]
    if targets.shape != positions:
        without_dim_1 = logits.shape[:1] + logits.shape[2:]
        raise ValueError(
            f"targets must have the logits' shape without the class dimension, {tuple(positions)}, got "
            f"{tuple(targets.shape)} for logits of shape {tuple(logits.shape)} with class_dim={class_dim}."
            + (" Give the loss class_dim=1." if logits.dim() > 2 and targets.shape == without_dim_1 else "")
        )


def labels_of(targets: Tensor | None, valid: Tensor | None, class_dim: int) -> Tensor:
    """Return class indices with a class dimension of size 1; 0 where the position is masked."""
    assert targets is not None
    labels = targets.unsqueeze(class_dim)
    return labels if valid is None else torch.where(valid, labels, 0)


def in_compute_dtype(temperature: Temperature, logits: Tensor) -> Temperature:
    """Return the temperature in the dtype of the computation, a single element as a 0-d tensor, which fits any layout.

    A bfloat16 temperature would round T², and a float64 temperature would widen the loss.
    """
    dtype = compute_dtype(logits)

    def convert(value: Tensor) -> Tensor:
        if value.dim() > 0 and value.numel() == 1:
            value = value.reshape(())
        return value if value.dtype == dtype else value.to(dtype)

    student, teacher, scale = temperature
    shared = teacher is student
    student = convert(student)
    return Temperature(student, student if shared else convert(teacher), None if scale is None else convert(scale))


def loss_scale(temperature: Temperature, rule: Scale, class_dim: int = -1) -> Tensor:
    """Return the factor of the loss per position; see ``scale`` in :func:`kd_loss`.

    A class-wise factor is averaged over the classes.

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
    """Return the factor of each row, scale over count: per position (class dimension of size 1) or one element."""
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


class Rows(NamedTuple):
    """Arguments of a loss on rows, class dimension kept, in the order of the fast path's gradients.

    Temperatures and factor are tensors, or numbers where they are constants.
    """

    student: Any
    teacher: Any
    student_temperature: Any
    teacher_temperature: Any
    factor: Any
    """Scale over count, per position or one element. The gradient is computed before the sum, and needs it."""
    valid: Any
    labels: Any


def definition(divergence: Divergence, class_dim: int, summed: bool, rows: Rows) -> Tensor:
    """Return the loss per position, or its sum, in differentiable torch."""
    student, teacher, valid = rows.student, rows.teacher, rows.valid
    if valid is not None:  # because a masked row may hold NaN, and 0 · NaN is NaN
        student, teacher = student.masked_fill(~valid, 0.0), teacher.masked_fill(~valid, 0.0)
    a, b = widened_over(student, rows.student_temperature), widened_over(teacher, rows.teacher_temperature)
    value = divergence.definition(a, b, class_dim, rows.labels)
    loss = (value if valid is None else torch.where(valid, value, 0.0)) * rows.factor
    return loss.sum() if summed else loss
