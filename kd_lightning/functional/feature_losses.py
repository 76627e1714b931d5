"""Distillation losses between the features of student and teacher: the outputs of a layer within each.

Features are vectors ``(N, D)``, tokens ``(N, L, D)`` (channels last), or maps ``(N, C, H, W)`` and ``(N, C, D, H, W)``
(channels second). The *soft* losses turn features into rows of logits, whose softmax at T is compared: over the
positions, or over the other samples of the batch. All is computed in float32 (float64 stays), also under autocast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.functional.logit_losses import kd_loss
from kd_lightning.functional.rows import Scale
from kd_lightning.functional.temperature import Temperature, as_temperature, compute_dtype, tempered_log_softmax

__all__ = [
    "attention_kd_loss",
    "attention_logits",
    "attention_transfer_loss",
    "channel_logits",
    "channel_wise_kd_loss",
    "hint_loss",
    "info_nce_logits",
    "info_nce_loss",
    "relational_loss",
    "similarity_kd_loss",
    "similarity_logits",
    "similarity_preserving_loss",
]


# ---- plain losses: no temperature --------------------------------------------------------------------------------


def hint_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Mean squared difference of the features, :math:`L = \frac{1}{n} \sum_k (s_k - t_k)^2` over all n elements.

    The publication has half the sum in place of the mean; the mean does not grow with the batch and the layer, and is
    what libraries compute.

    Args:
        student_features: Any shape.
        teacher_features: The same shape.

    Raises:
        ValueError: Different shapes.

    Source: A. Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550.

    Example:
        >>> hint_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 5.0]]))
        tensor(4.5000)
    """
    check_same_shape(student_features, teacher_features)
    return F.mse_loss(_widened(student_features), _widened(teacher_features))


def attention_transfer_loss(student_features: Tensor, teacher_features: Tensor, *, power: float = 2.0) -> Tensor:
    r"""Mean squared difference of the attention maps, each of length 1.

    .. math::
        L = \frac{1}{N P} \sum_{i=1}^{N} \Big\| \frac{a(s_i)}{\|a(s_i)\|} - \frac{a(t_i)}{\|a(t_i)\|} \Big\|^2,
        \qquad a(x)_p = \frac{1}{C} \sum_{c=1}^{C} |x_{cp}|^{q}

    over the P positions, as the authors' code has it (the paper sums over P). The channel counts may differ.

    Args:
        student_features: Maps ``(N, C, H, W)`` or tokens ``(N, L, D)``.
        teacher_features: The same number of samples and positions.
        power: The exponent q; at least 1.

    Raises:
        ValueError: Vectors, other positions, or a power below 1.

    Source: S. Zagoruyko, N. Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928.

    Example:
        >>> student, teacher = torch.ones(1, 2, 1, 2), torch.tensor([[[[3.0, 0.0]]]])
        >>> attention_transfer_loss(student, teacher)
        tensor(0.2929)
    """
    student, teacher = (attention_logits(x, power=power) for x in (student_features, teacher_features))
    check_same_shape(student, teacher, "attention maps")
    return F.mse_loss(_unit(student), _unit(teacher))


