"""Distillation losses between the logits of student and teacher.

They all take ``(student_logits, teacher_logits, temperature)`` and the options of :func:`kd_loss`, which explains them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.functional import divergences
from kd_lightning.functional.divergences import Divergence, ForwardKL, SoftCrossEntropy
from kd_lightning.functional.rows import (
    REDUCTIONS,
    SCALES,
    Reduction,
    Scale,
    check_logits,
    check_num_items,
    check_option,
    in_compute_dtype,
    loss_factor,
    row_loss,
    valid_positions,
    without_padding,
)
from kd_lightning.functional.temperature import Temperature, as_temperature, widened_over

__all__ = [
    "Convention",
    "bernoulli_kd_loss",
    "dist_loss",
    "dkd_loss",
    "jsd_loss",
    "kd_loss",
    "mse_logits_loss",
    "multi_temperature_kd_loss",
    "nkd_loss",
    "reverse_kd_loss",
    "soft_cross_entropy_loss",
    "total_variation_loss",
]

Convention = Literal["hinton", "trl", "modelopt", "torchdistill", "textbrewer"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)


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
    num_items: float | Tensor | None = None,
    convention: Convention | None = None,
    alpha: float | None = None,
    beta: float | None = None,
) -> Tensor:
    r"""Temperature-scaled Kullback-Leibler divergence from the teacher to the student.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} c_i \sum_{k=1}^{C} p_{t,ik} \, (\log p_{t,ik} - \log p_{s,ik})

    with :math:`p_s = \mathrm{softmax}(s / T_s)`, :math:`p_t = \mathrm{softmax}(t / T_t)`, the valid positions
    :math:`V` (those whose target is not ``ignore_index``) and the factor :math:`c_i` that ``scale`` names. With one
    shared temperature and the default scale this is Hinton's :math:`T^2 \, \mathrm{KL}(p_t \| p_s)`. Its gradient is
    :math:`\partial L / \partial s = c_i / T_s \, (p_s - p_t) / |V|`: the factor :math:`T^2` keeps its size while
    :math:`T` changes.

    The logits go to float32 before the division by T (float64 stays), half-precision ones a chunk at a time. Value and
    gradient come from one pass that keeps a single buffer of the logits' size; where a gradient is asked for that this
    pass does not know (of the teacher, of a class-wise temperature, a second derivative, under ``torch.func`` or
    ``torch.compile``) the same equation runs as plain differentiable torch. Equal logits cost exactly 0, with
    exactly no gradient.

    Args:
        student_logits: ``(N, C)``, ``(B, L, C)``, … or ``(N, C, H, W)`` with ``class_dim=1``.
        teacher_logits: The same shape. A class that both sides mask with −inf contributes nothing; a class that only
            the student masks makes the divergence infinite, as it is. In ``(B, L, V)`` surplus classes of the
            teacher are padding of its vocabulary: they are cut, the rest is renormalised, and a warning says so.
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
        num_items: What the mean divides by in place of the valid positions of this batch: under gradient accumulation
            their count over all the batches of a step, so that the sum of the losses is the loss of the whole step.
            Then the trainer must not divide by the number of batches again.
        convention: What another library computes under the name of this loss, to move over without changing results.
            It fixes ``scale``:

            - ``"hinton"``: this loss as it is; mdistiller, timm, DistillKit.
            - ``"trl"``: without T².
            - ``"modelopt"``: with T², and the mean goes over the classes too: C times smaller.
            - ``"torchdistill"``: ``α · CE + β · T² · KL``, ``β = 1 − α`` unless given. Without α or targets the KL
              alone, *without* T².
            - ``"textbrewer"``: the soft cross-entropy :math:`-\sum_k p_t \log p_s`, without T².
        alpha: Weight of the cross-entropy with the targets in the convention ``"torchdistill"``; an error elsewhere.
        beta: Weight of the divergence there.

    Returns:
        A scalar, or with ``reduction="none"`` a tensor in the shape of the logits without the class dimension.

    Raises:
        ValueError: Logits of different or too few dimensions or fewer than two classes; a temperature that is not
            positive and finite or whose shape does not fit; targets of another shape; an unknown option, or one that
            a convention leaves no room for.

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
    check_convention(convention, scale, alpha, beta)
    divergence, scale, per_class = _CONVENTIONS[convention] if convention else (_FORWARD_KL, scale, False)
    with_task = convention == "torchdistill" and bool(alpha) and targets is not None
    if convention == "torchdistill" and not with_task:
        scale = "none"
    if with_task and reduction != "mean":
        raise ValueError(f"convention='torchdistill' is a mean, got reduction={reduction!r}.")
    loss = row_loss(
        divergence,
        student_logits,
        teacher_logits,
        temperature,
        targets=targets,
        scale=scale,
        class_dim=class_dim,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items=num_items,
    )
    if per_class:
        loss = loss / student_logits.shape[class_dim]
    if with_task and alpha is not None and targets is not None:
        task = _cross_entropy(student_logits, targets, class_dim, ignore_index, num_items)
        loss = alpha * task + (1 - alpha if beta is None else beta) * loss
    return loss


