"""Distillation losses between the samples of a batch, as the features of student and teacher relate them.

Features are as in :mod:`~kd_lightning.functional.feature_losses`, flattened to one vector per sample. Most losses need
nothing but the batch size to agree between student and teacher.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.functional.feature_losses import check_same_shape, unit, widened
from kd_lightning.functional.logit_losses import kd_loss
from kd_lightning.functional.rows import Scale
from kd_lightning.functional.temperature import Temperature, as_temperature, check_weights, tempered_log_softmax


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
        ValueError: If the batch sizes differ.

    Source: F. Tung, G. Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv 1907.09682.

    Example:
        >>> student, teacher = torch.eye(2), torch.tensor([[1.0], [1.0]])
        >>> similarity_preserving_loss(student, teacher)
        tensor(0.2929)
    """
    student, teacher = _vectors(student_features), _vectors(teacher_features)
    _check_same_batch(student, teacher)
    student, teacher = (unit(_products(x, x.T)) for x in (student, teacher))
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
        ValueError: If the batch sizes differ, or if a weight is negative.

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
        cosines_s, cosines_t = (_products(u, u.mT) for u in (unit(apart_s), unit(apart_t)))
        loss = loss + angle_weight * F.smooth_l1_loss(cosines_s, cosines_t)
    return loss


def similarity_logits(features: Tensor, *, views: int = 1) -> Tensor:
    """Return a row of cosines for each sample: to the rest of the batch, or from a view to the images themselves.

    With one view ``(N, …)`` → ``(N, N − 1)``, the sample itself left out. With V views the batch is ``V·N`` samples,
    the N images first and then each of their views in the same order (``torch.cat([images, rotated, …])``):
    ``((V − 1)·N, N)``, each transformed image against all that are not.

    Where there are fewer than two to compare with, the rows are two equal logits ``(…, 2)`` without a gradient, so that
    a small last batch costs nothing.

    Args:
        features: Any shape ``(N, …)``, flattened.
        views: V; at least 1.

    Raises:
        ValueError: If V does not divide the batch size.

    Example:
        >>> similarity_logits(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
        tensor([[0.0000, 0.7071],
                [0.0000, 0.7071],
                [0.7071, 0.7071]])
    """
    check_views(views)
    x = unit(_vectors(features))
    if len(x) % views:
        raise ValueError(
            f"a batch of {len(x)} is not made of {views} views of each image. Concatenate the views along the batch, "
            "the images first, and drop an incomplete last batch."
        )
    count = len(x) // views
    if views == 1:
        cosines = _products(x, x.T)
        # cut into rows of N + 1 elements, because there the diagonal is a column
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
    r"""KL between the distributions of each sample's similarities to the batch.

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
        ValueError: If the batch sizes differ, if ``views`` does not divide them, or if :func:`kd_loss` raises.

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
    """Return the cosines of each student sample with each teacher sample, ``(N, N)``.

    Args:
        student_features: Any shape ``(N, …)``, flattened.
        teacher_features: The same shape.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> info_nce_logits(torch.eye(2), torch.tensor([[2.0, 0.0], [1.0, 0.0]]))
        tensor([[1., 1.],
                [0., 0.]])
    """
    check_same_shape(student_features, teacher_features)
    return _products(unit(_vectors(student_features)), unit(_vectors(teacher_features)).T)


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
        ValueError: If the shapes differ, or if the temperature is not positive and finite.

    Source: Y. Tian, D. Krishnan, P. Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699
    (T = 0.07); A. van den Oord et al., 2018, arXiv 1807.03748.

    Example:
        >>> info_nce_loss(torch.eye(2), torch.eye(2), 1.0)
        tensor(0.3133)
    """
    return contrast(info_nce_logits(student_features, teacher_features), temperature)


def check_views(views: int) -> None:
    """Raise if the number of views is below 1."""
    if views < 1:
        raise ValueError(f"views must be 1 or more, got {views}. 1 compares the samples of a batch with each other.")


def contrast(logits: Tensor, temperature: float | Tensor | Temperature) -> Tensor:
    """Return the cross-entropy of square logits whose targets are the diagonal."""
    return -tempered_log_softmax(logits, as_temperature(temperature, logits).student).diagonal().mean()


def _vectors(features: Tensor) -> Tensor:
    return widened(features).flatten(1)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix product in the precision of its arguments, also under autocast."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def _relative_lengths(vectors: Tensor) -> Tensor:
    """Return the lengths divided by the mean of those that are not 0."""
    length = torch.linalg.vector_norm(vectors, dim=-1)
    mean = length.sum() / (length > 0).sum().clamp(min=1)
    return length / torch.where(mean > 0, mean, 1.0)


def _check_same_batch(student: Tensor, teacher: Tensor) -> None:
    if len(student) != len(teacher):
        raise ValueError(f"student and teacher features must be of the same batch, got {len(student)} and "
                         f"{len(teacher)} samples.")  # fmt: skip
