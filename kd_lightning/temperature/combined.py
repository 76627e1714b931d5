"""Policies made of policies. See :class:`AsymmetricTemperature` for one per side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Unpack, override

from kd_lightning.functional import Temperature
from kd_lightning.schedules import Unit, check_boundaries, part_at
from kd_lightning.temperature.base import Bounds, TemperaturePolicy, Temperatures, as_terms
from kd_lightning.temperature.scheduled import AnyTemperature, as_policy
from kd_lightning.temperature.signals import Signals


class _CombinedTemperature(TemperaturePolicy):
    """Base of combinations: their parts."""

    reads_logits = False

    def __init__(self, policies: Sequence[AnyTemperature], **bounds: Unpack[Bounds]) -> None:
        super().__init__(**bounds)
        if isinstance(policies, (str, float, int, nn.Module)) or not len(policies):
            raise ValueError(
                f"{type(self).__name__} needs a list of numbers, schedules or policies, one or more, got {policies!r}."
            )
        self.policies = nn.ModuleList(as_policy(policy) for policy in policies)


class ProductTemperature(_CombinedTemperature):
    r"""The product of several temperatures: a schedule times a per-sample rule, say.

    .. math:: T_s = \prod_j T_s^{(j)}, \qquad T_t = \prod_j T_t^{(j)}

    If a part fixes its loss scale, the scale is the product too, of :math:`T_s^{(j)} T_t^{(j)}` for the parts that do
    not; else the loss's rule applies to the product.

    Shapes:
        The parts' shapes broadcast: ``(1,)`` times ``(N, 1)`` is ``(N, 1)``, ``(N, 1)`` times ``(1, C)`` is ``(N, C)``.

    Args:
        policies: Numbers, schedules or policies. Each is bounded on its own first, so a factor below 0.05 needs its
            own ``min_temperature``.
        bounds: Bounds of the product, see :class:`TemperaturePolicy`.

    Raises:
        ValueError: If there are no parts; on the call, if a part gives several temperatures.
        TypeError: If a part is neither number, schedule nor policy.

    Suggested values: one part that sets the level and factors around 1, such as a schedule from 1.5 to 0.5.

    Interacts badly with: two parts that react to the same thing (confidence twice), and parts of wide range: the
    product reaches the bounds.

    Source: ours.

    Example:
        >>> from kd_lightning.temperature import LinearSchedule, Progress
        >>> policy = ProductTemperature([4.0, LinearSchedule(init_value=1.0, end_value=0.5)])
        >>> progress = Progress(step=100, max_steps=100)
        >>> policy(Signals(torch.zeros(2, 3), torch.zeros(2, 3), progress=progress)).student
        tensor([2.])
    """

    @override
    def compute(self, signals: Signals) -> Temperature:
        parts: list[Temperature] = []
        for policy in self.policies:
            part = policy(signals)
            if not isinstance(part, Temperature):
                raise ValueError(
                    "ProductTemperature multiplies policies of one temperature each, got one that gives several. "
                    "Put the product into MultiTemperature instead."
                )
            parts.append(part)
        student, teacher, scale = parts[0]
        if any(part.scale is not None for part in parts):
            scale = signals.full(1.0)
            for part in parts:
                scale = scale * (part.student * part.teacher if part.scale is None else part.scale)
        for part in parts[1:]:
            student, teacher = student * part.student, teacher * part.teacher
        shared = all(part.student is part.teacher for part in parts)
        return Temperature(student, student if shared else teacher, scale)


class JoinedTemperature(_CombinedTemperature):
    r"""One policy after the other: switch at an epoch (or step).

    Each policy sees its own segment of training as a whole run, as in :class:`JoinedSchedule`: a warm-up inside the
    second policy starts at the boundary. A policy with state moves only while it is on.

    Shapes:
        Those of the policy that is on.

    Args:
        policies: Numbers, schedules or policies, in order.
        boundaries: Where each further policy begins, rising; one fewer than the policies.
        unit: What the boundaries count: ``"epoch"`` or ``"step"``.
        bounds: See :class:`TemperaturePolicy`.

    Raises:
        ValueError: If there are no policies, the boundaries do not rise strictly or are not one fewer than the
            policies, or the unit is unknown.
        TypeError: If a part is neither number, schedule nor policy.

    Suggested values: a few epochs of constant T before a policy that reads the student's logits.

    Interacts badly with: momentum in the optimiser: the loss's size jumps where T does.

    Source: ours; for schedules the pattern is common (warm-up, then decay).

    Example:
        >>> from kd_lightning.temperature import Progress
        >>> policy = JoinedTemperature([1.0, 4.0], boundaries=[5])
        >>> logits = torch.zeros(2, 3)
        >>> [policy(Signals(logits, logits, progress=Progress(epoch=epoch))).student.item() for epoch in (4, 5)]
        [1.0, 4.0]
    """

    def __init__(
        self,
        policies: Sequence[AnyTemperature],
        boundaries: Sequence[int],
        unit: Unit = "epoch",
        **bounds: Unpack[Bounds],
    ) -> None:
        super().__init__(policies, **bounds)
        self.boundaries = check_boundaries(type(self).__name__, "policies", len(self.policies), boundaries, unit)
        self.unit: Unit = unit

    @override
    def compute(self, signals: Signals) -> Temperatures:
        part, progress = part_at(self.boundaries, signals.progress, self.unit)
        computed = self.policies[part](signals.replace(progress=progress))
        if isinstance(computed, Temperature):
            return self._touch_parameters(computed)
        return [self._touch_parameters(computed[0]), *computed[1:]]

    def _touch_parameters(self, temperature: Temperature) -> Temperature:
        """Tie the parameters of the policies that are off to the graph: DDP refuses parameters without a gradient."""
        if not torch.is_grad_enabled():
            return temperature
        zero = sum((parameter.sum() * 0.0 for parameter in self.parameters() if parameter.requires_grad), 0.0)
        if not isinstance(zero, Tensor):
            return temperature
        student = temperature.student + zero
        shared = temperature.teacher is temperature.student
        return Temperature(student, student if shared else temperature.teacher, temperature.scale)


class MultiTemperature(_CombinedTemperature):
    r"""Several temperatures at once: one loss term each, with its own scale T².

    .. math:: L = \sum_j T_j^2 \, \mathrm{KL}(p_t^{T_j} \,\|\, p_s^{T_j})

    Calling it gives a tuple of :class:`Temperature`; the sum is the loss of the :class:`Distiller`.

    Shapes:
        Those of the parts.

    Args:
        temperatures: :math:`T_j`: numbers, schedules or policies. A part that gives several itself adds all of them.
        bounds: Bounds of each temperature, see :class:`TemperaturePolicy`.

    Raises:
        ValueError: If there are no temperatures.
        TypeError: If a part is neither number, schedule nor policy.

    Suggested values: 2 to 6 (CIFAR-100, the authors'). The sum has as many terms as temperatures, so divide
    ``kd_weight`` by their number to compare with one.

    Interacts badly with: memory for large vocabularies: one softmax per side and temperature.

    Source: Y. Jin, J. Wang, D. Lin, "Multi-Level Logit Distillation", CVPR 2023: the instance-level part, without its
    confidence masks.

    Example:
        >>> policy = MultiTemperature([2.0, 4.0])
        >>> [term.student.item() for term in policy(Signals(torch.zeros(2, 3), torch.zeros(2, 3)))]
        [2.0, 4.0]
    """

    def __init__(self, temperatures: Sequence[AnyTemperature] = (2, 3, 4, 5, 6), **bounds: Unpack[Bounds]) -> None:
        super().__init__(temperatures, **bounds)

    @override
    def compute(self, signals: Signals) -> Sequence[Temperature]:
        terms: list[Temperature] = []
        for policy in self.policies:
            computed = policy(signals)
            terms.extend(as_terms(computed))
        return terms
