"""Distillation losses between the features of student and teacher, position by position.

Features are outputs of a layer within each network: vectors ``(N, D)``, tokens ``(N, L, D)`` (channels last), or maps
``(N, C, H, W)`` and ``(N, C, D, H, W)`` (channels second). The *soft* losses turn features into rows of logits over the
positions and compare their softmax at T; :mod:`~kd_lightning.functional.similarity_losses` compares samples instead.
A ``mask`` in the shape of the features without the channels is True at the positions that count.
All is computed in float32 (float64 stays), also under autocast.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.functional.logit_losses import kd_loss
from kd_lightning.functional.rows import Scale
from kd_lightning.functional.temperature import Temperature, compute_dtype


def hint_loss(student_features: Tensor, teacher_features: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Mean squared difference of the features, :math:`L = \frac{1}{n} \sum_k (s_k - t_k)^2` over the n that count.

    The publication has half the sum in place of the mean; the mean does not grow with the batch and the layer, and is
    what libraries compute.

    Args:
        student_features: Any shape.
        teacher_features: The same shape.
        mask: Positions that count, ``(N, L)`` for tokens ``(N, L, D)``; None: all.

    Raises:
        ValueError: If the shapes differ.

    Source: A. Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550.

    Example:
        >>> hint_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 5.0]]))
        tensor(4.5000)
    """
    check_same_shape(student_features, teacher_features)
    student, teacher = (without_padded(x, mask) for x in (student_features, teacher_features))
    return F.mse_loss(widened(student), widened(teacher)) * _padding_factor(mask)


def attention_transfer_loss(
    student_features: Tensor, teacher_features: Tensor, *, power: float = 2.0, mask: Tensor | None = None
) -> Tensor:
    r"""Mean squared difference of the attention maps, each of length 1.

    .. math::
        L = \frac{1}{N P} \sum_{i=1}^{N} \Big\| \frac{a(s_i)}{\|a(s_i)\|} - \frac{a(t_i)}{\|a(t_i)\|} \Big\|^2,
        \qquad a(x)_p = \frac{1}{C} \sum_{c=1}^{C} |x_{cp}|^{q}

    over the P positions, as the authors' code has it (the paper sums over P). The channel counts may differ.

    Args:
        student_features: Maps ``(N, C, H, W)`` or tokens ``(N, L, D)``.
        teacher_features: The same number of samples and positions.
        power: The exponent q; at least 1.
        mask: Positions that count; None: all. N P is then their number.

    Raises:
        ValueError: If the features are vectors, if the samples or positions differ, or if ``power`` is below 1.

    Source: S. Zagoruyko, N. Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928.

    Example:
        >>> student, teacher = torch.ones(1, 2, 1, 2), torch.tensor([[[[3.0, 0.0]]]])
        >>> attention_transfer_loss(student, teacher)
        tensor(0.2929)
    """
    features = (without_padded(x, mask) for x in (student_features, teacher_features))
    student, teacher = (attention_logits(x, power=power) for x in features)
    check_same_shape(student, teacher, "attention maps")
    return F.mse_loss(unit(student), unit(teacher)) * _padding_factor(mask)


