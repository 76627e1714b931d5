"""Policies that set a temperature from the logits' spread or maximum: shape ``(N, 1)``, for tokens ``(B, L, 1)``."""

from __future__ import annotations

import math

from torch import Tensor
from typing_extensions import Unpack, override

from kd_lightning.functional import Temperature
from kd_lightning.temperature.base import Bounds, TemperaturePolicy
from kd_lightning.temperature.signals import Signals
from kd_lightning.temperature.statistics import centre, check_class_count, standard_deviation


class LogitStdTemperature(TemperaturePolicy):
    r"""NormKD: each distribution's temperature is a multiple of its own logits' standard deviation.

    .. math:: T_t = k \, \mathrm{std}(z_t), \qquad T_s = k \, \mathrm{std}(z_s), \qquad \text{loss scale } T_t^2

    with the unbiased standard deviation over the classes of each sample (those not masked with −inf).

    Shapes:
        Logits ``(…, C)`` with C ≥ 3 → T_s, T_t and scale ``(…, 1)``.

    Args:
        factor: :math:`k`; positive. Small: sharp targets; large: soft ones. The softened logits ``z / T`` always have
            standard deviation ``1 / k``.
        detach: Whether the student's standard deviation is a constant for the gradient. False, as published, lets the
            student lower the loss through its own spread too.
        bounds: See :class:`TemperaturePolicy`; constant logits (std 0) reach the lower one.

    Raises:
        ValueError: If the factor is not positive; on the call, if there are fewer than three classes.

    Suggested values: 2 on CIFAR-100 (cross-entropy weight 0.1, distillation 0.9); 1 on ImageNet (0.5 and 0.5).

    Interacts badly with: a loss weight tuned for constant T, since teachers with large logits get a large scale
    ``T_t²``; compare by the logged ``kd_weight · scale``.

    Source: Z. Chi et al., "NormKD: Normalized Logits for Knowledge Distillation", 2023, arXiv 2308.00520. Formula and
    values after the authors' code.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[3.0, 0.0, -3.0]])  # standard deviation 3
        >>> LogitStdTemperature(factor=2.0)(Signals(logits / 3, logits))
        Temperature(student=tensor([[2.]]), teacher=tensor([[6.]]), scale=tensor([[36.]]))
    """

    def __init__(self, factor: float = 2.0, detach: bool = False, **bounds: Unpack[Bounds]) -> None:
        super().__init__(**bounds)
        if not 0 < factor < math.inf:
            raise ValueError(f"factor must be a positive, finite number, got {factor}. The authors use 0.5 to 2.")
        self.factor = float(factor)
        self.detach = bool(detach)

    @override
    def compute(self, signals: Signals) -> Temperature:
        check_class_count(signals.student_logits, type(self).__name__)
        student_logits = signals.student_logits.detach() if self.detach else signals.student_logits
        return Temperature(
            student=self.factor * standard_deviation(student_logits),
            teacher=self.factor * standard_deviation(signals.teacher_logits),
        )

    @override
    def loss_scale(self, temperature: Temperature) -> Tensor:
        return temperature.teacher.square()