class _Convention(NamedTuple):
    divergence: Divergence
    scale: Scale
    per_class: bool


_FORWARD_KL = ForwardKL()
_CONVENTIONS: dict[Convention, _Convention] = {
    "hinton": _Convention(_FORWARD_KL, "student_teacher", per_class=False),
    "trl": _Convention(_FORWARD_KL, "none", per_class=False),
    "modelopt": _Convention(_FORWARD_KL, "student_teacher", per_class=True),
    "torchdistill": _Convention(_FORWARD_KL, "student_teacher", per_class=False),
    "textbrewer": _Convention(SoftCrossEntropy(), "none", per_class=False),
}


def check_convention(convention: Convention | None, scale: Scale, alpha: float | None, beta: float | None) -> None:
    """Refuse a convention that is none, and an option that it leaves no room for."""
    if convention is not None:
        check_option("convention", convention, CONVENTIONS)
        if scale != "student_teacher":
            raise ValueError(f"convention={convention!r} fixes the scale: leave out scale={scale!r}.")
    if convention != "torchdistill" and not (alpha is None and beta is None):
        raise ValueError(
            f"alpha and beta belong to convention='torchdistill', got convention={convention!r}. Weigh the loss where "
            "it is added to the task's: kd_weight and task_weight of the Distiller."
        )


def _cross_entropy(
    logits: Tensor, targets: Tensor, class_dim: int, ignore_index: int | None, num_items: float | Tensor | None
) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).movedim(
        class_dim, 1 if logits.dim() > 1 else 0
    )
    soft = targets.is_floating_point()
    targets = targets.movedim(class_dim, 1) if soft else targets
    ignored = -100 if soft or ignore_index is None else ignore_index
    total = F.cross_entropy(logits, targets, reduction="sum", ignore_index=ignored)
    if num_items is not None:
        return total / num_items
    if soft or ignore_index is None:
        return total / max(logits.numel() // logits.shape[1 if logits.dim() > 1 else 0], 1)
    return total / (targets != ignore_index).sum().clamp(min=1)


def reverse_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor | Temperature,
    *,
    targets: Tensor | None = None,
    scale: Scale = "student_teacher",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Reverse Kullback-Leibler divergence, from the student to the teacher: it seeks a mode where KL covers them all.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} c_i \sum_k p_{s,ik} \, (\log p_{s,ik} - \log p_{t,ik})

    A class that the teacher alone masks with −inf makes it infinite. Arguments and errors: :func:`kd_loss`.

    Source: Y. Gu et al., "MiniLLM", ICLR 2024, arXiv 2306.08543.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> reverse_kd_loss(student, teacher, 2.0)
        tensor(0.5973)
    """
    return row_loss(
        divergences.ReverseKL(),
        student_logits,
        teacher_logits,
        temperature,
        targets=targets,
        scale=scale,
        class_dim=class_dim,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items=num_items,
    )


def jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor | Temperature,
    *,
    beta: float = 0.5,
    targets: Tensor | None = None,
    scale: Scale = "student_teacher",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Generalised Jensen-Shannon divergence: bounded, and symmetric at ``beta=0.5``.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} c_i \, [\beta \, \mathrm{KL}(p_t \| m) + (1 - \beta) \, \mathrm{KL}(p_s \| m)],
        \qquad m = \beta \, p_t + (1 - \beta) \, p_s

    Equal logits cost exactly 0. Other arguments and errors: :func:`kd_loss`.

    Its own arguments:

    - ``beta``: Weight of the teacher, between 0 and 1. At the ends the divergence vanishes; divided by β or 1 − β it
      tends to :func:`kd_loss` at 0 and :func:`reverse_kd_loss` at 1.

    Raises:
        ValueError: ``beta`` is not between 0 and 1.

    Source: R. Agarwal et al., "On-Policy Distillation of Language Models", ICLR 2024, arXiv 2306.13649 (GKD).

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> jsd_loss(student, teacher, 2.0)
        tensor(0.1241)
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"beta must lie between 0 and 1, got {beta}. There the divergence is 0: use kd_loss in place of beta=0, "
            "reverse_kd_loss in place of beta=1."
        )
    return row_loss(
        divergences.JensenShannon(beta),
        student_logits,
        teacher_logits,
        temperature,
        targets=targets,
        scale=scale,
        class_dim=class_dim,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items=num_items,
    )


def total_variation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor | Temperature,
    *,
    targets: Tensor | None = None,
    scale: Scale = "none",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Total variation distance: half the sum of absolute differences of the probabilities, between 0 and 1.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} c_i \, \tfrac{1}{2} \sum_k |p_{t,ik} - p_{s,ik}|

    It is of first order in the difference, so no T² belongs to it: ``scale="none"`` is the default. Arguments and
    errors: :func:`kd_loss`.

    Source: Y. Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation", ACL 2023, arXiv
    2307.15190.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> total_variation_loss(student, teacher, 2.0)
        tensor(0.1929)
    """
    return row_loss(
        divergences.TotalVariation(),
        student_logits,
        teacher_logits,
        temperature,
        targets=targets,
        scale=scale,
        class_dim=class_dim,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items=num_items,
    )


