"""Losses between forward and reverse KL; equations and sources: :mod:`kd_lightning.functional.mixed_losses`."""

from __future__ import annotations

from typing_extensions import Unpack

from kd_lightning import functional
from kd_lightning.functional.mixed_divergences import AlphaBeta, EntropyGatedKL, SkewKL, SymmetricKL
from kd_lightning.losses.logits import LogitLoss, LossModuleOptions


class AlphaBetaKDLoss(LogitLoss):
    """α-β-divergence, ABKD: :func:`~kd_lightning.functional.alpha_beta_kd_loss`.

    Args:
        alpha: Exponent of the teacher, at least 0. The official example for CIFAR-100 has 0.8.
        beta: Exponent of the student, at least 0. The official example for CIFAR-100 has 0.3.
        **options: Those of :class:`LogitLoss`.
    """

    function = staticmethod(functional.alpha_beta_kd_loss)
    options = ("alpha", "beta")

    def __init__(self, alpha: float, beta: float, **options: Unpack[LossModuleOptions]) -> None:
        super().__init__(**options)
        AlphaBeta(alpha, beta)  # raises
        self.alpha = alpha
        self.beta = beta


class SkewKLLoss(LogitLoss):
    """KL to a mixture with the other side, DistiLLM: :func:`~kd_lightning.functional.skew_kd_loss`.

    Args:
        skew: The outer distribution's share of the mixture, between 0 and 1.
        reverse: True for the divergence from the student to the mixture, False for that from the teacher.
        **options: Those of :class:`LogitLoss`.
    """

    function = staticmethod(functional.skew_kd_loss)
    options = ("skew", "reverse")

    def __init__(self, skew: float = 0.1, reverse: bool = False, **options: Unpack[LossModuleOptions]) -> None:
        super().__init__(**options)
        SkewKL(skew, reverse)  # raises
        self.skew = skew
        self.reverse = reverse


class SymmetricKLLoss(LogitLoss):
    """Weighted sum of forward and reverse KL: :func:`~kd_lightning.functional.symmetric_kd_loss`.

    Args:
        reverse_weight: Weight of reverse KL, between 0 and 1.
        **options: Those of :class:`LogitLoss`.
    """

    function = staticmethod(functional.symmetric_kd_loss)
    options = ("reverse_weight",)

    def __init__(self, reverse_weight: float = 0.5, **options: Unpack[LossModuleOptions]) -> None:
        super().__init__(**options)
        SymmetricKL(reverse_weight)  # raises
        self.reverse_weight = reverse_weight


class EntropyGatedKLLoss(LogitLoss):
    """Reverse KL, and forward KL where the teacher is unsure: :func:`~kd_lightning.functional.entropy_gated_kd_loss`.

    Args:
        threshold: Entropy of the tempered teacher in nats above which forward KL is added, at least 0.
        **options: Those of :class:`LogitLoss`.
    """

    function = staticmethod(functional.entropy_gated_kd_loss)
    options = ("threshold",)

    def __init__(self, threshold: float = 0.8, **options: Unpack[LossModuleOptions]) -> None:
        super().__init__(**options)
        EntropyGatedKL(threshold)  # raises
        self.threshold = threshold


class ToDiLoss(LogitLoss):
    """Forward or reverse KL class by class: :func:`~kd_lightning.functional.todi_loss`."""

    function = staticmethod(functional.todi_loss)
