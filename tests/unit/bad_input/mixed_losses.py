"""Bad options of the losses between forward and reverse KL."""

import math

import torch

from kd_lightning import functional, losses
from kd_lightning.functional.class_divergences import DecoupledKL, TargetCrossEntropy
from tests.unit.bad_input.case import Case

ZEROS = torch.zeros(2, 2)


def exponents(alpha: float, beta: float) -> Case:
    return Case(
        f"exponents {alpha} and {beta}",
        lambda: losses.AlphaBetaKDLoss(alpha, beta),
        ValueError,
        f"alpha and beta must be finite, at least 0 and not both 0, got alpha={alpha}, beta={beta}. "
        "(1, 0) is kd_loss, (0, 1) reverse_kd_loss.",
    )


def skew(value: float, reverse: bool, other: str) -> Case:
    return Case(
        f"skew of {value}, reverse={reverse}",
        lambda: losses.SkewKLLoss(value, reverse),
        ValueError,
        f"skew must lie between 0 and 1, got {value}: use {other} in place of 0; 1 is no loss.",
    )


def weight(value: float) -> Case:
    return Case(
        f"weight of reverse KL {value}",
        lambda: losses.SymmetricKLLoss(value),
        ValueError,
        f"reverse_weight must lie between 0 and 1, got {value}: use kd_loss in place of 0, reverse_kd_loss in place "
        "of 1.",
    )


def threshold(value: float) -> Case:
    return Case(
        f"entropy threshold {value}",
        lambda: losses.EntropyGatedKLLoss(value),
        ValueError,
        f"threshold is an entropy in nats, at least 0 and finite, got {value}. The publication uses 0.8; use "
        "reverse_kd_loss to leave the gate shut.",
    )


def weight_of_the_teacher(value: float) -> Case:
    return Case(
        f"weight of the teacher {value}",
        lambda: losses.JSDLoss(value),
        ValueError,
        f"beta must lie between 0 and 1, got {value}. There the divergence is 0: use kd_loss in place of beta=0, "
        "reverse_kd_loss in place of beta=1.",
    )


CASES = [
    weight_of_the_teacher(0.0),
    weight_of_the_teacher(1.5),
    Case(
        "fused module with a divergence that needs labels",
        lambda: losses.FusedLinearKDLoss(divergence=DecoupledKL()),
        ValueError,
        "the fused loss takes a divergence that needs no labels, got DecoupledKL(alpha=1.0, beta=8.0): compute that "
        "one from logits.",
    ),
    Case(
        "fused loss with a divergence that needs labels",
        lambda: functional.fused_linear_kd_loss(ZEROS, ZEROS, ZEROS, ZEROS, 2.0, divergence=TargetCrossEntropy()),
        ValueError,
        "the fused loss takes a divergence that needs no labels, got TargetCrossEntropy(): compute that one from "
        "logits.",
    ),
    *(exponents(*pair) for pair in [(0.0, 0.0), (-0.1, 1.0), (1.0, -0.1), (math.inf, 0.5), (0.5, math.nan)]),
    *(skew(value, False, "kd_loss") for value in (0.0, 1.0, math.nan)),
    skew(-0.1, True, "reverse_kd_loss"),
    *(weight(value) for value in (0.0, 1.0, 1.5)),
    *(threshold(value) for value in (-0.1, math.inf, math.nan)),
]