def similarity_preserving_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Squared difference of the batch's similarity matrices.

    .. math::
        L = \frac{1}{N^2} \| \tilde G_s - \tilde G_t \|_F^2, \qquad \tilde G_{i,:} = G_{i,:} / \|G_{i,:}\|, \qquad
        G = A A^\top

    with one flattened sample per row of A. Nothing but the batch size need agree. A batch of one costs 0. On several
    devices the matrix is that of each device's batch.

    Args:
        student_features: Any shape ``(N, …)``.
        teacher_features: Any shape ``(N, …)``.

    Raises:
        ValueError: Different batch sizes.

    Source: F. Tung, G. Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv 1907.09682.

    Example:
        >>> student, teacher = torch.eye(2), torch.tensor([[1.0], [1.0]])
        >>> similarity_preserving_loss(student, teacher)
        tensor(0.2929)
    """
    student, teacher = _vectors(student_features), _vectors(teacher_features)
    _check_same_batch(student, teacher)
    student, teacher = (_unit(_products(x, x.T)) for x in (student, teacher))
    return F.mse_loss(student, teacher)


def relational_loss(
    student_features: Tensor, teacher_features: Tensor, *, distance_weight: float = 1.0, angle_weight: float = 2.0
) -> Tensor:
    r"""Relational distillation: Huber differences of the distances and of the angles within the batch.

    .. math::
        L = \frac{w_d}{N^2} \sum_{ij} h(d^s_{ij} - d^t_{ij})
          + \frac{w_a}{N^3} \sum_{ijk} h(\cos \angle^s_{jik} - \cos \angle^t_{jik}), \qquad
        d_{ij} = \|x_i - x_j\| / \mu

    with :math:`\mu` the mean distance that is not 0 and :math:`h(z) = z^2 / 2` up to 1, then :math:`|z| - 1/2`. The
    sums include the zeros of i = j, as in the authors' code. The published weights are 25 and 50. A batch of one costs
    0. Holds N² differences of whole samples: meant for vectors.

    Args:
        student_features: Any shape ``(N, …)``, flattened.
        teacher_features: Any shape ``(N, …)``.
        distance_weight: :math:`w_d`; not negative.
        angle_weight: :math:`w_a`; not negative.

    Raises:
        ValueError: Different batch sizes, or a negative weight.

    Source: W. Park et al., "Relational Knowledge Distillation", CVPR 2019, arXiv 1904.05068.

    Example:
        >>> student, teacher = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> relational_loss(student, teacher)
        tensor(0.3310)
    """
    check_weights(distance_weight=distance_weight, angle_weight=angle_weight)
    student, teacher = _vectors(student_features), _vectors(teacher_features)
    _check_same_batch(student, teacher)
    apart_s, apart_t = (x.unsqueeze(0) - x.unsqueeze(1) for x in (student, teacher))
    loss = distance_weight * F.smooth_l1_loss(_relative_lengths(apart_s), _relative_lengths(apart_t))
    if angle_weight:
        cosines_s, cosines_t = (_products(u, u.mT) for u in (_unit(apart_s), _unit(apart_t)))
        loss = loss + angle_weight * F.smooth_l1_loss(cosines_s, cosines_t)
    return loss


# ---- soft losses: rows of logits, compared at T ------------------------------------------------------------------


def channel_logits(features: Tensor) -> Tensor:
    """A row of logits over the positions for each channel of each sample: ``(N, C, H, W)`` → ``(N·C, H·W)``.

    Args:
        features: Maps ``(N, C, H, W)`` or tokens ``(N, L, D)``, of two positions or more.

    Raises:
        ValueError: Vectors, or a single position.

    Example:
        >>> channel_logits(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([6, 16])
    """
    return _positions(features).flatten(0, 1)


def channel_wise_kd_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    temperature: float | Tensor | Temperature,
    *,
    scale: Scale = "student_teacher",
) -> Tensor:
    r"""Channel-wise distillation (CWD): where in the image each channel looks.

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

    Raises:
        ValueError: Different shapes, vectors, a single position; and what :func:`kd_loss` objects to.

    Source: C. Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, arXiv 2011.13256.

    Example:
        >>> student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([[[[2.0, 0.0]]]])
        >>> channel_wise_kd_loss(student, teacher, 1.0)
        tensor(0.3278)
    """
    check_same_shape(student_features, teacher_features)
    return kd_loss(channel_logits(student_features), channel_logits(teacher_features), temperature, scale=scale)


def attention_logits(features: Tensor, *, power: float = 2.0) -> Tensor:
    r"""A row of logits over the positions for each sample: ``(N, C, H, W)`` → ``(N, H·W)``, the mean of
    :math:`|x|^q` over the channels.

    Args:
        features: Maps ``(N, C, H, W)`` or tokens ``(N, L, D)``, of two positions or more.
        power: The exponent q; at least 1.

    Raises:
        ValueError: Vectors, a single position, or a power below 1.

    Example:
        >>> attention_logits(torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]]))
        tensor([[5., 2.]])
    """
    check_power(power)
    return _widened(_positions(features)).abs().pow(power).mean(1)


def attention_kd_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    temperature: float | Tensor | Temperature,
    *,
    power: float = 2.0,
    scale: Scale = "student_teacher",
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

    Raises:
        ValueError: Other positions, vectors, a power below 1; and what :func:`kd_loss` objects to.

    Source: the softmax at T of an attention map is that of Z. Yang et al., "Focal and Global Knowledge Distillation for
    Detectors", CVPR 2022, arXiv 2111.11837 (``power=1``, T = 0.5; they compare it by absolute differences).

    Example:
        >>> student, teacher = torch.zeros(1, 3, 1, 2), torch.tensor([[[[2.0**0.5, 0.0]]]])
        >>> attention_kd_loss(student, teacher, 1.0)
        tensor(0.3278)
    """
    student, teacher = (attention_logits(x, power=power) for x in (student_features, teacher_features))
    check_same_shape(student, teacher, "attention maps")
    return kd_loss(student, teacher, temperature, scale=scale)


