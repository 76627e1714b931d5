"""Policies that give every sample its own temperature, from its logits: shape ``(N, 1)``, for tokens ``(B, L, 1)``."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from kd_lightning.functional import Temperature, predictive_entropy
from kd_lightning.functional.masks import masked_classes
from kd_lightning.temperature.base import Bounds, TemperaturePolicy
from kd_lightning.temperature.signals import Signals
from kd_lightning.temperature.statistics import centre, class_targets, mean_over_valid


class ConfidenceTemperature(TemperaturePolicy):
    r"""One temperature where the teacher is confident, another where it is not.

    With the teacher's confidence :math:`m = \max_k \mathrm{softmax}(z_t)_k` at temperature 1 and the threshold
    :math:`\theta`,

    .. math::
        T = \begin{cases} T_\text{confident} & m > \theta \\ T_\text{unsure} & \text{otherwise} \end{cases}
        \qquad\text{or, with softness } \sigma > 0,\qquad
        T = T_\text{unsure} + (T_\text{confident} - T_\text{unsure}) \, \mathrm{sigmoid}\frac{m - \theta}{\sigma}

    for student and teacher alike.

    Shapes:
        Logits ``(…, C)`` → T ``(…, 1)``.

    Args:
        threshold: :math:`\theta` in [0, 1]. 0: every sample counts as confident; 1: none does.
        confident: T of the confident samples. Below 1 their targets become harder than the teacher's own, close to
            labels; above 1 softer.
        unsure: T of the others. Swap the two values for the opposite rule.
        softness: :math:`\sigma`, in units of probability. 0 is a switch; 0.05 spreads it over about ±0.1 around the
            threshold; large values give every sample the middle of the two.
        bounds: See :class:`TemperaturePolicy`.

    Raises:
        ValueError: If the threshold is outside [0, 1], the softness negative, or a temperature outside the bounds.

    Suggested values: the defaults keep confident samples sharp; try ``confident=1`` and ``unsure=4`` first, which is
    nearer to what constant T does on CIFAR-100. A threshold near the median of m splits the batch in halves.

    Interacts badly with: an over-confident teacher, for which nearly all samples pass; and the T² factor, which weighs
    an unsure sample ``(unsure / confident)²`` times as much, 16 by default (``KDLoss(scale="none")``: once).

    Source: the thresholding of pseudo-labels (K. Sohn et al., "FixMatch", NeurIPS 2020, arXiv 2001.07685), turned into
    a temperature here. No published evidence as a temperature rule.

    Example:
        >>> policy = ConfidenceTemperature(threshold=0.9, confident=0.5, unsure=2.0)
        >>> teacher_logits = torch.tensor([[9.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
        >>> policy(Signals(torch.zeros(2, 3), teacher_logits)).student
        tensor([[0.5000],
                [2.0000]])
    """

    def __init__(
        self,
        threshold: float = 0.9,
        confident: float = 0.5,
        unsure: float = 2.0,
        softness: float = 0.0,
        **bounds: Unpack[Bounds],
    ) -> None:
        super().__init__(**bounds)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is a probability in [0, 1], got {threshold}.")
        if not 0 <= softness < math.inf:
            raise ValueError(f"softness must be a finite number, 0 (a switch) or above, got {softness}.")
        self._check_within_bounds(confident=confident, unsure=unsure)
        self.threshold = float(threshold)
        self.confident = float(confident)
        self.unsure = float(unsure)
        self.softness = float(softness)

    @override
    def compute(self, signals: Signals) -> Temperature:
        margin = signals.teacher_logits.softmax(-1).amax(-1, keepdim=True) - self.threshold
        if self.softness > 0:
            temperature = torch.lerp(
                torch.full_like(margin, self.unsure),
                torch.full_like(margin, self.confident),
                torch.sigmoid(margin / self.softness),
            )
        else:
            temperature = torch.where(margin > 0, signals.full(self.confident), signals.full(self.unsure))
        return Temperature(student=temperature, teacher=temperature)


class EntropyTemperature(TemperaturePolicy):
    r"""The less certain the teacher, the higher the temperature.

    .. math:: T = T_\min + (T_\max - T_\min) \, \frac{H(\mathrm{softmax}(z_t))}{\log C}

    for student and teacher alike, with the entropy :math:`H` of the teacher's distribution at temperature 1 and the
    number of classes :math:`C` (those not masked with −inf).

    Shapes:
        Logits ``(…, C)`` → T ``(…, 1)``.

    Args:
        min_value: T of a sample on which the teacher is certain (entropy 0).
        max_value: T of a sample on which the teacher is undecided (uniform).
        bounds: See :class:`TemperaturePolicy`.

    Raises:
        ValueError: If ``min_value > max_value``, or one of them is outside the bounds.

    Suggested values: ``min_value=2, max_value=6`` brackets the usual T = 4. Equal values give a constant. A
    teacher is nearly certain on its own training data, so look at the logged mean rather than at ``max_value``.

    Interacts badly with: the T² factor, which gives the uncertain samples the larger weight
    (``KDLoss(scale="none")`` switches that off); teachers trained with label smoothing, whose entropy is nearly the
    same everywhere.

    Source: entropy as the measure of a teacher's certainty is folklore; this linear rule is ours, without published
    evidence.

    Example:
        >>> policy = EntropyTemperature(min_value=2.0, max_value=6.0)
        >>> teacher_logits = torch.tensor([[100.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> policy(Signals(torch.zeros(2, 3), teacher_logits)).student
        tensor([[2.],
                [6.]])
    """

    def __init__(self, min_value: float = 2.0, max_value: float = 6.0, **bounds: Unpack[Bounds]) -> None:
        super().__init__(**bounds)
        self._set_range(min_value, max_value)

    @override
    def compute(self, signals: Signals) -> Temperature:
        logits = signals.teacher_logits
        entropy = predictive_entropy(logits).unsqueeze(-1)
        num_classes = (~masked_classes(logits)).sum(-1, keepdim=True).clamp(min=2)
        return self._within_range((entropy / num_classes.to(entropy.dtype).log()).clamp(0.0, 1.0))


class DisagreementTemperature(TemperaturePolicy):
    r"""TextBrewer's rules: a sample that stands out from the batch gets a lower temperature.

    .. math:: T = T_0 + \beta \, (\bar w - w)

    for student and teacher alike, with :math:`\bar w` the mean of :math:`w` over the valid positions of the batch, and

    * ``by="cosine"`` (FLSW): :math:`w = (1 - \cos(z_s, z_t) + 10^{-4})^\gamma`, large where the two disagree;
    * ``by="confidence"`` (CWSM, its twin): :math:`w = 1 / (\max_k p_{s,k} + 10^{-3})` with
      :math:`p_s = \mathrm{softmax}(z_s)`, large where the student is unsure.

    No gradient flows through T. The cosine is that of the centred logits (their correlation): **as published**, with
    ``center=False``, it changes when a constant is added to all logits, which the softmax does not see.

    Shapes:
        Logits ``(…, C)`` → T ``(…, 1)``. The mean is over the batch of this rank, unless ``sync``.

    Args:
        beta: :math:`\beta`, the strength. 0 is constant T; positive lowers T where w is above the mean; negative
            raises it there.
        gamma: :math:`\gamma > 0`. Below 1 brings out small disagreements, above 1 large ones. Only for ``"cosine"``.
        base: :math:`T_0`, the mean of T over the batch as long as no sample reaches a bound.
        by: ``"cosine"`` or ``"confidence"``.
        center: Whether the cosine is taken of centred logits.
        sync: Whether the mean is over the batches of all ranks in training, as one process would have it. Costs an
            all-reduce of two numbers a step.
        bounds: See :class:`TemperaturePolicy`.

    Raises:
        ValueError: If ``base`` is outside the bounds, ``gamma`` not positive, ``beta`` not finite, or ``by`` unknown.

    Suggested values: the authors list β of 10 to 80 and γ of 0.25 to 1. With w between 0 and 1.4, β of 2 to 4 keeps
    T positive for nearly every sample; raise ``min_temperature`` to 1 for larger ones.

    Interacts badly with: small batches (the mean jumps) and batch statistics in general: the T of a sample depends on
    the others. The publication uses no T² factor; ``KDLoss(scale="none")`` is how it trained.

    Source: Z. Yang et al., "TextBrewer: An Open-Source Knowledge Distillation Toolkit for NLP", ACL 2020 (system
    demonstrations), arXiv 2002.12620.

    Example:
        >>> student = torch.tensor([[1.0, 0.0, -1.0], [-1.0, 0.0, 1.0]])
        >>> teacher = torch.tensor([[1.0, 0.0, -1.0], [1.0, 0.0, -1.0]])  # agrees; disagrees
        >>> DisagreementTemperature(beta=1.0, gamma=1.0, base=4.0)(Signals(student, teacher)).student
        tensor([[5.],
                [3.]])
    """

    def __init__(
        self,
        beta: float = 2.0,
        gamma: float = 1.0,
        base: float = 4.0,
        by: Literal["cosine", "confidence"] = "cosine",
        center: bool = True,
        sync: bool = False,
        **bounds: Unpack[Bounds],
    ) -> None:
        super().__init__(**bounds)
        self._check_within_bounds(base=base)
        if not math.isfinite(beta):
            raise ValueError(f"beta must be a finite number, got {beta}.")
        if not 0 < gamma < math.inf:
            raise ValueError(f"gamma must be a positive, finite number, got {gamma}.")
        if by not in ("cosine", "confidence"):
            raise ValueError(f"by must be 'cosine' or 'confidence', got {by!r}.")
        self.beta = float(beta)
        self.gamma = float(gamma)
        self.base = float(base)
        self.by: Literal["cosine", "confidence"] = by
        self.center = bool(center)
        self.sync = bool(sync)

    @override
    @torch.no_grad()
    def compute(self, signals: Signals) -> Temperature:
        if self.by == "cosine":
            weight = (1.0 - self._cosine(signals) + 1e-4).pow(self.gamma)
        else:
            weight = 1.0 / (signals.student_logits.softmax(-1).amax(-1, keepdim=True) + 1e-3)
        mean = mean_over_valid(weight, signals.valid, self.sync and self.training)
        temperature = self.base + self.beta * (mean - weight)
        temperature = temperature.clamp(min=0.0)  # a large beta makes it negative; the bounds do the rest
        return Temperature(student=temperature, teacher=temperature)

    def _cosine(self, signals: Signals) -> Tensor:
        def direction(logits: Tensor) -> Tensor:
            logits = (centre(logits) if self.center else logits).masked_fill(masked_classes(logits), 0.0)
            return logits / logits.norm(dim=-1, keepdim=True).clamp(min=1e-12)

        cosine = (direction(signals.student_logits) * direction(signals.teacher_logits)).sum(-1, keepdim=True)
        return cosine.clamp(-1.0, 1.0)


class TargetConfidenceTemperature(TemperaturePolicy):
    r"""Temperature from the probability that the teacher gives the label.

    .. math:: T = T_\min + \tfrac12 \big( 1 + \beta \cos(\pi (1 - p_t[y])) \big) (T_\max - T_\min)

    for student and teacher alike, with the teacher's probability :math:`p_t[y]` of the label :math:`y` at temperature
    1. With :math:`\beta = 1` a label the teacher is sure of gets :math:`T_\max`, one it rules out :math:`T_\min`.

    Shapes:
        Logits ``(…, C)``, targets ``(…)`` → T ``(…, 1)``.

    Args:
        min_value: :math:`T_\min`.
        max_value: :math:`T_\max`.
        beta: :math:`\beta` in [−1, 1]. 0: the middle of the two throughout; −1: the opposite direction, hottest where
            the teacher misses the label.
        bounds: See :class:`TemperaturePolicy`.

    Raises:
        ValueError: If ``min_value > max_value``, one of them is outside the bounds, or ``beta`` is outside [−1, 1]; on
            the call, if the targets are no class indices.

    Suggested values: ``min_value=2, max_value=6`` brackets the usual T = 4.

    Interacts badly with: mixed labels (MixUp, CutMix, soft targets), which have no y; a teacher that fits the training
    set, for which p_t[y] ≈ 1 and T ≈ T_max everywhere. The publication multiplies the loss by the squared batch mean
    of T; the loss's default here is T² per sample.

    Source: the hand-set rule ("manual") that the authors of "Instance Temperature Knowledge Distillation", 2024, arXiv
    2407.00115, compare with, in their code.

    Example:
        >>> policy = TargetConfidenceTemperature(min_value=2.0, max_value=6.0)
        >>> teacher_logits = torch.tensor([[50.0, 0.0], [50.0, 0.0], [0.0, 0.0]])
        >>> policy(Signals(torch.zeros(3, 2), teacher_logits, targets=torch.tensor([0, 1, 0]))).student
        tensor([[6.],
                [2.],
                [4.]])
    """

    def __init__(
        self, min_value: float = 2.0, max_value: float = 6.0, beta: float = 1.0, **bounds: Unpack[Bounds]
    ) -> None:
        super().__init__(**bounds)
        self._set_range(min_value, max_value)
        if not -1 <= beta <= 1:
            raise ValueError(f"beta must lie in [-1, 1], got {beta}.")
        self.beta = float(beta)

    @override
    def compute(self, signals: Signals) -> Temperature:
        targets = class_targets(signals, type(self).__name__)
        p_target = signals.teacher_logits.softmax(-1).gather(-1, targets.unsqueeze(-1))
        return self._within_range(0.5 * (1.0 + self.beta * torch.cos(math.pi * (1.0 - p_target))))
