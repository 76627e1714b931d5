"""Every equation of the library, in plain torch: no state, no Lightning.

Notation used in all docstrings: ``s`` and ``t`` are student and teacher logits, ``T_s`` and ``T_t`` their
temperatures, ``p_s = softmax(s / T_s)``, ``p_t = softmax(t / T_t)``, ``C`` the number of classes.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

__all__ = [
    "Reduction",
    "Scale",
    "Temperature",
    "as_temperature",
    "kd_loss",
    "predictive_entropy",
    "tempered_log_softmax",
    "tempered_softmax",
]

Scale = Literal["student_teacher", "student", "teacher", "none"]
Reduction = Literal["mean", "sum", "none"]


class Temperature(NamedTuple):
    """The temperatures of one loss term.

    Each field is a tensor that has one element, or the rank of the logits with every dimension 1 or full:
    ``()``, ``(1,)``, ``(N, 1)``, ``(1, C)``, ``(N, C)``, ``(B, L, 1)``. Values are positive and finite.

    Attributes:
        student: Divides the student's logits.
        teacher: Divides the teacher's logits.
        scale: Factor of the loss per sample, for a method whose publication fixes it (constant over classes).
            ``None``: the loss applies its own rule, ``T_s · T_t`` by default.

    Example:
        >>> temperature = Temperature(student=torch.tensor(4.0), teacher=torch.tensor(2.0))
        >>> temperature.scale is None
        True
    """

    student: Tensor
    teacher: Tensor
    scale: Tensor | None = None


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor | Temperature,
    *,
    targets: Tensor | None = None,
    scale: Scale = "student_teacher",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Temperature-scaled Kullback-Leibler divergence from the teacher to the student.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} c_i \sum_{k=1}^{C} p_{t,ik} \, (\log p_{t,ik} - \log p_{s,ik})

    with :math:`p_s = \mathrm{softmax}(s / T_s)`, :math:`p_t = \mathrm{softmax}(t / T_t)`, the valid positions
    :math:`V` (those whose target is not ``ignore_index``) and the factor :math:`c_i` that ``scale`` names. With one
    shared temperature and the default scale this is Hinton's :math:`T^2 \, \mathrm{KL}(p_t \| p_s)`. Its gradient is
    :math:`\partial L / \partial s = c_i / T_s \, (p_s - p_t) / |V|`: the factor :math:`T^2` keeps its size while
    :math:`T` changes.

    The logits go to float32 before the division by T (float64 stays), and both distributions stay in log space.

    Args:
        student_logits: ``(N, C)``, ``(B, L, C)``, … or ``(N, C, H, W)`` with ``class_dim=1``.
        teacher_logits: The same shape. A class that both sides mask with −inf contributes nothing; a class that only
            the student masks makes the divergence infinite, as it is.
        temperature: A number, a tensor or a :class:`Temperature`, in the layout of the logits; see there for shapes.
            Positive and finite. Gradients flow to it, through the factor ``c`` too.
        targets: Class indices in the shape of the logits without the class dimension. They only select the valid
            positions. Floating-point targets in the logits' shape (class probabilities) leave nothing out.
        scale: The factor ``c``, per sample, applied after the sum over classes: ``"student_teacher"`` is
            ``T_s · T_t``, ``"student"`` ``T_s²``, ``"teacher"`` ``T_t²``, ``"none"`` 1. For a class-wise temperature it
            is the mean over classes. A ``Temperature.scale`` that is set takes its place.
        class_dim: The dimension of the classes.
        ignore_index: Target value of the positions to leave out; ``None`` keeps all of them.
        reduction: ``"mean"`` over the valid positions, ``"sum"`` over them, or ``"none"``: the loss per position,
            0 where ignored. Without a valid position the mean is 0, with a zero gradient.

    Returns:
        A scalar, or with ``reduction="none"`` a tensor in the shape of the logits without the class dimension.

    Raises:
        ValueError: Logits of different or too few dimensions or fewer than two classes; a temperature that is not
            positive and finite or whose shape does not fit; targets of another shape; an unknown option.

    Source: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.

    Example:
        >>> student = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0, 0.0, 5.0], [0.0, 4.0, 0.0]])
        >>> kd_loss(student, teacher, 4.0)
        tensor(1.2101, grad_fn=...)
        >>> per_sample = torch.tensor([[4.0], [2.0]])  # (N, 1): one temperature per row
        >>> kd_loss(student, teacher, per_sample, reduction="none")
        tensor([1.3047, 0.9412], grad_fn=...)
    """
    _check_option("scale", scale, get_args(Scale))
    _check_option("reduction", reduction, get_args(Reduction))
    _check_logits(student_logits, teacher_logits, class_dim)
    temp = as_temperature(temperature, student_logits)
    valid = _valid_positions(targets, student_logits, class_dim, ignore_index)

    student_logits, teacher_logits = (
        student_logits.movedim(class_dim, -1),
        teacher_logits.movedim(class_dim, -1),
    )
    dtype = _compute_dtype(student_logits)  # a bfloat16 T must not round T², a float64 one not widen the loss
    temp = Temperature(
        _class_last(temp.student, class_dim).to(dtype),
        _class_last(temp.teacher, class_dim).to(dtype),
        None if temp.scale is None else _class_last(temp.scale, class_dim).to(dtype),
    )
    if valid is not None:  # a row that is left out may hold anything, NaN included
        student_logits = student_logits.masked_fill(~valid.unsqueeze(-1), 0.0)
        teacher_logits = teacher_logits.masked_fill(~valid.unsqueeze(-1), 0.0)

    s, t = _tempered(student_logits, temp.student), _tempered(teacher_logits, temp.teacher)
    log_z_s, log_z_t = s.logsumexp(-1), t.logsumexp(-1)
    p_t = (t - log_z_t.unsqueeze(-1)).exp()
    # the normalisers stay outside the sum: then autograd's gradient is p_s − p_t to the last bit, 0 for equal logits
    divergence = (p_t * torch.where(p_t > 0, t - s, 0.0)).sum(-1) - log_z_t + log_z_s  # 0 · (−∞) is 0 by continuity
    return _reduce(divergence * _loss_scale(temp, scale), valid, reduction)


