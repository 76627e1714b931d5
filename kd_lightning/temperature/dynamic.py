"""Policies with a memory: the temperature follows how training goes."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from kd_lightning.functional import Temperature, kd_loss, predictive_entropy, tempered_log_softmax
from kd_lightning.functional.across_ranks import sum_over_ranks
from kd_lightning.functional.temperature import check_number
from kd_lightning.temperature.base import Bounds, TemperaturePolicy
from kd_lightning.temperature.signals import Signals
from kd_lightning.temperature.statistics import class_targets, sum_and_count


class _MovingTemperature(TemperaturePolicy):
    """Base of policies whose temperature is a buffer that each training step moves."""

    value: Tensor

    def __init__(
        self, init_value: float, min_value: float, max_value: float, momentum: float, **bounds: Unpack[Bounds]
    ) -> None:
        super().__init__(**bounds)
        self._set_range(min_value, max_value)
        check_number(f"{type(self).__name__}: init_value", init_value)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}: at 1 nothing would ever be learned.")
        self.init_value = float(init_value)
        self.momentum = float(momentum)
        self.register_buffer("value", torch.full((1,), float(init_value), dtype=torch.float32))

    @abstractmethod
    def _update(self, signals: Signals) -> None:
        """Move the temperature by one training step."""

    @override
    def compute(self, signals: Signals) -> Temperature:
        if self.training:
            self._update(signals)
        value = self.value.clone()
        return Temperature(student=value, teacher=value)


class LossGapTemperature(_MovingTemperature):
    r"""DTS: a cosine decay, lifted while the student's cross-entropy is far above the teacher's.

    .. math::
        T^* = T_0 \cdot \tfrac12 \big( 1 + \cos(\kappa \pi e / E) \big) \cdot g(a), \qquad
        a = \frac{d}{d + 1}, \qquad d = \mathrm{CE}_t - \mathrm{CE}_s,

    .. math::
        g(a) = \begin{cases} 1 & a \le 1 \\ a & 1 < a \le 2 \\ 1.35 & a > 2 \end{cases}, \qquad
        T \leftarrow \mu \, T + (1 - \mu) \, \mathrm{clamp}(T^*, T_\min, T_\max)

    for student and teacher alike, once per training step, with the cross-entropies of teacher and student with the
    labels of the batch (at temperature 1, over the valid positions of all ranks), :math:`e` of :math:`E` epochs
    finished. In evaluation T stays.

    g differs from 1 only while :math:`d < -1`, the student's cross-entropy more than 1 above the teacher's, and is not
    **monotone** there: 1.35 for gaps :math:`-d` between 1 and 2, 2 at a gap of 2, falling back towards 1 beyond. Else T
    is a smoothed cosine decay.

    Shapes:
        Logits ``(…, C)``, targets ``(…)`` → T ``(1,)``. State: the buffer ``value`` ``(1,)``. With several ranks each
        must make every training step, since they average their losses.

    Args:
        init_value: :math:`T_0`, and T before the first step.
        min_value: :math:`T_\min`. The decay reaches 0, so this is what T ends at.
        max_value: :math:`T_\max`. At ``init_value``, as published, the gate only delays the decay.
        curve: :math:`\kappa`, the speed of the decay. 0: none; 1: half a cosine over the run; above 1 it rises again.
        momentum: :math:`\mu` in [0, 1): the share that stays at each step. 0 follows at once.
        bounds: See :class:`TemperaturePolicy`.

    Raises:
        ValueError: If values are out of order or outside the bounds, ``momentum`` is outside [0, 1), or ``curve`` is
            negative; on the call, if the targets are no class indices, or the run's end is unknown.

    Suggested values: the defaults are the authors' for CIFAR-100.

    Interacts badly with: a learning-rate schedule that relies on constant targets; mixed labels (no class indices);
    ``init_value`` outside [min_value, max_value] (T starts there and is pulled in).

    Source: S. U. Islam et al., "Dynamic Temperature Scheduler for Knowledge Distillation", 2025, arXiv 2511.13767.
    Formula and values after the authors' code. SGD runs of another study favour the opposite direction, small T early
    (arXiv 2603.02430).

    Example:
        >>> from kd_lightning.temperature import Progress
        >>> policy = LossGapTemperature().eval()
        >>> signals = Signals(torch.zeros(2, 3), torch.zeros(2, 3), targets=torch.tensor([0, 1]))
        >>> policy(signals).student  # in evaluation: the state as it is
        tensor([4.])
        >>> signals = Signals(*[torch.zeros(2, 3)] * 2, torch.tensor([0, 1]), Progress(epoch=8, max_epochs=10))
        >>> policy.train()(signals).student  # 0.9 · 4 + 0.1 · 2
        tensor([3.8000])
    """

    def __init__(
        self,
        init_value: float = 4.0,
        min_value: float = 2.0,
        max_value: float = 4.0,
        curve: float = 1.0,
        momentum: float = 0.9,
        **bounds: Unpack[Bounds],
    ) -> None:
        super().__init__(init_value, min_value, max_value, momentum, **bounds)
        self._check_within_bounds(init_value=init_value)
        if not 0 <= curve < math.inf:
            raise ValueError(f"curve must be a finite number, 0 (no decay) or above, got {curve}.")
        self.curve = float(curve)

    @override
    @torch.no_grad()
    def _update(self, signals: Signals) -> None:
        targets = class_targets(signals, type(self).__name__)

        def cross_entropy(logits: Tensor) -> Tensor:
            return -tempered_log_softmax(logits, 1.0).gather(-1, targets.unsqueeze(-1)).squeeze(-1)

        student, count = sum_and_count(cross_entropy(signals.student_logits), signals.valid)
        teacher, _ = sum_and_count(cross_entropy(signals.teacher_logits), signals.valid)
        student, teacher, count = sum_over_ranks(torch.cat([student, teacher, count])).split(1)
        gap = (teacher - student) / count.clamp(min=1)
        ratio = gap / (gap + 1.0)
        gate = torch.where(ratio > 2, 1.35, ratio.clamp(min=1.0))
        now = signals.progress  # by epochs, as published; by steps where only their number is known
        fraction = min(now.epoch / now.max_epochs, 1.0) if now.max_epochs and now.max_epochs > 0 else now.fraction
        decay = 0.5 * (1.0 + torch.cos(self.curve * math.pi * fraction * torch.ones_like(gap)))
        target = (self.init_value * decay * gate).clamp(self.min_value, self.max_value)
        updated = self.momentum * self.value + (1.0 - self.momentum) * target
        usable = torch.isfinite(target) & (count > 0)  # one step of NaN losses must not end in the state
        self.value.copy_(torch.where(usable, updated, self.value))


class CapacityTemperature(_MovingTemperature):
    r"""For a student too small for its teacher: T follows the share of the teacher's message that does not arrive.

    .. math:: r = \frac{\mathrm{KL}(p_t^T \,\|\, p_s^T)}{H(p_t^T)}

    is the mean divergence between the softened distributions over the mean entropy of the teacher's, both over the
    valid positions of all ranks: the bits that the student misses for each bit that the teacher's softened targets
    hold. Its moving average :math:`\bar r` is looked at every ``interval`` training steps:

    .. math::
        T \leftarrow \begin{cases}
            q \, T & \bar r > r_\text{overload} \\ T / q & \bar r < r_\text{underload} \\ T & \text{otherwise}
        \end{cases} \qquad \text{within } [T_\min, T_\max]

    for student and teacher alike. In evaluation nothing moves.

    **Ours, without published evidence.** r itself falls when T rises (KL shrinks as 1/T² while H goes to log C), so the
    rule reinforces itself: below ``underload`` T tends to run to ``max_value``, above ``overload`` to ``min_value``.
    ``python benchmarks/capacity_temperature.py`` measured no gain: the student that is too small gets T = 1 too late.

    Shapes:
        Logits ``(…, C)`` → T ``(1,)``. State: the buffers ``value``, ``ratio`` (:math:`\bar r`; −1 before the first
        step) and ``calls`` (training steps since T was last looked at), each ``(1,)``. With several ranks each must
        make every training step, since they average r.

    Args:
        init_value: T at the start.
        overload: :math:`r_\text{overload}`: above it the student fails and T is lowered. ``inf``: never.
        underload: :math:`r_\text{underload}`: below it the student has room and T is raised. 0: never.
        factor: :math:`q` in (0, 1): the step of T. Near 1 small steps; 0.5 halves and doubles.
        interval: Training steps between two decisions.
        momentum: Share of :math:`\bar r` that stays at each step, in [0, 1). Keep ``interval`` above
            ``1 / (1 - momentum)``, so that a decision sees the T it judges.
        min_value: :math:`T_\min`.
        max_value: :math:`T_\max`.
        bounds: See :class:`TemperaturePolicy`.

    Raises:
        ValueError: If ``underload`` is negative or above ``overload``, ``factor`` outside (0, 1), ``interval`` below 1,
            ``momentum`` outside [0, 1), or temperatures are out of order or outside the bounds.

    Suggested values: log :math:`\bar r` (``policy.ratio``) in a run with constant T first and put the two thresholds
    around the value it settles at.

    Interacts badly with: the start of training, where r is large for every student; callbacks that move T by the
    validation loss (two controllers on one valve); T² in comparisons, since kd_weight · T² moves with T.

    Source: ours.

    Example:
        >>> policy = CapacityTemperature(init_value=4.0, overload=0.5, underload=0.05, factor=0.5, interval=2)
        >>> student, teacher = torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([[9.0, 0.0, 0.0]])
        >>> [policy(Signals(student, teacher)).student.item() for _ in range(4)]  # hopeless: halved every 2 steps
        [4.0, 2.0, 2.0, 1.0]
    """

    ratio: Tensor
    calls: Tensor

    def __init__(
        self,
        init_value: float = 4.0,
        overload: float = 1.0,
        underload: float = 0.05,
        factor: float = 0.9,
        interval: int = 100,
        momentum: float = 0.9,
        min_value: float = 1.0,
        max_value: float = 10.0,
        **bounds: Unpack[Bounds],
    ) -> None:
        super().__init__(init_value, min_value, max_value, momentum, **bounds)
        if not min_value <= init_value <= max_value:
            raise ValueError(
                f"init_value must lie between min_value={min_value:g} and max_value={max_value:g}, got {init_value}."
            )
        if not 0 <= underload <= overload:
            raise ValueError(
                "the thresholds must satisfy 0 <= underload <= overload, got "
                f"underload={underload}, overload={overload}."
            )
        if not 0 < factor < 1:
            raise ValueError(f"factor must lie between 0 and 1, got {factor}: T is multiplied or divided by it.")
        if interval < 1:
            raise ValueError(f"interval must be 1 step or more, got {interval}.")
        self.overload = float(overload)
        self.underload = float(underload)
        self.factor = float(factor)
        self.interval = interval
        self.register_buffer("ratio", torch.full((1,), -1.0, dtype=torch.float32))
        self.register_buffer("calls", torch.zeros(1, dtype=torch.float32))

    @override
    @torch.no_grad()
    def _update(self, signals: Signals) -> None:
        temperature = self._bound(self.value)  # what the loss used: callbacks may have moved it
        student, teacher = signals.student_logits, signals.teacher_logits
        last = student.dim() - 1
        divergence = kd_loss(student, teacher, temperature, scale="none", reduction="none", class_dim=last)
        divergence, count = sum_and_count(divergence, signals.valid)
        entropy, _ = sum_and_count(predictive_entropy(teacher, temperature), signals.valid)
        divergence, entropy, count = sum_over_ranks(torch.cat([divergence, entropy, count])).split(1)
        missed = (divergence / (entropy + 1e-6 * count.clamp(min=1))).clamp(min=0.0)

        usable = torch.isfinite(missed) & (count > 0)  # one step of NaN logits must not end in the state
        ratio = torch.where(self.ratio < 0, missed, self.momentum * self.ratio + (1.0 - self.momentum) * missed)
        ratio = torch.where(usable, ratio, self.ratio)
        calls = self.calls + 1
        due = (calls >= self.interval) & (ratio >= 0)
        lower, higher = due & (ratio > self.overload), due & (ratio < self.underload)
        value = torch.where(lower, self.value * self.factor, self.value)
        value = torch.where(higher, self.value / self.factor, value).clamp(self.min_value, self.max_value)
        self.ratio.copy_(ratio)
        self.calls.copy_(torch.where(due, 0.0, calls))
        self.value.copy_(value)