def similarity_logits(features: Tensor, *, views: int = 1) -> Tensor:
    """A row of cosines for each sample: to every other sample of the batch, or from a view to the images themselves.

    With one view ``(N, …)`` → ``(N, N − 1)``, the sample itself left out. With V views the batch is ``V·N`` samples,
    the N images first and then each of their views in the same order (``torch.cat([images, rotated, …])``):
    ``((V − 1)·N, N)``, each transformed image against all that are not.

    Where there are fewer than two to compare with, the rows are two equal logits ``(…, 2)`` without a gradient, so that
    a small last batch costs nothing.

    Args:
        features: Any shape ``(N, …)``, flattened.
        views: V; at least 1.

    Raises:
        ValueError: A batch that V does not divide.

    Example:
        >>> similarity_logits(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
        tensor([[0.0000, 0.7071],
                [0.0000, 0.7071],
                [0.7071, 0.7071]])
    """
    check_views(views)
    x = _unit(_vectors(features))
    if len(x) % views:
        raise ValueError(
            f"a batch of {len(x)} is not made of {views} views of each image. Concatenate the views along the batch, "
            "the images first, and drop an incomplete last batch."
        )
    count = len(x) // views
    if views == 1:
        cosines = _products(x, x.T)
        # row by row, the diagonal is every (N + 1)-th element: cut there, it is a column
        cosines = cosines.flatten()[1:].view(max(count - 1, 0), count + 1)[:, :-1].reshape(count, max(count - 1, 0))
    else:
        cosines = _products(x[count:], x[:count].T)
    return cosines if cosines.shape[1] > 1 else (x.sum() * 0.0).expand(len(cosines), 2)


def similarity_kd_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    temperature: float | Tensor | Temperature,
    *,
    views: int = 1,
    scale: Scale = "student_teacher",
) -> Tensor:
    r"""Whom each sample resembles, as a distribution over the batch.

    .. math::
        L = \frac{T^2}{N} \sum_i \mathrm{KL}(\phi(g^t_i) \| \phi(g^s_i)), \qquad
        g_{ij} = \frac{x_i \cdot x_j}{\|x_i\| \|x_j\|}, \qquad \phi = \mathrm{softmax} \text{ at } T

    on the rows of :func:`similarity_logits`. Nothing but the batch size need agree. Cosines lie in [−1, 1], so T is
    usually 0.05 to 0.5. A batch of one or two costs 0. On several devices each compares within its own batch.

    With ``views`` it is the transfer term of SSKD, on the outputs of the self-supervision heads of both networks.
    *Covered*: the similarities between transformed images and the images themselves, softened. *Not covered*: training
    the teacher's head beforehand, leaving out the pairs that the teacher itself gets wrong (selective transfer), and
    SSKD's other terms: distilling the logits of the transformed images is what the Distiller does when the batch has
    them.

    Args:
        student_features: Any shape ``(N, …)``, flattened.
        teacher_features: Any shape ``(N, …)``.
        temperature: As in :func:`channel_wise_kd_loss`; SSKD takes 0.5.
        views: How many views of each image the batch is made of, see :func:`similarity_logits`.
        scale: As in :func:`kd_loss`.

    Raises:
        ValueError: Different batch sizes, a batch that ``views`` does not divide; and what :func:`kd_loss` objects to.

    Source: softened similarities instead of :func:`similarity_preserving_loss`'s; G. Xu et al., "Knowledge Distillation
    Meets Self-Supervision", ECCV 2020, arXiv 2006.07114.

    Example:
        >>> student, teacher = torch.eye(3), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> similarity_kd_loss(student, teacher, 0.5)
        tensor(0.0546)
    """
    _check_same_batch(student_features, teacher_features)
    student, teacher = (similarity_logits(x, views=views) for x in (student_features, teacher_features))
    return kd_loss(student, teacher, temperature, scale=scale)


