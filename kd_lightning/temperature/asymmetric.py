"""Policies that treat teacher and student differently."""

from __future__ import annotations

import math

from typing_extensions import Unpack, override

from kd_lightning.functional import Temperature, tempered_log_softmax
from kd_lightning.temperature.base import Bounds, TemperaturePolicy
from kd_lightning.temperature.scheduled import AnyTemperature, as_policy
from kd_lightning.temperature.signals import Signals


class AsymmetricTemperature(TemperaturePolicy):
    """One policy for the student, another for the teacher: ``T_s`` of the first, ``T_t`` of the second.

    The gradient's size is ``scale / T_s``. With the loss's default scale ``T_s · T_t`` it is ``T_t``, so raising only
    the teacher's temperature raises the weight of distillation; ``scale="none"`` in the loss is how TTM and TRL train.

    Args:
        student: Number, schedule or policy for the student.
        teacher: The same for the teacher.
        bounds: See :class:`TemperaturePolicy`.

    Raises:
        TypeError: If an argument is no number, schedule or policy.
        ValueError: On the call, if one of the policies gives several temperatures.

    Example:
        >>> import torch
        >>> policy = AsymmetricTemperature(student=1.0, teacher=4.0)
        >>> policy(Signals(torch.zeros(2, 3), torch.zeros(2, 3)))
        Temperature(student=tensor([1.]), teacher=tensor([4.]), scale=None)
    """

    reads_logits = False

    def __init__(self, student: AnyTemperature = 1.0, teacher: AnyTemperature = 4.0, **bounds: Unpack[Bounds]) -> None:
        super().__init__(**bounds)
        self.student = as_policy(student)
        self.teacher = as_policy(teacher)

    @override
    def compute(self, signals: Signals) -> Temperature:
        student, teacher = self.student(signals), self.teacher(signals)
        if not (isinstance(student, Temperature) and isinstance(teacher, Temperature)):
            raise ValueError(
                "AsymmetricTemperature joins policies of one temperature each, got one that gives several."
            )
        return Temperature(student=student.student, teacher=teacher.teacher)


class TransformedTeacherTemperature(TemperaturePolicy):
    r"""TTM: the temperature softens the teacher only, the student trains at T = 1.

    .. math::
        T_s = 1, \qquad T_t = 1 / \gamma, \qquad \text{loss scale } 1
        \quad\Longleftrightarrow\quad
        L = \mathrm{KL}\Big( \frac{p_t^\gamma}{\sum_k p_{t,k}^\gamma} \,\Big\|\, p_s \Big)

    with :math:`p = \mathrm{softmax}(z)` at temperature 1: a power transform of the teacher's probabilities. Taking the
    student's temperature away amounts to a Rényi-entropy regulariser on top of usual distillation. With
    ``weighted=True`` (WTTM) the loss scale of sample i is

    .. math:: w_i = \sum_k p_{t,ik}^{\gamma}

    between 1 (a certain teacher) and :math:`C^{1 - \gamma}` (an undecided one): uncertain samples count more.

    Shapes:
        T_s and T_t ``(1,)``; scale ``(1,)``, or with ``weighted=True`` ``(…, 1)`` for logits ``(…, C)``.

    Args:
        gamma: :math:`\gamma`. 1 is the plain softmax (T = 1 on both sides); towards 0 the targets become uniform; above
            1 sharper than the teacher.
        weighted: Whether each sample is weighted by w (WTTM).
        bounds: See :class:`TemperaturePolicy`.

    Raises:
        ValueError: If ``gamma`` is not positive, or ``1 / gamma`` lies outside the bounds.

    Suggested values: γ = 0.25 is the usual T = 4; the authors' WTTM example has γ = 0.2. Without the factor T²
    ``kd_weight`` must be larger: they use 36 to 45 for TTM, and 4 for WTTM, whose weight w does part of that.

    Interacts badly with: the ``kd_weight`` of a constant-T recipe (0.9), with which distillation almost vanishes; and
    with ``weighted=True`` and thousands of classes a scale of hundreds.

    Source: K. Zheng, E.-H. Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024, arXiv
    2402.11148.

    Example:
        >>> import torch
        >>> policy = TransformedTeacherTemperature(gamma=0.25)
        >>> policy(Signals(torch.zeros(2, 3), torch.zeros(2, 3)))
        Temperature(student=tensor([1.]), teacher=tensor([4.]), scale=tensor([1.]))
        >>> policy = TransformedTeacherTemperature(gamma=0.5, weighted=True)
        >>> policy(Signals(torch.zeros(1, 4), torch.zeros(1, 4))).scale  # 4 · (1/4)^0.5
        tensor([[2.]])
    """

    def __init__(self, gamma: float = 0.25, weighted: bool = False, **bounds: Unpack[Bounds]) -> None:
        super().__init__(**bounds)
        if not 0 < gamma < math.inf:
            raise ValueError(f"gamma must be a positive, finite number, got {gamma}. Usual values are 0.1 to 0.5.")
        self._check_within_bounds(**{"1 / gamma": 1.0 / gamma})
        self.gamma = float(gamma)
        self.weighted = bool(weighted)

    @override
    def compute(self, signals: Signals) -> Temperature:
        student = signals.full(1.0)
        if not self.weighted:
            return Temperature(student=student, teacher=student / self.gamma, scale=student)
        weight = (self.gamma * tempered_log_softmax(signals.teacher_logits, 1.0)).exp().sum(-1, keepdim=True)
        return Temperature(student=student, teacher=student / self.gamma, scale=weight)