def tempered_log_softmax(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """``log softmax(logits / T)`` over the last dimension, in float32 (float64 stays).

    Finite for every finite logit and ``T`` from 0.05 to 100; a logit of −inf keeps probability 0 and passes no NaN to
    the gradient of the logits or of the temperature.

    Args:
        logits: ``(…, C)``.
        temperature: A positive number or a tensor that broadcasts to the logits.

    Example:
        >>> tempered_log_softmax(torch.tensor([0.0, float("-inf"), 0.0]), 2.0)
        tensor([-0.6931,    -inf, -0.6931])
    """
    return torch.log_softmax(_tempered(logits, temperature), dim=-1)


def tempered_softmax(logits: Tensor, temperature: float | Tensor, *, class_dim: int = -1) -> Tensor:
    r"""Softened probabilities :math:`\mathrm{softmax}(z / T)`.

    ``T → ∞`` gives the uniform distribution, ``T → 0`` all mass on the largest logit.

    Args:
        logits: Any shape with a class dimension.
        temperature: A positive number, or a tensor of one element or of the logits' rank (dimensions 1 or full).
        class_dim: The dimension of the classes.

    Returns:
        Probabilities in the logits' shape, float32 (float64 stays).

    Raises:
        ValueError: The temperature is not positive and finite, or its shape does not fit.

    Example:
        >>> tempered_softmax(torch.tensor([[2.0, 0.0]]), 2.0)
        tensor([[0.7311, 0.2689]])
    """
    t = _class_last(as_temperature(temperature, logits).student, class_dim)
    return tempered_log_softmax(logits.movedim(class_dim, -1), t).exp().movedim(-1, class_dim)


def predictive_entropy(
    logits: Tensor, temperature: float | Tensor = 1.0, *, class_dim: int = -1, normalize: bool = False
) -> Tensor:
    r"""Entropy of the softened distribution, :math:`H = -\sum_k p_k \log p_k` with :math:`p = \mathrm{softmax}(z / T)`.

    Args:
        logits: Any shape with a class dimension.
        temperature: As in :func:`tempered_softmax`.
        class_dim: The dimension of the classes.
        normalize: Divide by ``log C``, so that 0 is certain and 1 uniform.

    Returns:
        Entropy in nats (0 to ``log C``), or normalised (0 to 1), in the logits' shape without the class dimension.

    Raises:
        ValueError: As :func:`tempered_softmax`; or normalising over a single class, whose entropy is always 0.

    Example:
        >>> predictive_entropy(torch.zeros(1, 4))  # uniform over four: log 4
        tensor([1.3863])
        >>> predictive_entropy(torch.zeros(1, 4), normalize=True)
        tensor([1.])
    """
    num_classes = logits.shape[class_dim]
    if normalize and num_classes < 2:
        raise ValueError("predictive_entropy: normalize=True needs at least two classes, got 1.")
    t = _class_last(as_temperature(temperature, logits).student, class_dim)
    log_p = tempered_log_softmax(logits.movedim(class_dim, -1), t)
    p = log_p.exp()
    entropy = -(p * torch.where(p > 0, log_p, 0.0)).sum(-1)
    return entropy / math.log(num_classes) if normalize else entropy


def as_temperature(temperature: float | Tensor | Temperature, logits: Tensor) -> Temperature:
    """Bring a number, a tensor or a :class:`Temperature` to a checked :class:`Temperature` for these logits.

    Shapes are checked on the host. Values are checked on the host where that is free (numbers, CPU tensors) and by an
    asynchronous device assertion elsewhere, so that no training step waits for the device.

    Raises:
        ValueError: The rule that is broken, the value received and the way out.
        TypeError: Anything else than a number, a tensor or a ``Temperature``.

    Example:
        >>> as_temperature(2.0, torch.zeros(4, 3))
        Temperature(student=tensor(2.), teacher=tensor(2.), scale=None)
        >>> as_temperature(torch.ones(4), torch.zeros(4, 3))
        Traceback (most recent call last):
        ...
        ValueError: temperature has shape (4,), which does not fit logits of shape (4, 3): ...
    """
    if isinstance(temperature, Temperature):
        student, teacher, scale = temperature
        return Temperature(
            _check_temperature(student, logits, "student temperature"),
            _check_temperature(teacher, logits, "teacher temperature"),
            None if scale is None else _check_temperature(scale, logits, "scale", minimum_included=True),
        )
    if isinstance(temperature, Tensor):
        shared = _check_temperature(temperature, logits, "temperature")
        return Temperature(shared, shared)
    if isinstance(temperature, (int, float)) and not isinstance(temperature, bool):
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be a positive, finite number, got {temperature}. {_USUAL}")
        shared = torch.full((), float(temperature), dtype=_compute_dtype(logits), device=logits.device)
        return Temperature(shared, shared)
    raise TypeError(
        f"temperature must be a number, a tensor or a Temperature, got {type(temperature).__name__}. A schedule or "
        "policy is called first: policy(Signals(...))."
    )


def _compute_dtype(logits: Tensor) -> torch.dtype:
    """Float32 for everything narrower; float64 stays."""
    return torch.promote_types(logits.dtype, torch.float32)


def _tempered(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """``logits / T``, the logits widened first. A logit of −inf stays and passes no NaN to the temperature."""
    logits = logits.to(_compute_dtype(logits))
    if not isinstance(temperature, Tensor) or not temperature.requires_grad:
        return logits / temperature
    masked = logits == -math.inf  # −inf · 0 in the temperature's gradient would be NaN
    return (logits.masked_fill(masked, 0.0) / temperature).masked_fill(masked, -math.inf)


_USUAL = "Usual values lie between 1 and 20; T = 1 is the plain softmax."


def _check_option(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def _check_logits(student: Tensor, teacher: Tensor, class_dim: int) -> None:
    if student.dim() == 0 or not -student.dim() <= class_dim < student.dim():
        raise ValueError(f"class_dim={class_dim} is not a dimension of student logits of shape {tuple(student.shape)}.")
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher logits must have the same shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}."
            + (
                f" Their class counts differ ({student.shape[class_dim]} and {teacher.shape[class_dim]}): "
                "give both models the same classes."
                if student.dim() == teacher.dim() and student.shape[class_dim] != teacher.shape[class_dim]
                else ""
            )
        )
    if student.shape[class_dim] < 2:
        raise ValueError(
            f"kd_loss needs at least two classes, got logits of shape {tuple(student.shape)} with class_dim={class_dim}"
            ": a softmax over one class is always 1. For one binary logit z use the two logits (0, z)."
        )
    for name, logits in (("student", student), ("teacher", teacher)):
        if not logits.is_floating_point():
            raise ValueError(f"{name} logits must be floating point, got {logits.dtype}.")


def _check_temperature(value: Tensor, logits: Tensor, name: str, minimum_included: bool = False) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}: torch.tensor({value!r}).")
    if value.numel() != 1 and (
        value.dim() != logits.dim()
        or any(have not in (1, full) for have, full in zip(value.shape, logits.shape, strict=True))
    ):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, which does not fit logits of shape {tuple(logits.shape)}: it must "
            "have one element, or the logits' rank with every dimension 1 or full, such as (N, 1) per sample or "
            "(1, C) per class. Add the missing dimension: temperature.unsqueeze(-1) for one value per row."
        )
    if not value.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {value.dtype}.")
    _check_range(value.detach(), name, minimum_included)
    return value


