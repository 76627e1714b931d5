"""The loss between logits that is no sum over rows: it correlates each class over the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.functional.across_ranks import gather_over_ranks
from kd_lightning.functional.masks import masked_on_both_sides
from kd_lightning.functional.row_loss import CLASS_DIM, IGNORE_INDEX
from kd_lightning.functional.rows import (
    Reduction,
    Scale,
    check_labels,
    check_logits,
    check_options,
    check_whole,
    in_compute_dtype,
    loss_factor,
    valid_positions,
    without_padding,
)
from kd_lightning.functional.temperature import Temperature, as_temperature, check_weights, widened_over


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor | Temperature,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    sync: bool = False,
    targets: Tensor | None = None,
    scale: Scale = "none",
    class_dim: int = CLASS_DIM,
    ignore_index: int | None = IGNORE_INDEX,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Correlation distance of the probabilities (DIST), by Pearson's :math:`\rho` along rows and along columns.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} c_i \Bigl[ \beta \, (1 - \rho(p_{s,i\cdot}, p_{t,i\cdot}))
            + \gamma \, \frac{1}{C} \sum_k (1 - \rho(p_{s,\cdot k}, p_{t,\cdot k})) \Bigr]

    The second term correlates each class over all valid positions of the batch; every position carries it. A
    correlation does not shrink with T, so the publication has no T²: ``scale="none"`` is the default. Classes that both
    sides mask, with −inf or with large finite numbers from −1e4 on, do not count. Arguments and errors are those of
    :func:`kd_loss`.

    Its own arguments:

    - ``beta``: Weight of the correlation between classes, within a row.
    - ``gamma``: Weight of the correlation within a class, over the batch; it needs two valid positions or more.
    - ``sync``: Whether that correlation is over the batches of all ranks, as in one process. A step costs a small
      all-reduce and an all-gather of the probabilities of both networks. The ranks need equally many positions, and the
      gradients are those to be averaged over ranks, as DDP does.

    Raises:
        ValueError: If there are fewer than three classes, because the correlation of two is always ±1, or if a weight
            is negative or not finite, or both are 0.

    Source: T. Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv 2205.10536.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0]])
        >>> dist_loss(student, teacher, 1.0, gamma=0.0)
        tensor(0.0042)
    """
    check_weights(beta=beta, gamma=gamma)
    check_options(scale, reduction, num_items)
    check_whole("dist_loss", student_logits, teacher_logits)
    teacher_logits = without_padding(student_logits, teacher_logits, class_dim)
    check_logits(student_logits, teacher_logits, class_dim, min_classes=3, targets=targets)
    temp = in_compute_dtype(as_temperature(temperature, student_logits), student_logits)
    if ignore_index is not None:
        check_labels(targets, student_logits, class_dim, ignore_index)
    valid = valid_positions(targets, student_logits, class_dim, ignore_index)
    kept = None if valid is None else valid.unsqueeze(class_dim)
    factor = loss_factor(temp, student_logits, scale, class_dim, kept, reduction, num_items)

    if kept is not None:  # because a masked row may hold NaN, and 0 · NaN is NaN
        student_logits, teacher_logits = student_logits.masked_fill(~kept, 0.0), teacher_logits.masked_fill(~kept, 0.0)
    masked = masked_on_both_sides(student_logits, teacher_logits, class_dim)
    p_s = widened_over(student_logits, temp.student).softmax(class_dim).movedim(class_dim, -1)
    p_t = widened_over(teacher_logits, temp.teacher).softmax(class_dim).movedim(class_dim, -1)
    known = None if masked is None else ~masked.movedim(class_dim, -1)
    if sync and known is None:
        known = torch.ones_like(p_s, dtype=torch.bool)  # because another rank may have masked classes
    loss = beta * (1 - _correlation(p_s, p_t, -1, known)) + gamma * _column_distance(p_s, p_t, known, valid, sync)
    loss = loss * (factor.squeeze(class_dim) if factor.dim() > 0 else factor)
    loss = loss if valid is None else loss * valid
    return loss if reduction == "none" else loss.sum()


def _column_distance(p_s: Tensor, p_t: Tensor, known: Tensor | None, valid: Tensor | None, sync: bool) -> Tensor:
    """Return the mean over the classes of 1 − the correlation over all positions.

    Positions that are not valid do not count, nor do classes that are known at no position.
    """
    seen = known
    if valid is not None:
        seen = valid.unsqueeze(-1) if known is None else known & valid.unsqueeze(-1)
    p_s, p_t = p_s.flatten(0, -2), p_t.flatten(0, -2)
    seen = None if seen is None else seen.flatten(0, -2)
    if sync and seen is not None:  # all three in one all-gather
        p_s, p_t, seen = gather_over_ranks(torch.cat([p_s, p_t, seen.to(p_s.dtype)], -1)).chunk(3, -1)
        seen = seen > 0
    distances = 1 - _correlation(p_s, p_t, 0, seen)
    if seen is None or known is None:
        return distances.mean()
    classes = seen.any(0)
    return (distances * classes).sum() / classes.sum().clamp(min=1)


def _correlation(x: Tensor, y: Tensor, dim: int, counted: Tensor | None) -> Tensor:
    """Return Pearson's correlation along one dimension, of the elements that count; 0 where one side is constant."""
    if counted is None:
        x, y = (z - z.mean(dim, keepdim=True) for z in (x, y))
    else:
        counted = counted.to(x.dtype)
        total = counted.sum(dim, keepdim=True).clamp(min=1)
        x, y = ((z - (z * counted).sum(dim, keepdim=True) / total) * counted for z in (x, y))
    norms = torch.linalg.vector_norm(x, dim=dim) * torch.linalg.vector_norm(y, dim=dim)
    return (x * y).sum(dim) / (norms + _EPSILON)


_EPSILON = 1e-8
"""Added, as the authors do: a lower bound instead would change the gradient by a third at 32,000 classes."""
