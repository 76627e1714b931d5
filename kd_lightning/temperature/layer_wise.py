"""Policies that look at where in the network a term is."""

from __future__ import annotations

from typing_extensions import Unpack, override

from kd_lightning.functional import Temperature
from kd_lightning.temperature.base import Bounds, TemperaturePolicy
from kd_lightning.temperature.signals import Signals


class DepthTemperature(TemperaturePolicy):
    r"""One temperature for shallow layers, another for deep ones: :math:`T = T_0 + (T_1 - T_0) \, d`.

    .. math:: T_s = T_t = T, \qquad d \in [0, 1]

    :math:`d` is the depth of the student's layer among those with a :class:`~kd_lightning.LayerTerm`, in the order of
    the network's modules: 0 for the first, 1 for the last, evenly between, 0.5 for one alone. The logits are at 1. One
    policy may serve all terms.

    Shapes:
        ``(1,)``.

    Args:
        shallow: :math:`T_0`, within the bounds.
        deep: :math:`T_1`, within the bounds.
        bounds: See :class:`TemperaturePolicy`.

    Raises:
        ValueError: If a temperature is outside the bounds.

    Suggested values: 8 and 2 for channel-wise losses, by the thought that shallow features are alike in kind rather
    than in place. To move it along the run: ``ProductTemperature([DepthTemperature(), CosineSchedule(1.0, 0.5)])``.

    Interacts badly with: terms of different losses: rows of cosines need a T far below that of activations.

    Source: ours.

    Example:
        >>> import torch
        >>> policy, logits = DepthTemperature(shallow=8.0, deep=2.0), torch.zeros(2, 3)
        >>> [policy(Signals(logits, logits, depth=depth)).student.item() for depth in (0.0, 0.5, 1.0)]
        [8.0, 5.0, 2.0]
    """

    reads_logits = False

    def __init__(self, shallow: float = 8.0, deep: float = 2.0, **bounds: Unpack[Bounds]) -> None:
        super().__init__(**bounds)
        self._check_within_bounds(shallow=shallow, deep=deep)
        self.shallow = float(shallow)
        self.deep = float(deep)

    @override
    def compute(self, signals: Signals) -> Temperature:
        temperature = signals.full(self.shallow + (self.deep - self.shallow) * signals.depth)
        return Temperature(student=temperature, teacher=temperature)
