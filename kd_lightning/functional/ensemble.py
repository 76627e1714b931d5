"""The mixture of several teachers, and the weight of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_lightning.functional.temperature import predictive_entropy, tempered_log_softmax, widened_over


def mixed_log_softmax(
    logits: Sequence[Tensor], temperatures: Sequence[float | Tensor], weights: Sequence[Tensor]
) -> Tensor:
    r"""Logarithm of the mixture of softened distributions, :math:`\log \sum_k w_k \, \mathrm{softmax}(t_k / T_k)`.

    Computed in log-space. The mixture differs from the softmax of the mean logits, which the teacher with the larger
    logits dominates, as the example shows.

    Args:
        logits: :math:`t_k`, each ``(…, C)``, class dimension last.
        temperatures: :math:`T_k`, as many.
        weights: :math:`w_k`, as many, each of one element or ``(…, 1)``; not negative, and 1 in sum at every position.

    Returns:
        ``(…, C)``, in float32 (float64 stays).

    Example:
        >>> sure, unsure = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
        >>> half = [torch.tensor([0.5])] * 2
        >>> mixed_log_softmax([sure, unsure], [1.0, 1.0], half).exp().round(decimals=2)
        tensor([[0.6100, 0.2900, 0.1100]])
        >>> mixed_logits([sure, unsure], [1.0, 1.0], half).softmax(-1)
        tensor([[0.9714, 0.0178, 0.0108]])
    """
    given = zip(logits, temperatures, weights, strict=True)
    parts = [weight.log() + tempered_log_softmax(z, t) for z, t, weight in given]
    stacked = torch.stack(torch.broadcast_tensors(*parts))
    if not stacked.requires_grad:
        return stacked.logsumexp(0)
    masked = (stacked == -torch.inf).all(0)  # because the gradient of logsumexp over −inf is NaN
    return stacked.masked_fill(masked, 0.0).logsumexp(0).masked_fill(masked, -torch.inf)


def mixed_logits(logits: Sequence[Tensor], temperatures: Sequence[float | Tensor], weights: Sequence[Tensor]) -> Tensor:
    r"""Return the weighted mean of the tempered logits, :math:`\sum_k w_k \, t_k / T_k`.

    Its softmax is the normalised geometric mean of the softened distributions. Arguments and result:
    :func:`mixed_log_softmax`.

    Example:
        >>> both = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])]
        >>> mixed_logits(both, [1.0, 2.0], [torch.tensor([0.75]), torch.tensor([0.25])])
        tensor([[1.5000, 0.5000]])
    """
    parts = [  # without the product, because 0 · −inf is NaN
        torch.where(weight > 0, weight * widened_over(z, t), 0.0)
        for z, t, weight in zip(logits, temperatures, weights, strict=True)
    ]
    return torch.stack(torch.broadcast_tensors(*parts)).sum(0)


def confidence_weights(logits: Sequence[Tensor], targets: Tensor, known: Tensor | None = None) -> Tensor:
    r"""Return the weight of each teacher on each sample, by its cross-entropy with the label.

    .. math::
        w_k = \frac{1}{n - 1} \Bigl( 1 - \frac{\exp(\mathrm{CE}_k)}{\sum_j \exp(\mathrm{CE}_j)} \Bigr), \qquad
        \mathrm{CE}_k = -\log \mathrm{softmax}(t_k)_y

    over the :math:`n` teachers that know the sample; a single teacher has weight 1.

    Args:
        logits: :math:`t_k`, each ``(…, C)``, class dimension last; their temperature is 1.
        targets: Class indices ``(…)``. A sample whose index is out of range, as without a label, has equal weights.
        known: ``(K, …, 1)``, True where the teacher knows the sample. None: everywhere.

    Returns:
        ``(K, …, 1)``; the sum over the teachers is 1.

    Source: H. Zhang, D. Chen, C. Wang, "Confidence-Aware Multi-Teacher Knowledge Distillation" (CA-MKD), ICASSP 2022,
    arXiv 2201.00007, equation of :math:`w_{KD}`. Its loss is that of ``combine="losses"``, divided by K once more.

    Example:
        >>> right, wrong = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> confidence_weights([right, wrong], torch.tensor([0])).squeeze()
        tensor([0.7850, 0.2150])
    """
    labelled = ((targets >= 0) & (targets < logits[0].shape[-1])).unsqueeze(-1)
    index = targets.unsqueeze(-1).masked_fill(~labelled, 0)
    errors = torch.stack([-tempered_log_softmax(z, 1.0).gather(-1, index) for z in logits])
    errors = errors.masked_fill(~labelled, 0.0)
    if known is not None:
        errors = errors.masked_fill(~known, -torch.inf)
    return _share(1 - errors.softmax(0), known)


def entropy_weights(logits: Sequence[Tensor], known: Tensor | None = None) -> Tensor:
    r"""Return the weight of each teacher on each sample, by the entropy :math:`H_k` of its distribution.

    .. math:: w_k = \frac{1}{n - 1} \Bigl( 1 - \frac{H_k}{\sum_j H_j} \Bigr)

    over the :math:`n` teachers that know the sample. It needs no labels: a confident teacher weighs more, right or
    wrong.

    Args:
        logits: As in :func:`confidence_weights`.
        known: As in :func:`confidence_weights`.

    Returns:
        ``(K, …, 1)``; the sum over the teachers is 1.

    Source: K. Kwon et al., "Adaptive Knowledge Distillation Based on Entropy", ICASSP 2020 (lower entropy, larger
    weight), in the form of the code of CA-MKD, where it is the method EBKD; here divided by :math:`n - 1`, so that the
    weights sum to 1.

    Example:
        >>> sure, unsure = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> entropy_weights([sure, unsure]).squeeze()
        tensor([0.8660, 0.1340])
    """
    entropies = torch.stack([predictive_entropy(z).unsqueeze(-1) for z in logits])
    if known is not None:
        entropies = entropies.masked_fill(~known, 0.0)
    tiny = torch.finfo(entropies.dtype).tiny
    return _share(1 - entropies / entropies.sum(0).clamp(min=tiny), known)


def _share(values: Tensor, known: Tensor | None) -> Tensor:
    """Return each teacher's share of the sum over the teachers that know the sample; equal shares where it is 0."""
    known = torch.ones_like(values) if known is None else known.to(values.dtype)
    values = values * known
    total = values.sum(0)
    return torch.where(total > 0, values / total, known / known.sum(0))
