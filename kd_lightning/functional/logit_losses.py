"""Distillation losses between the logits of student and teacher."""

from __future__ import annotations

from torch import Tensor

from kd_lightning.functional.divergences import ForwardKL
from kd_lightning.functional.row_loss import Reduction, Scale, row_loss
from kd_lightning.functional.temperature import Temperature

__all__ = ["kd_loss"]


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
        >>> import torch
        >>> student = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0, 0.0, 5.0], [0.0, 4.0, 0.0]])
        >>> kd_loss(student, teacher, 4.0)
        tensor(1.2101, grad_fn=...)
        >>> per_sample = torch.tensor([[3.0], [2.0]])  # (N, 1): one temperature per row
        >>> kd_loss(student, teacher, per_sample, reduction="none")
        tensor([1.2091, 0.9412], grad_fn=...)
    """
    return row_loss(
        ForwardKL(),
        student_logits,
        teacher_logits,
        temperature,
        targets=targets,
        scale=scale,
        class_dim=class_dim,
        ignore_index=ignore_index,
        reduction=reduction,
    )