class LogitStandardization(TemperaturePolicy):
    r"""Z-scores of both logits before the softmax: only their pattern is distilled, not their size.

    .. math::
        p = \mathrm{softmax}\Big( \frac{1}{T} \cdot \frac{z - \bar z}{\mathrm{std}(z) + \varepsilon} \Big)
        \quad\Longleftrightarrow\quad
        T_s = T (\mathrm{std}(z_s) + \varepsilon), \quad T_t = T (\mathrm{std}(z_t) + \varepsilon),
        \qquad \text{loss scale } T^2

    with the mean :math:`\bar z` and the unbiased standard deviation over the classes of each sample (those not masked
    with −inf) and :math:`\varepsilon = 10^{-7}`. The softmax does not see the mean, so this is a temperature. The
    gradient flows through the student's standard deviation, as published.

    Shapes:
        Logits ``(…, C)`` with C ≥ 3 → T_s, T_t ``(…, 1)``, scale ``(1,)``.

    Args:
        temperature: :math:`T` on the standardised logits; positive. Since their standard deviation is 1, T = 2 is
            already soft.
        bounds: Bounds of ``T · std``, see :class:`TemperaturePolicy`. Beyond them logits are no longer standardised.

    Raises:
        ValueError: If a temperature is not positive; on the call, if there are fewer than three classes.

    Suggested values: T = 2 with ``kd_weight=9, task_weight=1`` (the authors' CIFAR-100 setting for most pairs).

    Interacts badly with: a comparison that leaves the weight alone: the published gain compares ``kd_weight · scale``
    of 9 · 2² = 36 with the baseline's 0.9 · 4² = 14.4; and losses that need the logits' size, such as regression.

    Source: S. Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv 2403.01427.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[3.0, 0.0, -3.0]])  # standard deviation 3
        >>> LogitStandardization(temperature=2.0)(Signals(logits / 3, logits))
        Temperature(student=tensor([[2...]]), teacher=tensor([[6...]]), scale=tensor([4.]))
    """

    epsilon = 1e-7

    def __init__(self, temperature: float = 2.0, **bounds: Unpack[Bounds]) -> None:
        super().__init__(**bounds)
        self._check_within_bounds(temperature=temperature)
        self.temperature = float(temperature)

    @override
    def compute(self, signals: Signals) -> Temperature:
        student_logits, teacher_logits = signals.student_logits, signals.teacher_logits
        check_class_count(student_logits, type(self).__name__)
        return Temperature(
            student=self.temperature * (standard_deviation(student_logits) + self.epsilon),
            teacher=self.temperature * (standard_deviation(teacher_logits) + self.epsilon),
            scale=student_logits.new_full((1,), self.temperature**2),
        )


class SharpnessTemperature(TemperaturePolicy):
    r"""DTKD: the sharper of the two distributions gets the higher temperature, their mean stays.

    .. math::
        T_s = \frac{2 m_s}{m_t + m_s} \, T, \qquad T_t = \frac{2 m_t}{m_t + m_s} \, T,
        \qquad \text{loss scale } T_s \, T_t, \qquad m = \max_k (z_k - \bar z)

    with the mean :math:`\bar z` over the classes of each sample. **As published**, :math:`m = \max_k z_k` without the
    mean: then T changes when a constant is added to all logits (the softmax does not), goes to infinity where the two
    maxima cancel, and is negative beyond. Centred logits have :math:`m \ge 0`, so that :math:`0 \le T_s, T_t \le 2T`
    (the bounds keep off 0). Logits whose mean is 0 give the published values.

    Shapes:
        Logits ``(…, C)`` → T_s, T_t and scale ``(…, 1)``. Where both logits are constant, T for both.

    Args:
        temperature: :math:`T`, the mean of the two; positive.
        detach: Whether the temperatures are constants for the gradient. False, as published, lets the student lower
            the loss through its own sharpness too.
        bounds: See :class:`TemperaturePolicy`.

    Raises:
        ValueError: If a temperature is outside the bounds.

    Suggested values: T = 4 (the authors; their loss adds this term with weight 3, constant-T distillation with weight
    1 and cross-entropy with weight 1, warmed up over 20 epochs). ``MultiTemperature([SharpnessTemperature(4.0), 4.0])``
    adds the two with equal weights.

    Interacts badly with: a student at the start of training, whose nearly constant logits make T_s nearly 0 and the
    gradient ``scale / T_s = T_t ≈ 2T`` twice as large. A warm-up of the loss weight, as published, covers that.

    Source: Y. Wei, Y. Bai, "Dynamic Temperature Knowledge Distillation", 2024, arXiv 2404.12711. The paper measures
    sharpness by logsumexp, its code by the maximum, which is the formula here; its authors note that the derivation
    (Eq. 4 and 5) is wrong and that only the results stand.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[3.0, 0.0, -3.0]])
        >>> SharpnessTemperature(temperature=4.0)(Signals(student, teacher))
        Temperature(student=tensor([[2...]]), teacher=tensor([[6...]]), scale=tensor([[12...]]))
    """

    epsilon = 1e-7  # decides where both logits are constant, and changes nothing else

    def __init__(self, temperature: float = 4.0, detach: bool = False, **bounds: Unpack[Bounds]) -> None:
        super().__init__(**bounds)
        self._check_within_bounds(temperature=temperature)
        self.temperature = float(temperature)
        self.detach = bool(detach)

    @override
    def compute(self, signals: Signals) -> Temperature:
        student_logits = signals.student_logits.detach() if self.detach else signals.student_logits
        student = centre(student_logits).amax(-1, keepdim=True) + self.epsilon
        teacher = centre(signals.teacher_logits).amax(-1, keepdim=True) + self.epsilon
        both = student + teacher
        return Temperature(
            student=2.0 * self.temperature * student / both, teacher=2.0 * self.temperature * teacher / both
        )

    @override
    def loss_scale(self, temperature: Temperature) -> Tensor:
        return temperature.student * temperature.teacher


