"""Losses between the features of student and teacher: options in the constructor, one call into functional.

Equations, shapes and sources are those of the functions of the same name in :mod:`kd_lightning.functional`. A
:class:`~kd_lightning.LayerTerm` puts a feature loss between a layer of the student and a layer of the teacher.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from typing import ClassVar, Literal

from torch import Tensor, nn
from typing_extensions import override

from kd_lightning import functional
from kd_lightning.functional import Temperature
from kd_lightning.functional.across_ranks import gather_over_ranks
from kd_lightning.functional.feature_losses import check_power, check_same_shape, without_padded
from kd_lightning.functional.rows import SCALES, Scale, check_option
from kd_lightning.functional.similarity_losses import check_views, contrast
from kd_lightning.functional.temperature import check_weights


class FeatureLoss(nn.Module):
    """Base of the losses between features. For a loss of your own without a temperature define ``forward``.

    Attributes:
        compares: The sizes that must agree between student and teacher, and that a
            :class:`~kd_lightning.LayerTerm` makes agree: ``"all"`` (channels and positions), ``"positions"``, or
            ``"samples"`` (no projector is needed). A loss that compares positions is called with ``mask=``, the tokens
            that count, where the inputs have an ``attention_mask``; the others are 0 in all features.

    Example:
        >>> import torch
        >>> class AbsoluteLoss(FeatureLoss):
        ...     compares = "all"
        ...     def forward(self, student_features, teacher_features, mask=None):
        ...         count = student_features.numel() if mask is None else mask.sum() * student_features.shape[-1]
        ...         return (student_features - teacher_features).abs().sum() / count
        >>> AbsoluteLoss()(torch.zeros(2, 3), torch.ones(2, 3))
        tensor(1.)
    """

    compares: ClassVar[Literal["all", "positions", "samples"]] = "all"

    @override
    def extra_repr(self) -> str:
        names = inspect.signature(type(self).__init__).parameters
        values = {name: getattr(self, name) for name in names if hasattr(self, name)}
        if "scale" in values and values["scale"] == getattr(self, "own_scale", None):
            del values["scale"]
        if values.get("sync") is False:  # as older checkpoints, which compare this text, do not have it
            del values["sync"]
        return ", ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value!r}" for name, value in values.items()
        )


class SoftFeatureLoss(FeatureLoss):
    """A loss between distributions at a temperature. For one of your own define ``logits``; the KL is the default.

    Attributes:
        own_scale: The scale where ``scale`` is None.

    Args:
        scale: The factor per row, as in :func:`~kd_lightning.functional.kd_loss`. None: ``own_scale``.

    Raises:
        ValueError: If ``scale`` has an unknown value.

    Example:
        >>> import torch
        >>> class OverChannels(SoftFeatureLoss):  # a distribution over the channels of a vector
        ...     def logits(self, student_features, teacher_features, mask=None):
        ...         return student_features, teacher_features
        >>> OverChannels()(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 2.0]]), 2.0)
        tensor(0.1054)
    """

    own_scale: ClassVar[Scale] = "student_teacher"

    def __init__(self, scale: Scale | None = None) -> None:
        super().__init__()
        scale = self.own_scale if scale is None else scale
        check_option("scale", scale, SCALES)
        self.scale: Scale = scale

    @abstractmethod
    def logits(self, student_features: Tensor, teacher_features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits ``(rows, classes)`` of student and teacher, which the temperature divides.

        A loss that compares positions takes a third argument ``mask=None``; see :class:`FeatureLoss`.
        """

    def compare(
        self, student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor | Temperature
    ) -> Tensor:
        """Return the loss between rows of logits, :func:`~kd_lightning.functional.kd_loss`."""
        return functional.kd_loss(student_logits, teacher_logits, temperature, scale=self.scale)

    @override
    def forward(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
        temperature: float | Tensor | Temperature,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; the temperature is in the layout of the rows, the mask without the channels."""
        given = {} if mask is None else {"mask": mask}
        return self.compare(*self.logits(student_features, teacher_features, **given), temperature)


class HintLoss(FeatureLoss):
    """Mean squared difference, as in FitNets: :func:`~kd_lightning.functional.hint_loss`.

    Example:
        >>> import torch
        >>> HintLoss()(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 5.0]]))
        tensor(4.5000)
    """

    @override
    def forward(self, student_features: Tensor, teacher_features: Tensor, mask: Tensor | None = None) -> Tensor:
        return functional.hint_loss(student_features, teacher_features, mask=mask)


class AttentionTransferLoss(FeatureLoss):
    """Difference of normalised attention maps (AT): :func:`~kd_lightning.functional.attention_transfer_loss`.

    Args:
        power: The exponent of the activations; at least 1.
    """

    compares = "positions"

    def __init__(self, power: float = 2.0) -> None:
        super().__init__()
        check_power(power)
        self.power = power

    @override
    def forward(self, student_features: Tensor, teacher_features: Tensor, mask: Tensor | None = None) -> Tensor:
        return functional.attention_transfer_loss(student_features, teacher_features, power=self.power, mask=mask)


class _BetweenSamples(nn.Module):
    """A loss between the samples of a batch, or of the batches of all ranks."""

    sync = False

    def samples(self, student_features: Tensor, teacher_features: Tensor, views: int = 1) -> tuple[Tensor, Tensor]:
        """Return the features of the samples that are compared."""
        if not (self.sync and self.training):
            return student_features, teacher_features
        return _of_all_ranks(student_features, views), _of_all_ranks(teacher_features.detach(), views)


def _of_all_ranks(features: Tensor, views: int) -> Tensor:
    """Return the samples of all ranks, the images first and then each of their views as in one batch."""
    gathered = gather_over_ranks(features)
    if views == 1 or len(gathered) == len(features):
        return gathered
    by_rank = gathered.unflatten(0, (len(gathered) // len(features), views, -1))
    return by_rank.transpose(0, 1).flatten(0, 2)


class SimilarityPreservingLoss(_BetweenSamples, FeatureLoss):
    """Difference of similarity matrices (SP): :func:`~kd_lightning.functional.similarity_preserving_loss`.

    Args:
        sync: Whether samples are compared with those of all ranks in training, as in one process; see
            :class:`SimilarityKDLoss`.
    """

    compares = "samples"

    def __init__(self, sync: bool = False) -> None:
        super().__init__()
        self.sync = bool(sync)

    @override
    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        student_features, teacher_features = self.samples(student_features, teacher_features)
        return functional.similarity_preserving_loss(student_features, teacher_features)


class RelationalLoss(_BetweenSamples, FeatureLoss):
    """Distances and angles within the batch (RKD): :func:`~kd_lightning.functional.relational_loss`.

    Args:
        distance_weight: Weight of the distances; 25 as published.
        angle_weight: Weight of the angles; 50 as published.
        sync: As in :class:`SimilarityKDLoss`.
    """

    compares = "samples"

    def __init__(self, distance_weight: float = 1.0, angle_weight: float = 2.0, sync: bool = False) -> None:
        super().__init__()
        check_weights(distance_weight=distance_weight, angle_weight=angle_weight)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight
        self.sync = bool(sync)

    @override
    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        student_features, teacher_features = self.samples(student_features, teacher_features)
        return functional.relational_loss(
            student_features, teacher_features, distance_weight=self.distance_weight, angle_weight=self.angle_weight
        )


class ChannelWiseKDLoss(SoftFeatureLoss):
    """Positions of each channel as a distribution (CWD): :func:`~kd_lightning.functional.channel_wise_kd_loss`."""

    @override
    def logits(
        self, student_features: Tensor, teacher_features: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        check_same_shape(student_features, teacher_features)
        student = functional.channel_logits(student_features, mask=mask)
        return student, functional.channel_logits(teacher_features, mask=mask)


class AttentionKDLoss(SoftFeatureLoss):
    """Spatial attention as a distribution: :func:`~kd_lightning.functional.attention_kd_loss`.

    Args:
        power: The exponent of the activations; at least 1.
        scale: As in :class:`SoftFeatureLoss`.
    """

    compares = "positions"

    def __init__(self, power: float = 2.0, scale: Scale | None = None) -> None:
        super().__init__(scale)
        check_power(power)
        self.power = power

    @override
    def logits(
        self, student_features: Tensor, teacher_features: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        student = functional.attention_logits(student_features, power=self.power, mask=mask)
        teacher = functional.attention_logits(teacher_features, power=self.power, mask=mask)
        check_same_shape(student, teacher, "attention maps")
        return student, teacher


class SimilarityKDLoss(_BetweenSamples, SoftFeatureLoss):
    """Similarity to the other samples as a distribution: :func:`~kd_lightning.functional.similarity_kd_loss`.

    Args:
        views: How many views of each image the batch is made of; with 2 or more it is SSKD's transfer term.
        scale: As in :class:`SoftFeatureLoss`.
        sync: Whether samples are compared with those of all ranks in training, as in one process. Each step costs
            two small all-reduces and an all-gather of both networks' features, and each of W ranks compares
            :math:`(W N)^2` pairs in place of :math:`N^2`; backward has no collective. The ranks need equally many
            samples, and the gradients are those to be averaged over ranks, as DDP does.
    """

    compares = "samples"

    def __init__(self, views: int = 1, scale: Scale | None = None, sync: bool = False) -> None:
        super().__init__(scale)
        check_views(views)
        self.views = views
        self.sync = bool(sync)

    @override
    def logits(self, student_features: Tensor, teacher_features: Tensor) -> tuple[Tensor, Tensor]:
        student_features, teacher_features = self.samples(student_features, teacher_features, self.views)
        student = functional.similarity_logits(student_features, views=self.views)
        return student, functional.similarity_logits(teacher_features, views=self.views)


class InfoNCELoss(_BetweenSamples, SoftFeatureLoss):
    """Contrast within the batch (CRD's idea): :func:`~kd_lightning.functional.info_nce_loss`. T = 0.07 as published.

    There is no T², and no ``scale``.

    Args:
        sync: Whether the negatives are those of all ranks; see :class:`SimilarityKDLoss`.
    """

    own_scale = "none"

    def __init__(self, sync: bool = False) -> None:
        super().__init__()
        self.sync = bool(sync)

    @override
    def logits(
        self, student_features: Tensor, teacher_features: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        student_features, teacher_features = (without_padded(x, mask) for x in (student_features, teacher_features))
        cosines = functional.info_nce_logits(*self.samples(student_features, teacher_features))
        return cosines, cosines

    @override
    def compare(
        self, student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor | Temperature
    ) -> Tensor:
        return contrast(student_logits, temperature)
