"""The temperature by the teacher's energy."""

from __future__ import annotations

import math

import torch
from typing_extensions import Unpack, override

from kd_lightning.functional import Temperature
from kd_lightning.temperature.base import Bounds, TemperaturePolicy
from kd_lightning.temperature.signals import Signals
from kd_lightning.temperature.statistics import centre

__all__ = ["EnergyTemperature"]


class EnergyTemperature(TemperaturePolicy):
    r"""Energy KD: a high temperature where the teacher's energy is low (certain), a low one where it is high.

    .. math::
        T = \begin{cases} T_\text{high} & E > \theta \\ T_\text{low} & \text{otherwise} \end{cases},
        \qquad E = -\log \sum_k e^{z_{t,k} - \bar z_t}

    for student and teacher alike, with the mean :math:`\bar z_t` over the classes (those not masked with −inf) and
    :math:`\theta` the energy above which the given share of the batch's valid positions lies. **As published** the
    logits are not centred; then a sample changes its group when a constant is added to its logits, which the softmax
    does not see. The publication ranks the whole dataset, here it is the batch.

    Shapes:
        Logits ``(…, C)`` → T ``(…, 1)``. The share is that of this rank's batch, rounded down to whole positions.

    Args:
        low_energy: :math:`T_\text{low}`, of the positions of low energy.
        high_energy: :math:`T_\text{high}`, of the positions of high energy.
        share: Share of the positions that have high energy, in [0, 1].
        bounds: See :class:`TemperaturePolicy`.

    Raises:
        ValueError: If a temperature is outside the bounds, or the share is not in [0, 1].

    Suggested values: the defaults lie around the usual T = 4, and are not the publication's.

    Interacts badly with: the T² factor, which gives the certain samples the larger weight, 9 times as much by default
    (``KDLoss(scale="none")`` switches that off); and small batches, whose shares are coarse.

    Source: S. Kim et al., "Maximizing Discrimination Capability of Knowledge Distillation with Energy Function", 2023,
    arXiv 2311.14334.

    Example:
        >>> policy = EnergyTemperature(low_energy=6.0, high_energy=2.0)
        >>> teacher_logits = torch.tensor([[9.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
        >>> policy(Signals(torch.zeros(2, 3), teacher_logits)).student
        tensor([[6.],
                [2.]])
    """

    def __init__(
        self, low_energy: float = 6.0, high_energy: float = 2.0, share: float = 0.5, **bounds: Unpack[Bounds]
    ) -> None:
        super().__init__(**bounds)
        self._check_within_bounds(low_energy=low_energy, high_energy=high_energy)
        if not 0 <= share <= 1:
            raise ValueError(f"share is the part of the batch that has high energy, in [0, 1], got {share}.")
        self.low_energy = float(low_energy)
        self.high_energy = float(high_energy)
        self.share = float(share)

    @override
    def compute(self, signals: Signals) -> Temperature:
        energy = -centre(signals.teacher_logits).logsumexp(-1, keepdim=True)
        counting = energy if signals.valid is None else energy.masked_fill(~signals.valid.unsqueeze(-1), math.inf)
        ordered = counting.flatten().sort().values
        count = (ordered < math.inf).sum()
        low = count - (count * self.share).floor().long()  # so many have low energy
        threshold = ordered.gather(0, (low - 1).clamp(min=0).reshape(1))
        high = (energy > threshold) | (low == 0)
        temperature = torch.where(high, signals.full(self.high_energy), signals.full(self.low_energy))
        return Temperature(temperature, temperature)