class MaxLogitTemperature(TemperaturePolicy):
    r"""CIST's rule: each distribution's temperature is its own largest logit over a constant ratio.

    .. math:: T_s = \frac{m_s}{r}, \qquad T_t = \frac{m_t}{r}, \qquad m = \max_k (z_k - \bar z)

    with the mean :math:`\bar z` over the classes of each sample (those not masked with −inf). The entropy of a softened
    distribution is governed by the ratio of the largest logit to T, so that all samples get targets of about the same
    entropy. **As published** the logits are not centred; then T changes when a constant is added to all of them, which
    the softmax does not see. The student's temperature is a constant for the gradient.

    Shapes:
        Logits ``(…, C)`` → T_s, T_t ``(…, 1)``.

    Args:
        ratio: :math:`r`, the largest logit after the division by T; positive. Small: soft targets; large: sharp ones.
        bounds: See :class:`TemperaturePolicy`; constant logits (m = 0) reach the lower one.

    Raises:
        ValueError: If the ratio is not positive and finite.

    Suggested values: what the usual T makes of the usual logit. A teacher whose largest logits are about 14 has the
    ratio 3.5 at T = 4.

    Interacts badly with: a student at the start of training, whose logits are nearly constant, so that T_s is at its
    lower bound; and a loss weight tuned for constant T, since the loss's ``T_s T_t`` differs between samples:
    ``KDLoss(scale="none")`` switches that off.

    Source: H.-C. Luong et al., "Consistently Informative Soft-Label Temperature for Knowledge Distillation", 2026,
    arXiv 2605.20357, as its abstract describes the temperatures. Its weights of samples, by the teacher's confidence
    and the student's difficulty, are left out, since their equation was not available.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[6.0, 0.0, -6.0]])
        >>> MaxLogitTemperature(ratio=2.0)(Signals(student, teacher))
        Temperature(student=tensor([[0.5000]]), teacher=tensor([[3.]]), scale=None)
    """

    def __init__(self, ratio: float, **bounds: Unpack[Bounds]) -> None:
        super().__init__(**bounds)
        if not 0 < ratio < math.inf:
            raise ValueError(
                f"ratio is the largest logit after the division by T and must be positive and finite, got {ratio}. "
                "3.5 makes T = 4 of a logit of 14."
            )
        self.ratio = float(ratio)

    @override
    def compute(self, signals: Signals) -> Temperature:
        student, teacher = (
            centre(logits).amax(-1, keepdim=True).clamp(min=0.0) / self.ratio  # rounding may leave it below 0
            for logits in (signals.student_logits.detach(), signals.teacher_logits)
        )
        return Temperature(student, teacher)