def soft_cross_entropy_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor | Temperature,
    *,
    targets: Tensor | None = None,
    scale: Scale = "student_teacher",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Cross-entropy with the teacher's distribution: KL plus the teacher's entropy.

    .. math::
        L = -\frac{1}{|V|} \sum_{i \in V} c_i \sum_k p_{t,ik} \log p_{s,ik}

    The student's gradient is that of :func:`kd_loss`. The temperature's is not: do not learn a temperature with it,
    since the teacher's entropy grows with T and would push it the wrong way. Arguments and errors: :func:`kd_loss`.

    Source: G. Hinton, O. Vinyals, J. Dean, 2015, arXiv 1503.02531, eq. 2.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> soft_cross_entropy_loss(student, teacher, 2.0, scale="none")
        tensor(0.6985)
    """
    return row_loss(
        divergences.SoftCrossEntropy(),
        student_logits,
        teacher_logits,
        temperature,
        targets=targets,
        scale=scale,
        class_dim=class_dim,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items=num_items,
    )


def mse_logits_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor | Temperature,
    *,
    targets: Tensor | None = None,
    scale: Scale = "student_teacher",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Mean squared difference of the tempered logits, over the classes.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} c_i \, \frac{1}{C} \sum_k (s_{ik} / T_s - t_{ik} / T_t)^2

    With one shared temperature and the default scale, T cancels: the mean squared error of the logits. Up to the rows'
    means it is twice the limit of :func:`kd_loss` for T → ∞. Arguments and errors: :func:`kd_loss`.

    Source: J. Ba, R. Caruana, "Do Deep Nets Really Need to be Deep?", NeurIPS 2014, arXiv 1312.6184.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> mse_logits_loss(student, teacher, 2.0)
        tensor(1.6667)
    """
    return row_loss(
        divergences.SquaredError(),
        student_logits,
        teacher_logits,
        temperature,
        targets=targets,
        scale=scale,
        class_dim=class_dim,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items=num_items,
    )


