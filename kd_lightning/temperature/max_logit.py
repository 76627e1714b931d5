"""The temperature that gives every sample the same largest logit."""

from __future__ import annotations

import math

from typing_extensions import Unpack, override

from kd_lightning.functional import Temperature
from kd_lightning.temperature.base import Bounds, TemperaturePolicy
from kd_lightning.temperature.signals import Signals
from kd_lightning.temperature.statistics import centre


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
    arXiv 2605.20357, as its abstract describes the temperatures. The paper also weighs samples by the teacher's
    confidence and the student's difficulty; the equation of these weights was not available, so that this policy has
    none beyond the loss's ``T_s T_t``.

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
