"""The temperature by the teacher's energy."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from kd_lightning.functional import Temperature
from kd_lightning.temperature.base import Bounds, TemperaturePolicy
from kd_lightning.temperature.signals import Signals
from kd_lightning.temperature.statistics import centre, smallest_valid


class EnergyTemperature(TemperaturePolicy):
    r"""Energy KD: a high temperature where the teacher's energy is low (certain), a low one where it is high.

    .. math::
        T = \begin{cases} T_\text{high} & E > \theta \\ T_\text{low} & \text{otherwise} \end{cases},
        \qquad E = -\log \sum_k e^{z_{t,k} - \bar z_t}

    for student and teacher alike, with the mean :math:`\bar z_t` over the classes (those not masked with −inf).
    **As published** the logits are not centred; then a sample changes its group when a constant is added to its logits,
    which the softmax does not see.

    The publication divides the whole dataset by its energies: give the ``threshold`` :math:`\theta`, a quantile of
    :meth:`energy` of the teacher's logits of the training data, so that a sample's temperature depends neither on its
    batch nor on the number of ranks. Without one, :math:`\theta` is the energy above which the given share of each
    batch's valid positions lies.

    Shapes:
        Logits ``(…, C)`` → T ``(…, 1)``. A share is that of this rank's batch, unless ``sync``, rounded down to
        whole positions.

    Args:
        low_energy: :math:`T_\text{low}`, of the positions of low energy.
        high_energy: :math:`T_\text{high}`, of the positions of high energy.
        share: Share of each batch's positions that have high energy, in [0, 1]; 0.5 where neither is given.
        threshold: :math:`\theta`, the energy above which a position has high energy.
        sync: Whether the share is that of the batches of all ranks in training, as one process would have it. Costs
            five all-reduces of at most 2 KB a step. Only for a share.
        bounds: See :class:`TemperaturePolicy`.

    Raises:
        ValueError: If a temperature is outside the bounds, the share is not in [0, 1], the threshold is not finite, or
            both are given.

    Suggested values: the defaults lie around the usual T = 4, and are not the publication's.

    Interacts badly with: the T² factor, which gives the certain samples the larger weight, 9 times as much by default
    (``KDLoss(scale="none")`` switches that off); and small batches, whose shares are coarse (a threshold is not).

    Source: S. Kim et al., "Maximizing Discrimination Capability of Knowledge Distillation with Energy Function", 2023,
    arXiv 2311.14334.

    Example:
        >>> policy = EnergyTemperature(low_energy=6.0, high_energy=2.0)
        >>> teacher_logits = torch.tensor([[9.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
        >>> policy(Signals(torch.zeros(2, 3), teacher_logits)).student
        tensor([[6.],
                [2.]])
        >>> of_training_data = 3 * torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
        >>> threshold = EnergyTemperature.energy(of_training_data).quantile(0.7).item()  # 30 % have high energy
        >>> EnergyTemperature(threshold=round(threshold, 2))
        EnergyTemperature(low_energy=6, high_energy=2, share=None, threshold=-1.97)
    """

    def __init__(
        self,
        low_energy: float = 6.0,
        high_energy: float = 2.0,
        share: float | None = None,
        threshold: float | None = None,
        sync: bool = False,
        **bounds: Unpack[Bounds],
    ) -> None:
        super().__init__(**bounds)
        self._check_within_bounds(low_energy=low_energy, high_energy=high_energy)
        if share is not None and threshold is not None:
            raise ValueError(
                f"a share ranks each batch and a threshold does not, got share={share} and threshold={threshold}. Give "
                "one of them."
            )
        if threshold is not None and sync:
            raise ValueError(
                f"sync=True takes a share of the batches of all ranks, and threshold={threshold} needs no batch. Give "
                "one of them."
            )
        if threshold is not None and not math.isfinite(threshold):
            raise ValueError(
                f"threshold is an energy, a finite number such as a quantile of EnergyTemperature.energy(logits), got "
                f"{threshold}."
            )
        share = 0.5 if share is None and threshold is None else share
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"share is the part of the batch that has high energy, in [0, 1], got {share}.")
        self.low_energy = float(low_energy)
        self.high_energy = float(high_energy)
        self.share = None if share is None else float(share)
        self.threshold = None if threshold is None else float(threshold)
        self.sync = bool(sync)

    @staticmethod
    def energy(teacher_logits: Tensor) -> Tensor:
        """Return the energy of each position, ``(…,)``.

        Args:
            teacher_logits: ``(…, C)``.
        """
        return -centre(teacher_logits).logsumexp(-1)

    @override
    def compute(self, signals: Signals) -> Temperature:
        energy = self.energy(signals.teacher_logits).unsqueeze(-1)
        high = self._in_share(energy, signals) if self.threshold is None else energy > self.threshold
        temperature = torch.where(high, signals.full(self.high_energy), signals.full(self.low_energy))
        return Temperature(temperature, temperature)

    def _in_share(self, energy: Tensor, signals: Signals) -> Tensor:
        """Return the positions of high energy, as many as the share of the batch."""
        share = self.share
        assert share is not None
        highest_of_low = smallest_valid(
            energy,
            signals.valid,
            lambda count: count - (count * share).floor().long() - 1,
            self.sync and self.training,
        )
        return energy > highest_of_low