def _check_range(value: Tensor, name: str, minimum_included: bool) -> None:
    if value.device.type == "meta":
        return
    fits = (torch.isfinite(value) & (value >= 0 if minimum_included else value > 0)).all()
    rule = "finite and not negative" if minimum_included else "positive and finite"
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        if not fits:
            low, high = value.min().item(), value.max().item()
            received = f"{low:g}" if value.numel() == 1 else f"values from {low:g} to {high:g}"
            raise ValueError(f"{name} must be {rule}, got {received}. {_USUAL}")
    else:
        torch._assert_async(fits, f"{name} must be {rule}")  # pyright: ignore[reportPrivateImportUsage]


def _class_last(value: Tensor, class_dim: int) -> Tensor:
    """Bring a checked temperature to the class-last layout; a single element fits any layout as a 0-d tensor."""
    return value.reshape(()) if value.numel() == 1 else value.movedim(class_dim, -1)


def _valid_positions(targets: Tensor | None, logits: Tensor, class_dim: int, ignore_index: int | None) -> Tensor | None:
    """A boolean mask of the positions that count, or None where all do."""
    if targets is None:
        return None
    if targets.is_floating_point() and targets.shape == logits.shape:
        return None
    positions = list(logits.shape)
    del positions[class_dim]
    if list(targets.shape) != positions:
        raise ValueError(
            f"targets must have the logits' shape without the class dimension, {tuple(positions)}, got "
            f"{tuple(targets.shape)} for logits of shape {tuple(logits.shape)} with class_dim={class_dim}."
        )
    return None if ignore_index is None else targets != ignore_index


def _loss_scale(temperature: Temperature, rule: Scale) -> Tensor:
    """The factor per position, in the shape of the logits without the (last) class dimension or with one element."""
    student, teacher, scale = temperature
    if scale is None:
        if rule == "none":
            return torch.ones((), dtype=student.dtype, device=student.device)
        scale = {
            "student_teacher": student * teacher,
            "student": student * student,
            "teacher": teacher * teacher,
        }[rule]
    return scale.mean(-1) if scale.dim() > 0 else scale


def _reduce(loss: Tensor, valid: Tensor | None, reduction: Reduction) -> Tensor:
    if valid is not None:
        loss = torch.where(valid, loss, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    count = loss.numel() if valid is None else valid.sum()
    return loss.sum() / (max(count, 1) if isinstance(count, int) else count.clamp(min=1))
