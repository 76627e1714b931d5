"""Policies whose temperature is trained with the student."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack, override

from kd_lightning.functional import Temperature, tempered_log_softmax
from kd_lightning.schedules import Progress
from kd_lightning.temperature.base import Bounds, TemperaturePolicy
from kd_lightning.temperature.signals import Signals


class _BoundedTemperature(TemperaturePolicy):
    """Base of the learnable policies: the bounds, the reversal and the optimiser group."""

    def __init__(
        self,
        init_value: float,
        min_value: float,
        max_value: float,
        adversarial: bool,
        warmup_epochs: int,
        lr: float | None,
        **bounds: Unpack[Bounds],
    ) -> None:
        super().__init__(**bounds)
        self._set_range(min_value, max_value)
        if not min_value < init_value < max_value:
            raise ValueError(
                f"init_value must lie strictly between min_value={min_value:g} and max_value={max_value:g}, which the "
                f"learned temperature never reaches, got {init_value}."
            )
        if not 0 <= warmup_epochs < math.inf:
            raise ValueError(f"warmup_epochs must be 0 (no warm-up) or above, got {warmup_epochs}.")
        if lr is not None and not 0 < lr < math.inf:
            raise ValueError(f"lr must be positive, or None for the optimiser's own, got {lr}.")
        self.init_value = float(init_value)
        self.adversarial = bool(adversarial)
        self.warmup_epochs = warmup_epochs
        self.lr = lr

    def _init_raw(self) -> float:
        share = (self.init_value - self.min_value) / (self.max_value - self.min_value)
        return math.log(share / (1.0 - share))

    def _temperature(self, raw: Tensor, progress: Progress) -> Temperature:
        temperature = self._within_range(torch.sigmoid(raw)).student
        if self.adversarial:
            fixed = temperature.detach()
            temperature = fixed - self._strength(progress, fixed) * (temperature - fixed)  # gradient times −λ
        return Temperature(student=temperature, teacher=temperature)

    def _strength(self, progress: Progress, like: Tensor) -> Tensor:
        """λ, as a tensor: a Python number would recompile a compiled step every epoch."""
        if self.warmup_epochs == 0:
            return like.new_ones(1)
        epoch = like.new_full((1,), progress.epoch + 1)
        return 0.5 * (1.0 - torch.cos(math.pi * (epoch / self.warmup_epochs).clamp(max=1.0)))

    @override
    def param_groups(self) -> list[dict[str, Any]]:
        groups = super().param_groups()
        return groups if self.lr is None else [{**group, "lr": self.lr} for group in groups]


class LearnableTemperature(_BoundedTemperature):
    r"""CTKD: one temperature for all, trained with the student, as its adversary or its helper.

    .. math:: T = T_\min + (T_\max - T_\min) \, \sigma(\rho)

    for student and teacher alike, with the parameter :math:`\rho` and the logistic function :math:`\sigma`. With
    ``adversarial=True`` T is trained to make distillation *harder*: the gradient that reaches it is multiplied by
    :math:`-\lambda`,

    .. math:: \lambda = \tfrac12 \big( 1 - \cos(\pi \min(e / E_w, 1)) \big),

    rising to 1 over the first :math:`E_w` epochs (:math:`e` counts from 1, as in the authors' code). With
    ``adversarial=False`` the gradient arrives as it is and T minimises the loss. The factor T² of the loss is part of
    the graph: it decides which way T goes.

    Shapes:
        T ``(1,)``; the parameter ``raw`` ``(1,)``.

    Args:
        init_value: T at the start, strictly between the next two. The default is CTKD's 1 + 20·σ(1).
        min_value: :math:`T_\min`, never reached.
        max_value: :math:`T_\max`, never reached.
        adversarial: Whether the gradient is reversed.
        warmup_epochs: :math:`E_w`. 0: full strength from the first step; in a run shorter than the warm-up λ stays
            small.
        lr: Learning rate of T; None: the optimiser's own.
        bounds: Applied after callbacks have moved T, see :class:`TemperaturePolicy`.

    Raises:
        ValueError: If ``init_value`` is not strictly between the bounds, the bounds are out of order or range,
            ``warmup_epochs`` is negative, or ``lr`` is not positive.

    Suggested values: the defaults (CIFAR-100); ``warmup_epochs=5`` on ImageNet. Published runs fall from 15.6 to 3
    within epochs and end at 3.4 to 4.0: the gain over the best constant is 0.2 to 0.4 points of CIFAR-100 accuracy on
    four pairs, and on others CTKD is below constant T = 4.

    Interacts badly with: weight decay, which pulls T to the middle of its range: give the optimiser
    ``policy.param_groups()``, which has none (:class:`DistillationModule` does); ``adversarial=False``, where T finds
    the value at which T²·KL is small, not the one that teaches well; a constant ``scale`` in the loss, with which the
    adversary runs to low T; a ``multiplier`` that moves T to a bound, where the gradient stops.

    Source: Z. Li et al., "Curriculum Temperature for Knowledge Distillation", AAAI 2023, arXiv 2211.16231. Values after
    the authors' code.

    Example:
        >>> policy = LearnableTemperature()
        >>> signals = Signals(torch.zeros(2, 3), torch.zeros(2, 3), progress=Progress(epoch=5))
        >>> policy(signals).student
        tensor([15.6200], grad_fn=...)
        >>> [sorted(group) for group in policy.param_groups()]
        [['params', 'weight_decay']]
    """

    reads_logits = False

    def __init__(
        self,
        init_value: float = 15.62,
        min_value: float = 1.0,
        max_value: float = 21.0,
        adversarial: bool = True,
        warmup_epochs: int = 10,
        lr: float | None = None,
        **bounds: Unpack[Bounds],
    ) -> None:
        super().__init__(init_value, min_value, max_value, adversarial, warmup_epochs, lr, **bounds)
        self.raw = nn.Parameter(torch.full((1,), self._init_raw(), dtype=torch.float32))

    @override
    def compute(self, signals: Signals) -> Temperature:
        return self._temperature(self.raw, signals.progress)


class InstanceTemperature(_BoundedTemperature):
    r"""CTKD per sample: a small network reads both logits and sets the temperature of each sample.

    .. math::
        T = T_\min + (T_\max - T_\min) \, \sigma(f(x_s, x_t)), \qquad
        x = 1 + \tfrac1{10} \max(\log \mathrm{softmax}(z), -10) \in [0, 1]^C

    for student and teacher alike, with a network :math:`f` of one hidden layer (ReLU). Its inputs are detached: the
    reversed gradient trains f and does not reach the student. It starts at ``init_value`` for every sample, since the
    last layer's weights start at 0. Reversal and warm-up as in :class:`LearnableTemperature`.

    Shapes:
        Logits ``(…, C)`` → T ``(…, 1)``.

    Args:
        num_classes: :math:`C`.
        hidden_size: Width of the hidden layer. Small: little more than a global T; large: may follow single samples.
        init_value: T of every sample at the start.
        min_value: :math:`T_\min`, never reached in exact arithmetic.
        max_value: :math:`T_\max`, likewise.
        adversarial: Whether the gradient is reversed.
        warmup_epochs: :math:`E_w`.
        lr: Learning rate of the network; None: the optimiser's own.
        bounds: See :class:`TemperaturePolicy`.

    Raises:
        ValueError: If :class:`LearnableTemperature` raises, or there are fewer than two classes or no hidden unit; on
            the call, if the logits have another number of classes.

    Suggested values: 32 to 128 hidden units. The published network is not in the released code.

    Interacts badly with: what :class:`LearnableTemperature` lists; thousands of classes, where the first layer
    outgrows a small student.

    Source: the instance-wise variant of Z. Li et al., "Curriculum Temperature for Knowledge Distillation", AAAI 2023,
    arXiv 2211.16231; the network and its inputs are ours.

    Example:
        >>> policy = InstanceTemperature(num_classes=3, init_value=4.0)
        >>> policy(Signals(torch.randn(2, 3), torch.randn(2, 3))).student
        tensor([[4...],
                [4...]], grad_fn=...)
    """

    def __init__(
        self,
        num_classes: int,
        hidden_size: int = 64,
        init_value: float = 15.62,
        min_value: float = 1.0,
        max_value: float = 21.0,
        adversarial: bool = True,
        warmup_epochs: int = 10,
        lr: float | None = None,
        **bounds: Unpack[Bounds],
    ) -> None:
        super().__init__(init_value, min_value, max_value, adversarial, warmup_epochs, lr, **bounds)
        if num_classes < 2 or hidden_size < 1:
            raise ValueError(
                "InstanceTemperature needs two or more classes and a hidden unit, got "
                f"num_classes={num_classes}, hidden_size={hidden_size}."
            )
        self.num_classes = num_classes
        self.hidden_size = hidden_size
        last = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, self._init_raw())
        first = nn.Linear(2 * num_classes, hidden_size, dtype=torch.float32)
        self.network = nn.Sequential(first, nn.ReLU(), last)

    @override
    def compute(self, signals: Signals) -> Temperature:
        both = (signals.student_logits.detach(), signals.teacher_logits.detach())
        if both[0].shape[-1] != self.num_classes:
            raise ValueError(
                f"InstanceTemperature was built for num_classes={self.num_classes}, got logits of "
                f"{both[0].shape[-1]} classes (shape {tuple(both[0].shape)})."
            )
        features = torch.cat([1.0 + 0.1 * tempered_log_softmax(z, 1.0).clamp(min=-10.0) for z in both], dim=-1)
        with torch.autocast(features.device.type, enabled=False):
            raw = self.network(features.float())
        return self._temperature(raw, signals.progress)