def channel_logits(features: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return a row of logits over the positions for each channel of each sample: ``(N, C, H, W)`` → ``(N·C, H·W)``.

    Args:
        features: Maps ``(N, C, H, W)`` or tokens ``(N, L, D)``, of two positions or more.
        mask: Positions that count; the others get −inf. None: all.

    Raises:
        ValueError: If the features are vectors or have a single position.

    Example:
        >>> channel_logits(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([6, 16])
    """
    return _masked_rows(_positions(without_padded(features, mask)), mask).flatten(0, 1)


def channel_wise_kd_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    temperature: float | Tensor | Temperature,
    *,
    scale: Scale = "student_teacher",
    mask: Tensor | None = None,
) -> Tensor:
    r"""Channel-wise distillation (CWD): KL between the distributions of each channel over the positions.

    .. math::
        L = \frac{T^2}{N C} \sum_{i=1}^{N} \sum_{c=1}^{C} \mathrm{KL}(\phi(t_{ic}) \| \phi(s_{ic})), \qquad
        \phi(x) = \mathrm{softmax}_{p}(x_p / T)

    over the H·W positions p of a map. It is :func:`kd_loss` on the rows of :func:`channel_logits`.

    Args:
        student_features: Maps ``(N, C, H, W)`` or tokens ``(N, L, D)``.
        teacher_features: The same shape.
        temperature: A number, or a tensor or :class:`Temperature` of one element or in the layout of the rows. The
            publication takes 4, and 1 for logit maps.
        scale: As in :func:`kd_loss`.
        mask: Positions p that count; None: all.

    Raises:
        ValueError: If the shapes differ, if the features are vectors or have a single position, or if :func:`kd_loss`
            raises.

    Source: C. Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, arXiv 2011.13256.

    Example:
        >>> student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([[[[2.0, 0.0]]]])
        >>> channel_wise_kd_loss(student, teacher, 1.0)
        tensor(0.3278)
    """
    check_same_shape(student_features, teacher_features)
    student, teacher = (channel_logits(x, mask=mask) for x in (student_features, teacher_features))
    return kd_loss(student, teacher, temperature, scale=scale)


def attention_logits(features: Tensor, *, power: float = 2.0, mask: Tensor | None = None) -> Tensor:
    r"""Return the mean of :math:`|x|^q` over the channels, a row of logits per sample: ``(N, C, H, W)`` → ``(N, H·W)``.

    Args:
        features: Maps ``(N, C, H, W)`` or tokens ``(N, L, D)``, of two positions or more.
        power: The exponent q; at least 1.
        mask: Positions that count; the others get −inf. None: all.

    Raises:
        ValueError: If the features are vectors or have a single position, or if ``power`` is below 1.

    Example:
        >>> attention_logits(torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]]))
        tensor([[5., 2.]])
    """
    check_power(power)
    return _masked_rows(widened(_positions(without_padded(features, mask))).abs().pow(power).mean(1), mask)


def attention_kd_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    temperature: float | Tensor | Temperature,
    *,
    power: float = 2.0,
    scale: Scale = "student_teacher",
    mask: Tensor | None = None,
) -> Tensor:
    r"""Spatial attention as a distribution: :math:`L = \frac{T^2}{N} \sum_i \mathrm{KL}(\phi(a(t_i)) \| \phi(a(s_i)))`.

    :math:`a` is the map of :func:`attention_logits` and :math:`\phi` its softmax at T over the positions: one
    distribution per sample, where CWD has one per channel. The channel counts may differ.

    Args:
        student_features: Maps ``(N, C, H, W)`` or tokens ``(N, L, D)``.
        teacher_features: The same number of samples and positions.
        temperature: As in :func:`channel_wise_kd_loss`. The rows have the size of squared activations.
        power: The exponent q; at least 1.
        scale: As in :func:`kd_loss`.
        mask: Positions that count; None: all.

    Raises:
        ValueError: If the samples or positions differ, if the features are vectors, if ``power`` is below 1, or if
            :func:`kd_loss` raises.

    Source: the softmax at T of an attention map is that of Z. Yang et al., "Focal and Global Knowledge Distillation for
    Detectors", CVPR 2022, arXiv 2111.11837 (``power=1``, T = 0.5; they compare it by absolute differences).

    Example:
        >>> student, teacher = torch.zeros(1, 3, 1, 2), torch.tensor([[[[2.0**0.5, 0.0]]]])
        >>> attention_kd_loss(student, teacher, 1.0)
        tensor(0.3278)
    """
    student, teacher = (attention_logits(x, power=power, mask=mask) for x in (student_features, teacher_features))
    check_same_shape(student, teacher, "attention maps")
    return kd_loss(student, teacher, temperature, scale=scale)


def check_power(power: float) -> None:
    """Raise if the exponent of the attention is below 1."""
    if not power >= 1:
        raise ValueError(f"power must be 1 or more, got {power}: below, its gradient at 0 is infinite. Take 2 or 1.")


def widened(features: Tensor) -> Tensor:
    """Return the features in the dtype to compute in: float32, or float64 where they have it."""
    return features.to(compute_dtype(features))


def _positions(features: Tensor) -> Tensor:
    """Return the features as ``(N, C, P)``, the positions last."""
    if features.dim() < 3:
        raise ValueError(
            f"this loss compares positions: features must be maps (N, C, H, W) or tokens (N, L, D), got shape "
            f"{tuple(features.shape)}. Name a layer before the pooling, or take a loss for vectors."
        )
    rows = features.mT if features.dim() == 3 else features.flatten(2)
    if rows.shape[2] < 2:
        raise ValueError(
            f"this loss compares positions, but features of shape {tuple(features.shape)} have only one, and a softmax "
            "over it is always 1. Name a layer before the pooling, or take a loss for vectors."
        )
    return rows


def unit(rows: Tensor) -> Tensor:
    """Return the rows scaled to length 1; a row of zeros stays, with a bounded gradient."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / torch.where(length > 0, length, 1.0)


def check_same_shape(student: Tensor, teacher: Tensor, what: str = "features") -> None:
    """Raise if the shapes of student and teacher differ."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher {what} must have the same shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}. A LayerTerm joins them by a projector; RelationalLoss, "
            "SimilarityPreservingLoss and SimilarityKDLoss compare any two."
        )


def without_padded(features: Tensor, mask: Tensor | None) -> Tensor:
    """Return the features with 0 at the positions that do not count.

    Raises:
        ValueError: If the mask has not the shape of the features without the channels.
    """
    if mask is None:
        return features
    channel_dim = 1 if features.dim() > 3 else features.dim() - 1
    positions = features.shape[:channel_dim] + features.shape[channel_dim + 1 :]
    if mask.shape != positions:
        raise ValueError(
            f"a mask of features {tuple(features.shape)} must have their shape without the channels, "
            f"{tuple(positions)}, got {tuple(mask.shape)}."
        )
    return features.masked_fill(~mask.bool().unsqueeze(channel_dim), 0.0)


def _padding_factor(mask: Tensor | None) -> Tensor | float:
    """Return what makes a mean over all positions, those that do not count being 0, one over those that count."""
    return 1.0 if mask is None else mask.numel() / mask.sum().clamp(min=1)


def _masked_rows(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Return rows of logits over the positions, ``(N, …, P)``, with −inf at those that do not count.

    A sample of padding alone keeps its logits, because a softmax needs one that counts; they are 0 on both sides.
    """
    if mask is None:
        return rows
    mask = mask.bool().flatten(1)
    left_out = ~mask & mask.any(1, keepdim=True)
    return rows.masked_fill(left_out if rows.dim() == 2 else left_out.unsqueeze(1), -math.inf)
