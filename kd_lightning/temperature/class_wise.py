"""Policies that give every class its own temperature: shape ``(1, C)`` or, by label, ``(N, C)``.

A temperature that differs between classes sees a constant added to all logits, which the softmax does not: the loss
gets centred logits from these policies (``transform``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from kd_lightning.functional import Temperature
from kd_lightning.temperature.base import Bounds, TemperaturePolicy
from kd_lightning.temperature.signals import Signals
from kd_lightning.temperature.statistics import centre, class_targets


class ClassFrequencyTemperature(TemperaturePolicy):
    r"""Long-tailed data: each class's temperature follows from how often it occurs.

    .. math::
        T_c = T_\min + (T_\max - T_\min) \, r_c, \qquad
        r_c = \frac{\log n_\max - \log n_c}{\log n_\max - \log n_\min}

    for student and teacher alike, with the number :math:`n_c` of training samples of class c, so that the most
    frequent class has :math:`r = 0` and the rarest :math:`r = 1` (``direction="rare_high"``); ``"rare_low"`` takes
    :math:`1 - r_c`. Equally frequent classes all get the middle, :math:`r = ½`. A class without samples counts as the
    rarest class that has some. The loss sees logits centred over the classes, and its scale is the mean of T² over
    them.

    Shapes:
        Logits ``(…, C)`` → T ``(1, …, 1, C)`` of the same rank.

    Args:
        class_counts: :math:`n_c`, C numbers. None: taken from the data module's attribute ``class_counts`` before
            training, or from the checkpoint.
        min_value: :math:`T_\min`, of the most frequent class (``"rare_high"``).
        max_value: :math:`T_\max`, of the rarest.
        direction: ``"rare_high"``: rare classes hotter, their logits differ less from the others'; ``"rare_low"``: rare
            classes sharper.
        bounds: See :class:`TemperaturePolicy`.

    Raises:
        ValueError: If counts are negative, not finite, fewer than two or all zero, ``min_value > max_value``, one of
            them is outside the bounds, or the direction is unknown; on the call, if there are no counts, or not as many
            as classes.

    Suggested values: none are published; keep the range narrow (2 to 6) and try both directions.

    Interacts badly with: other long-tail remedies (re-sampling, logit adjustment, re-weighting), which correct for the
    same counts. A T of its own also moves a class's share of the softmax: the targets change, not only their softness.

    Source: no published evidence for this rule. Its relatives contradict each other, so the direction is an argument:
    RIDE (ICLR 2021, arXiv 2010.01809) has frequent classes hotter in a repulsive term between experts, TAM (graphs)
    rare ones, and A. Kukleva et al. (ICLR 2023, arXiv 2303.13664) find small T good for rare classes.

    Example:
        >>> policy = ClassFrequencyTemperature([1000, 100, 10], min_value=2.0, max_value=6.0)
        >>> policy(Signals(torch.zeros(2, 3), torch.zeros(2, 3))).student
        tensor([[2., 4., 6.]])
    """

    reads_logits = False
    class_counts: Tensor

    def __init__(
        self,
        class_counts: Sequence[float] | Tensor | None = None,
        min_value: float = 2.0,
        max_value: float = 6.0,
        direction: Literal["rare_high", "rare_low"] = "rare_high",
        **bounds: Unpack[Bounds],
    ) -> None:
        super().__init__(**bounds)
        self._set_range(min_value, max_value)
        if direction not in ("rare_high", "rare_low"):
            raise ValueError(f"direction must be 'rare_high' or 'rare_low', got {direction!r}.")
        self.direction: Literal["rare_high", "rare_low"] = direction
        self._given = class_counts is not None
        counts = torch.zeros(0, dtype=torch.float32) if class_counts is None else self._checked(class_counts)
        self.register_buffer("class_counts", counts)

    @override
    def setup_data(self, datamodule: object) -> None:
        counts = getattr(datamodule, "class_counts", None)
        if counts is not None and not self._given:
            self.class_counts = self._checked(counts).to(self.class_counts.device)

    @override
    def compute(self, signals: Signals) -> Temperature:
        logits = signals.student_logits
        if self.class_counts.numel() == 0:
            raise ValueError(
                "ClassFrequencyTemperature has no class counts. Give class_counts=[...], or use a data module that has "
                "an attribute class_counts (policy.setup_data(datamodule) outside a Trainer)."
            )
        if self.class_counts.numel() != logits.shape[-1]:
            raise ValueError(
                f"ClassFrequencyTemperature has counts of {self.class_counts.numel()} classes, but the logits have "
                f"{logits.shape[-1]} (shape {tuple(logits.shape)}). Give one count per class."
            )
        seen = self.class_counts > 0
        rarest = torch.where(seen, self.class_counts, math.inf).min()
        log_counts = self.class_counts.clamp(min=rarest).log()
        spread = log_counts.max() - log_counts.min()
        rarity = (log_counts.max() - log_counts) / torch.where(spread > 0, spread, 1.0)
        rarity = torch.where(spread > 0, rarity, 0.5)
        if self.direction == "rare_low":
            rarity = 1.0 - rarity
        return self._within_range(rarity.reshape((1,) * (logits.dim() - 1) + (-1,)))

    @override
    def transform(self, logits: Tensor) -> Tensor:
        return centre(logits)

    @staticmethod
    def _checked(class_counts: Iterable[Any]) -> Tensor:
        counts = torch.as_tensor([float(count) for count in class_counts], dtype=torch.float32)
        if counts.numel() < 2 or not torch.isfinite(counts).all() or (counts < 0).any() or not (counts > 0).any():
            raise ValueError(
                "class_counts must be the number of samples of each of two or more classes, finite, not negative and "
                f"not all 0, got {counts.tolist()}."
            )
        return counts

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # counts that came from the data: a checkpoint tells their number
        key = f"{prefix}class_counts"
        incoming = state_dict.get(key)
        if isinstance(incoming, Tensor) and incoming.shape != self.class_counts.shape:
            if incoming.numel() == 0:
                state_dict[key] = self.class_counts
            elif self.class_counts.numel() == 0:
                self.class_counts = self.class_counts.new_zeros(incoming.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @override
    def extra_repr(self) -> str:
        counts = [round(count) for count in self.class_counts.tolist()]
        shown = counts if 0 < len(counts) <= 10 else f"({len(counts)} classes)" if counts else None
        return f"class_counts={shown}, {super().extra_repr()}"


class CorrectWrongTemperature(TemperaturePolicy):
    r"""ATS: the teacher's target logit gets another temperature than its wrong ones.

    .. math::
        T_{t,ik} = \begin{cases} T_\text{correct} & k = y_i \\ T_\text{wrong} & k \ne y_i \end{cases},
        \qquad T_s = 1, \qquad \text{loss scale } T_s^2 = 1

    with the label :math:`y_i`. A large teacher is over-confident on the label and flat on the rest: the higher T on the
    label lowers that confidence, the lower T on the rest sharpens the differences between wrong classes. The loss sees
    centred logits; the publication divides the raw logits, which agrees where their mean is 0.

    Shapes:
        Logits ``(…, C)``, targets ``(…)`` → T_t ``(…, C)``, T_s and scale ``(1,)``.

    Args:
        correct: T of the label's class. High: the label loses its lead; 1: the teacher's own logit.
        wrong: T of the other classes. Low: differences between wrong classes stand out; high: they vanish.
        bounds: See :class:`TemperaturePolicy`.

    Raises:
        ValueError: If a temperature is outside the bounds; on the call, if the targets are no class indices.

    Suggested values: ``correct > wrong``. The authors search 1 to 6 for ``correct`` and 1 to 5 for ``wrong``, and weigh
    distillation and cross-entropy 0.5 each.

    Interacts badly with: mixed labels (MixUp, CutMix), which have no y; ``correct`` far above ``wrong``: the largest
    wrong class overtakes the label.

    Source: X.-C. Li et al., "Asymmetric Temperature Scaling Makes Larger Networks Teach Well Again", NeurIPS 2022,
    arXiv 2210.04427.

    Example:
        >>> policy = CorrectWrongTemperature(correct=4.0, wrong=2.0)
        >>> policy(Signals(torch.zeros(2, 3), torch.zeros(2, 3), targets=torch.tensor([0, 2]))).teacher
        tensor([[4., 2., 2.],
                [2., 2., 4.]])
    """

    reads_logits = False

    def __init__(self, correct: float = 4.0, wrong: float = 2.0, **bounds: Unpack[Bounds]) -> None:
        super().__init__(**bounds)
        self._check_within_bounds(correct=correct, wrong=wrong)
        self.correct = float(correct)
        self.wrong = float(wrong)

    @override
    def compute(self, signals: Signals) -> Temperature:
        targets = class_targets(signals, type(self).__name__)
        classes = torch.arange(signals.teacher_logits.shape[-1], device=targets.device)
        is_target = classes == targets.unsqueeze(-1)
        teacher = torch.where(is_target, signals.full(self.correct), signals.full(self.wrong))
        student = signals.full(1.0)
        return Temperature(student=student, teacher=teacher, scale=student)

    @override
    def transform(self, logits: Tensor) -> Tensor:
        return centre(logits)
