"""Losses between the features of student and teacher: options in the constructor, one call into functional.

Equations, shapes and sources are those of the functions of the same name in :mod:`kd_lightning.functional`. A
:class:`~kd_lightning.LayerTerm` puts a feature loss between a layer of the student and a layer of the teacher.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal, get_args

from torch import Tensor, nn
from typing_extensions import override

from kd_lightning import functional
from kd_lightning.functional import Temperature
from kd_lightning.functional.feature_losses import check_power, check_same_shape
from kd_lightning.functional.rows import Scale
from kd_lightning.functional.similarity_losses import check_views, contrast
from kd_lightning.functional.temperature import check_weights

__all__ = [
    "AttentionKDLoss",
    "AttentionTransferLoss",
    "ChannelWiseKDLoss",
    "FeatureLoss",
    "HintLoss",
    "InfoNCELoss",
    "RelationalLoss",
    "SimilarityKDLoss",
    "SimilarityPreservingLoss",
    "SoftFeatureLoss",
]


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
        if scale not in get_args(Scale):
            raise ValueError(f"scale must be one of {', '.join(map(repr, get_args(Scale)))}, got {scale!r}.")
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

    @override
    def extra_repr(self) -> str:
        return "" if self.scale == self.own_scale else f"scale={self.scale!r}"


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

    @override
    def extra_repr(self) -> str:
        return f"power={self.power:g}"


class SimilarityPreservingLoss(FeatureLoss):
    """Difference of similarity matrices (SP): :func:`~kd_lightning.functional.similarity_preserving_loss`."""

    compares = "samples"

    @override
    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        return functional.similarity_preserving_loss(student_features, teacher_features)


class RelationalLoss(FeatureLoss):
    """Distances and angles within the batch (RKD): :func:`~kd_lightning.functional.relational_loss`.

    Args:
        distance_weight: Weight of the distances; 25 as published.
        angle_weight: Weight of the angles; 50 as published.
    """

    compares = "samples"

    def __init__(self, distance_weight: float = 1.0, angle_weight: float = 2.0) -> None:
        super().__init__()
        check_weights(distance_weight=distance_weight, angle_weight=angle_weight)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    @override
    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        return functional.relational_loss(
            student_features, teacher_features, distance_weight=self.distance_weight, angle_weight=self.angle_weight
        )

    @override
    def extra_repr(self) -> str:
        return f"distance_weight={self.distance_weight:g}, angle_weight={self.angle_weight:g}"


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

    @override
    def extra_repr(self) -> str:
        return ", ".join(filter(None, (f"power={self.power:g}", super().extra_repr())))


class SimilarityKDLoss(SoftFeatureLoss):
    """Similarity to the other samples as a distribution: :func:`~kd_lightning.functional.similarity_kd_loss`.

    Args:
        views: How many views of each image the batch is made of; with 2 or more it is SSKD's transfer term.
        scale: As in :class:`SoftFeatureLoss`.
    """

    compares = "samples"

    def __init__(self, views: int = 1, scale: Scale | None = None) -> None:
        super().__init__(scale)
        check_views(views)
        self.views = views

    @override
    def logits(self, student_features: Tensor, teacher_features: Tensor) -> tuple[Tensor, Tensor]:
        student = functional.similarity_logits(student_features, views=self.views)
        return student, functional.similarity_logits(teacher_features, views=self.views)

    @override
    def extra_repr(self) -> str:
        return ", ".join(filter(None, (f"views={self.views}", super().extra_repr())))


class InfoNCELoss(SoftFeatureLoss):
    """Contrast within the batch (CRD's idea): :func:`~kd_lightning.functional.info_nce_loss`. T = 0.07 as published.

    There is no T², and no ``scale``.
    """

    own_scale = "none"

    def __init__(self) -> None:
        super().__init__()

    @override
    def logits(self, student_features: Tensor, teacher_features: Tensor) -> tuple[Tensor, Tensor]:
        cosines = functional.info_nce_logits(student_features, teacher_features)
        return cosines, cosines

    @override
    def compare(
        self, student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor | Temperature
    ) -> Tensor:
        return contrast(student_logits, temperature)
