"""Losses between the logits of student and teacher: options in the constructor, one call into functional."""

from __future__ import annotations

from typing import get_args

from torch import Tensor, nn

from kd_lightning import functional
from kd_lightning.functional import Reduction, Scale, Temperature

__all__ = ["KDLoss"]


class KDLoss(nn.Module):
    """The :func:`~kd_lightning.functional.kd_loss` with its options held: equation, shapes and source are there.

    Args:
        scale: The factor per sample: ``"student_teacher"`` (T_s·T_t, which is T² when shared), ``"student"`` (T_s²),
            ``"teacher"`` (T_t²) or ``"none"``.
        class_dim: The dimension of the classes; 1 for dense ``(N, C, H, W)``.
        ignore_index: Target value of the positions to leave out; None keeps all of them, so that samples without a
            label are distilled too.
        reduction: ``"mean"`` over the valid positions, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: An unknown option.

    Example:
        >>> import torch
        >>> loss = KDLoss(scale="student_teacher")
        >>> loss(torch.zeros(2, 3), torch.zeros(2, 3), 4.0)
        tensor(0.)
    """

    def __init__(
        self,
        scale: Scale = "student_teacher",
        class_dim: int = -1,
        ignore_index: int | None = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("scale", scale, get_args(Scale)),
            ("reduction", reduction, get_args(Reduction)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
        self.scale: Scale = scale
        self.class_dim = class_dim
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        temperature: float | Tensor | Temperature,
        targets: Tensor | None = None,
    ) -> Tensor:
        """The loss; see :func:`~kd_lightning.functional.kd_loss`."""
        return functional.kd_loss(
            student_logits,
            teacher_logits,
            temperature,
            targets=targets,
            scale=self.scale,
            class_dim=self.class_dim,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The options."""
        return f"scale={self.scale!r}, class_dim={self.class_dim}, ignore_index={self.ignore_index}, " + (
            f"reduction={self.reduction!r}"
        )
