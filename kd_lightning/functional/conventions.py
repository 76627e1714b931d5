r"""The distillation losses of other libraries under their conventions, to move over without changing results.

Each function takes the arguments of :func:`kd_loss` except ``scale``, which the convention fixes. Users choose one by
``KDLoss(convention=…)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from kd_lightning.functional.logit_losses import kd_loss, soft_cross_entropy_loss
from kd_lightning.functional.row_loss import CLASS_DIM, IGNORE_INDEX, UnscaledOptions
from kd_lightning.functional.rows import Scale, check_option
from kd_lightning.functional.sparse import TeacherTarget
from kd_lightning.functional.temperature import Temperature, check_weights, compute_dtype

Convention = Literal["hinton", "trl", "modelopt", "torchdistill", "textbrewer"]


def hinton_kd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherTarget,
    temperature: float | Tensor | Temperature,
    **options: Unpack[UnscaledOptions],
) -> Tensor:
    """Return :func:`kd_loss` with T²: mdistiller, timm, DistillKit."""
    return kd_loss(student_logits, teacher_logits, temperature, scale="student_teacher", **options)


def trl_kd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherTarget,
    temperature: float | Tensor | Temperature,
    **options: Unpack[UnscaledOptions],
) -> Tensor:
    """Return :func:`kd_loss` without T²: TRL."""
    return kd_loss(student_logits, teacher_logits, temperature, scale="none", **options)


def modelopt_kd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherTarget,
    temperature: float | Tensor | Temperature,
    **options: Unpack[UnscaledOptions],
) -> Tensor:
    """Return :func:`kd_loss` with T², averaged over the classes too and so C times smaller: NVIDIA ModelOpt."""
    loss = kd_loss(student_logits, teacher_logits, temperature, scale="student_teacher", **options)
    return loss / student_logits.shape[options.get("class_dim", CLASS_DIM)]


def textbrewer_kd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherTarget,
    temperature: float | Tensor | Temperature,
    **options: Unpack[UnscaledOptions],
) -> Tensor:
    r"""Return the soft cross-entropy :math:`-\sum_k p_t \log p_s` without T²: TextBrewer."""
    return soft_cross_entropy_loss(student_logits, teacher_logits, temperature, scale="none", **options)


def torchdistill_kd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherTarget,
    temperature: float | Tensor | Temperature,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    **options: Unpack[UnscaledOptions],
) -> Tensor:
    """Return ``α · CE + β · T² · KL``; without ``alpha`` or targets the KL alone, *without* T²: torchdistill.

    Its own arguments are ``alpha``, the weight of the cross-entropy with the targets, and ``beta``, the weight of the
    divergence; None: ``1 − α``.

    Raises:
        ValueError: If the cross-entropy is asked for with another reduction than ``"mean"``.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> torchdistill_kd_loss(student, teacher, 2.0, targets=torch.tensor([2]), alpha=0.5)
        tensor(0.3068)
    """
    targets, reduction = options.get("targets"), options.get("reduction", "mean")
    if not alpha or targets is None:
        return kd_loss(student_logits, teacher_logits, temperature, scale="none", **options)
    if reduction != "mean":
        raise ValueError(f"convention='torchdistill' is a mean, got reduction={reduction!r}.")
    soft = kd_loss(student_logits, teacher_logits, temperature, scale="student_teacher", **options)
    hard = _cross_entropy(student_logits, targets, options)
    return alpha * hard + (1 - alpha if beta is None else beta) * soft


def _cross_entropy(logits: Tensor, targets: Tensor, options: UnscaledOptions) -> Tensor:
    class_dim, ignore_index = options.get("class_dim", CLASS_DIM), options.get("ignore_index", IGNORE_INDEX)
    classes = logits.shape[class_dim]
    rows = logits.to(compute_dtype(logits)).movedim(class_dim, -1).reshape(-1, classes)
    count: Any = max(len(rows), 1)
    if targets.is_floating_point():
        total = F.cross_entropy(rows, targets.movedim(class_dim, -1).reshape(-1, classes), reduction="sum")
    elif ignore_index is None:
        total = F.cross_entropy(rows, targets.flatten(), reduction="sum")
    else:
        total = F.cross_entropy(rows, targets.flatten(), reduction="sum", ignore_index=ignore_index)
        count = (targets != ignore_index).sum().clamp(min=1)
    num_items = options.get("num_items")
    return total / (count if num_items is None else num_items)


CONVENTIONS: Mapping[Convention, Callable[..., Tensor]] = {
    "hinton": hinton_kd_loss,
    "trl": trl_kd_loss,
    "modelopt": modelopt_kd_loss,
    "torchdistill": torchdistill_kd_loss,
    "textbrewer": textbrewer_kd_loss,
}


def check_convention(convention: Convention | None, scale: Scale, alpha: float | None, beta: float | None) -> None:
    """Raise if the convention is unknown, or if an option contradicts it."""
    if convention is not None:
        check_option("convention", convention, get_args(Convention))
        if scale != "student_teacher":
            raise ValueError(f"convention={convention!r} fixes the scale: leave out scale={scale!r}.")
    if convention != "torchdistill" and not (alpha is None and beta is None):
        raise ValueError(
            f"alpha and beta belong to convention='torchdistill', got convention={convention!r}. Weigh the loss where "
            "it is added to the task's: kd_weight and task_weight of the Distiller."
        )
    check_weights(**{name: weight for name, weight in (("alpha", alpha), ("beta", beta)) if weight is not None})
    if alpha is not None and beta is None and alpha > 1:
        raise ValueError(f"alpha must be at most 1 where beta is left to be 1 − alpha, got alpha={alpha}. Give both.")