def info_nce_logits(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Cosines of each student sample with each teacher sample, ``(N, N)``.

    Args:
        student_features: Any shape ``(N, …)``, flattened.
        teacher_features: The same shape.

    Raises:
        ValueError: Different shapes.

    Example:
        >>> info_nce_logits(torch.eye(2), torch.tensor([[2.0, 0.0], [1.0, 0.0]]))
        tensor([[1., 1.],
                [0., 0.]])
    """
    check_same_shape(student_features, teacher_features)
    return _products(_unit(_vectors(student_features)), _unit(_vectors(teacher_features)).T)


def info_nce_loss(
    student_features: Tensor, teacher_features: Tensor, temperature: float | Tensor | Temperature = 0.07
) -> Tensor:
    r"""Contrast within the batch: the student's sample must resemble the teacher's of the same input most.

    .. math::
        L = -\frac{1}{N} \sum_i \log \frac{\exp(g_{ii} / T)}{\sum_j \exp(g_{ij} / T)}, \qquad
        g_{ij} = \frac{s_i \cdot t_j}{\|s_i\| \|t_j\|}

    Only the student's temperature counts, and there is no T². It is CRD's idea with the batch for negatives in place of
    its memory bank and noise-contrastive estimate: take large batches. A batch of one costs 0. On several devices the
    negatives are those of each device.

    Args:
        student_features: Any shape ``(N, …)``, flattened.
        teacher_features: The same shape.
        temperature: A number, or a tensor or :class:`Temperature` of one element or in the layout ``(N, N)``.

    Raises:
        ValueError: Different shapes, or a temperature that is not positive and finite.

    Source: Y. Tian, D. Krishnan, P. Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699
    (T = 0.07); A. van den Oord et al., 2018, arXiv 1807.03748.

    Example:
        >>> info_nce_loss(torch.eye(2), torch.eye(2), 1.0)
        tensor(0.3133)
    """
    return contrast(info_nce_logits(student_features, teacher_features), temperature)


# ---- the pieces --------------------------------------------------------------------------------------------------


def check_power(power: float) -> None:
    """Refuse an exponent of the attention below 1."""
    if not power >= 1:
        raise ValueError(f"power must be 1 or more, got {power}: below, its gradient at 0 is infinite. Take 2 or 1.")


def check_views(views: int) -> None:
    """Refuse a number of views below 1."""
    if views < 1:
        raise ValueError(f"views must be 1 or more, got {views}. 1 compares the samples of a batch with each other.")


def check_weights(**weights: float) -> None:
    """Refuse weights that are negative or not finite."""
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{name} must be finite and not negative, got {weight}.")


def contrast(logits: Tensor, temperature: float | Tensor | Temperature) -> Tensor:
    """Cross-entropy of square logits whose diagonal is right."""
    return -tempered_log_softmax(logits, as_temperature(temperature, logits).student).diagonal().mean()


def _widened(features: Tensor) -> Tensor:
    return features.to(compute_dtype(features))


def _vectors(features: Tensor) -> Tensor:
    return _widened(features).flatten(1)


def _positions(features: Tensor) -> Tensor:
    """``(N, C, P)``: the positions last, the channels before them."""
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


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays, with a bounded gradient."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / torch.where(length > 0, length, 1.0)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product in the precision of its arguments, also under autocast."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def _relative_lengths(vectors: Tensor) -> Tensor:
    """Lengths over their mean, zeros left out of it."""
    length = torch.linalg.vector_norm(vectors, dim=-1)
    mean = length.sum() / (length > 0).sum().clamp(min=1)
    return length / torch.where(mean > 0, mean, 1.0)


def check_same_shape(student: Tensor, teacher: Tensor, what: str = "features") -> None:
    """Refuse features of different shapes."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher {what} must have the same shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}. A LayerTerm joins them by a projector; RelationalLoss, "
            "SimilarityPreservingLoss and SimilarityKDLoss compare any two."
        )


def _check_same_batch(student: Tensor, teacher: Tensor) -> None:
    if len(student) != len(teacher):
        raise ValueError(f"student and teacher features must be of the same batch, got {len(student)} and "
                         f"{len(teacher)} samples.")  # fmt: skip