def bernoulli_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor | Temperature,
    *,
    targets: Tensor | None = None,
    scale: Scale = "student_teacher",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence for multi-label tasks: one yes-or-no distribution per class, by the sigmoid.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} c_i \sum_k \mathrm{KL}(\sigma(t_{ik} / T_t) \| \sigma(s_{ik} / T_s))

    Here a class-wise temperature is natural, and one class is enough. The sum goes over the classes, as everywhere;
    the binary cross-entropy that averages over them is C times smaller. Arguments and errors: :func:`kd_loss`, but
    targets may have the logits' shape, and then leave out single labels where they are ``ignore_index``.

    Source: P. Yang et al., "Multi-Label Knowledge Distillation", ICCV 2023, arXiv 2308.06453, with the temperature of
    Hinton et al.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> bernoulli_kd_loss(student, teacher, 2.0)
        tensor(0.5209)
    """
    if targets is not None and targets.shape == student_logits.shape:
        if ignore_index is not None:  # two equal logits cost nothing, whatever their temperatures
            left_out = targets == ignore_index
            student_logits = student_logits.masked_fill(left_out, 0.0)
            teacher_logits = without_padding(student_logits, teacher_logits, class_dim).masked_fill(left_out, 0.0)
        targets = None
    return row_loss(
        divergences.BernoulliKL(),
        student_logits,
        teacher_logits,
        temperature,
        targets=targets,
        scale=scale,
        class_dim=class_dim,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items=num_items,
    )


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor | Temperature,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    targets: Tensor | None = None,
    scale: Scale = "student_teacher",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Decoupled distillation: the target against the rest, and the rest among themselves, each with its own weight.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} c_i [\alpha \mathrm{KL}(b_t \| b_s) + \beta \mathrm{KL}(\hat p_t \| \hat p_s)]

    with the two-point distribution :math:`b = (p_y, 1 - p_y)` of the target :math:`y`, and the distribution
    :math:`\hat p` over the other classes. The target's column is dropped, not overwritten by a large negative number,
    whose underflow gives a NaN temperature gradient. Arguments and errors: :func:`kd_loss`; targets are needed.

    Its own arguments:

    - ``alpha``: Weight of the target's term.
    - ``beta``: Weight of the others' term. The publication uses 8, or 2 to 6 for close pairs, and 0.5 to 2 on ImageNet.

    Raises:
        ValueError: No targets, or two classes: then the second term is empty.

    Source: B. Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> dkd_loss(student, teacher, 4.0, targets=torch.tensor([2]))
        tensor(4.4695)
    """
    return row_loss(
        divergences.DecoupledKL(alpha, beta),
        student_logits,
        teacher_logits,
        temperature,
        targets=_class_targets("dkd_loss", targets),
        scale=scale,
        class_dim=class_dim,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items=num_items,
    )


