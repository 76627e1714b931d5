"""Checks of the values of a first batch; later ones would be a host sync each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.losses.task import check_soft_targets


def check_first_batch(
    student: Tensor,
    teachers: Iterable[Any],
    class_dim: int,
    softened: bool,
    task_loss: nn.Module | None = None,
    targets: Tensor | None = None,
    trains: bool = False,
) -> None:
    """Raise if logits are probabilities, if the student is its own teacher, or if soft targets are no probabilities.

    Args:
        student: Logits.
        teachers: Logits of each member; what is no tensor is not looked at.
        class_dim: The class dimension of them all.
        softened: Whether the loss applies a softmax to the logits.
        task_loss: What takes the targets.
        targets: Of the batch; None leaves them out.
        trains: Whether the student is to be trained on this batch.
    """
    logits = [("student", student), *(("teacher", each) for each in teachers if isinstance(each, Tensor))]
    for side, values in logits:
        if softened and _look_like_probabilities(values, class_dim):
            way_out = "." if side == "student" else ", or say what it gives: FunctionTeacher(function, output='probs')."
            raise ValueError(
                f"the {side}'s logits are probabilities, not negative and of sum 1 in every row, but the loss applies "
                f"the softmax itself. Leave out the network's last Softmax{way_out}"
            )
    same = trains and not student.requires_grad and any(torch.equal(student, values) for _, values in logits[1:])
    if same and bool((student != student.flatten()[0]).any()):
        raise ValueError(
            "the student's logits are the teacher's, bit for bit, and carry no gradient: the teacher seems to be the "
            "student itself, which is frozen as a teacher. Give the teacher its own weights: copy.deepcopy(student)."
        )
    if task_loss is not None and targets is not None:  # before another term objects to them
        check_soft_targets(task_loss, student.movedim(class_dim, 1) if student.dim() > 2 else student, targets)


def are_probabilities(rows: Tensor, class_dim: int = -1, tolerance: float = 1e-3) -> Tensor:
    """Return, as a tensor of one element, whether every row sums to 1 without a negative value."""
    return (rows >= 0).all() & ((rows.sum(class_dim) - 1).abs() <= tolerance).all()


def _look_like_probabilities(logits: Tensor, class_dim: int) -> bool:
    """Return True if logits are probabilities; rows of nothing but 0 and 1 do not tell."""
    values = logits.detach().double() if logits.device.type != "mps" else logits.detach().float()
    if values.shape[class_dim] < 2 or not values.numel() or not logits.is_floating_point():
        return False
    tolerance = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 1e-2
    return bool(are_probabilities(values, class_dim, tolerance) & ((values > 0) & (values < 1)).any())