def _class_targets(name: str, targets: Tensor | None) -> Tensor:
    if targets is None or targets.is_floating_point():
        received = "none" if targets is None else f"{targets.dtype} ones"
        raise ValueError(
            f"{name} splits off the target class: it needs targets that are class indices, got {received}."
        )
    return targets


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor | Temperature,
    *,
    gamma: float = 1.5,
    targets: Tensor | None = None,
    scale: Scale = "student_teacher",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Normalised distillation: the target at T = 1, and the other classes, normalised among themselves, at T.

    .. math::
        L = -\frac{1}{|V|} \sum_{i \in V} \Bigl[ \mathrm{softmax}(t_i)_y \log \mathrm{softmax}(s_i)_y
            + \gamma \, c_i \sum_{k \ne y} \hat p_{t,ik} \log \hat p_{s,ik} \Bigr]

    Temperature and ``scale`` act on the second term alone. Arguments and errors: :func:`kd_loss`; targets are needed.

    Its own arguments:

    - ``gamma``: Weight of the second term. The publication uses 1.5 at T = 1 on ImageNet, 3.5 at T = 3 on CIFAR-100.

    Raises:
        ValueError: No targets, or two classes: then the second term is empty.

    Source: Z. Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation", ICCV 2023, arXiv 2303.13005.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> nkd_loss(student, teacher, 1.0, targets=torch.tensor([2]))
        tensor(1.7322)
    """
    targets = _class_targets("nkd_loss", targets)

    def term(divergence: Divergence, temperature: float | Tensor | Temperature, scale: Scale) -> Tensor:
        return row_loss(
            divergence,
            student_logits,
            teacher_logits,
            temperature,
            targets=targets,
            scale=scale,
            class_dim=class_dim,
            ignore_index=ignore_index,
            reduction=reduction,
            num_items=num_items,
        )

    others = term(divergences.NonTargetCrossEntropy(), temperature, scale)
    return term(divergences.TargetCrossEntropy(), 1.0, "none") + gamma * others


def multi_temperature_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor | Temperature,
    *,
    factors: Sequence[float] = (0.5, 0.75, 1.0, 1.25, 1.5),
    targets: Tensor | None = None,
    scale: Scale = "student_teacher",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""The mean of :func:`kd_loss` at several multiples of the temperature.

    .. math::
        L = \frac{1}{F} \sum_{f} \mathrm{kd\_loss}(s, t, f \cdot T)

    At T = 4 the default factors give the temperatures 2, 3, 4, 5, 6 of the publication, which takes the sum. A
    ``Temperature.scale`` that is set is in units of T² and so goes with the square of the factor.

    Its own arguments:

    - ``factors``: Multiples of the temperature, positive.

    Raises:
        ValueError: No factors, or one that is not positive and finite.

    Source: Y. Jin, J. Wang, D. Lin, "Multi-Level Logit Distillation", CVPR 2023.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> multi_temperature_kd_loss(student, teacher, 4.0)
        tensor(0.6416)
    """
    if not factors or not all(0 < factor < math.inf for factor in factors):
        raise ValueError(f"factors must be positive and finite, and at least one, got {tuple(factors)}.")
    teacher_logits = without_padding(student_logits, teacher_logits, class_dim)
    student, teacher, own_scale = as_temperature(temperature, student_logits)
    terms = [
        row_loss(
            _FORWARD_KL,
            student_logits,
            teacher_logits,
            Temperature(student * f, teacher * f, None if own_scale is None else own_scale * f * f),
            targets=targets,
            scale=scale,
            class_dim=class_dim,
            ignore_index=ignore_index,
            reduction=reduction,
            num_items=num_items,
        )
        for f in factors
    ]
    return torch.stack(terms).mean(0)


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor | Temperature,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    targets: Tensor | None = None,
    scale: Scale = "none",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""DIST: match the relations between classes, by Pearson's correlation :math:`\rho` along rows and along columns.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} c_i \Bigl[ \beta \, (1 - \rho(p_{s,i\cdot}, p_{t,i\cdot}))
            + \gamma \, \frac{1}{C} \sum_k (1 - \rho(p_{s,\cdot k}, p_{t,\cdot k})) \Bigr]

    The second term correlates each class over all valid positions of the batch; every position carries it. A
    correlation does not shrink with T, so the publication has no T²: ``scale="none"`` is the default. Arguments and
    errors: :func:`kd_loss`.

    Its own arguments:

    - ``beta``: Weight of the correlation between classes, within a row.
    - ``gamma``: Weight of the correlation within a class, over the batch; it needs two valid positions or more.

    Raises:
        ValueError: Fewer than three classes: the correlation of two is always ±1.

    Source: T. Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv 2205.10536.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> dist_loss(student, teacher, 1.0, gamma=0.0)
        tensor(0.0042)
    """
    check_option("scale", scale, SCALES)
    check_option("reduction", reduction, REDUCTIONS)
    check_num_items(num_items, reduction)
    teacher_logits = without_padding(student_logits, teacher_logits, class_dim)
    check_logits(student_logits, teacher_logits, class_dim, min_classes=3)
    temp = in_compute_dtype(as_temperature(temperature, student_logits), student_logits)
    valid = valid_positions(targets, student_logits, class_dim, ignore_index)
    kept = None if valid is None else valid.unsqueeze(class_dim)
    factor = loss_factor(temp, student_logits, scale, class_dim, kept, reduction, num_items)

    if kept is not None:  # a row that is left out may hold anything, NaN included
        student_logits, teacher_logits = student_logits.masked_fill(~kept, 0.0), teacher_logits.masked_fill(~kept, 0.0)
    p_s = widened_over(student_logits, temp.student).softmax(class_dim).movedim(class_dim, -1)
    p_t = widened_over(teacher_logits, temp.teacher).softmax(class_dim).movedim(class_dim, -1)
    weight = torch.ones_like(p_s[..., :1]) if valid is None else valid.unsqueeze(-1).to(p_s.dtype)
    between_classes = _correlation(p_s, p_t, -1)
    columns_s, columns_t = p_s.reshape(-1, p_s.shape[-1]), p_t.reshape(-1, p_t.shape[-1])
    within_classes = _correlation(columns_s, columns_t, 0, weight.reshape(-1, 1))
    value = beta * (1 - between_classes) + gamma * (1 - within_classes).mean()
    loss = value * weight.squeeze(-1) * (factor.squeeze(class_dim) if factor.dim() > 0 else factor)
    return loss if reduction == "none" else loss.sum()


def _correlation(x: Tensor, y: Tensor, dim: int, weight: Tensor | None = None) -> Tensor:
    """Pearson's, along one dimension; a constant correlates with nothing."""
    weight = torch.ones_like(x) if weight is None else weight
    total = weight.sum(dim, keepdim=True).clamp(min=1)
    x = (x - (x * weight).sum(dim, keepdim=True) / total) * weight
    y = (y - (y * weight).sum(dim, keepdim=True) / total) * weight
    norms = torch.linalg.vector_norm(x, dim=dim) * torch.linalg.vector_norm(y, dim=dim)
    return (x * y).sum(dim) / norms.clamp(min=1e-8)
