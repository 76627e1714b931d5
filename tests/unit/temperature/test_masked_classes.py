"""Classes masked by −inf or by a large finite number change no policy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kd_lightning.functional.masks import masked_classes
from kd_lightning.temperature import (
    ConfidenceTemperature,
    DisagreementTemperature,
    EnergyTemperature,
    EntropyTemperature,
    LogitStandardization,
    LogitStdTemperature,
    MaxLogitTemperature,
    SharpnessTemperature,
    Signals,
    Temperature,
    TemperaturePolicy,
)
from kd_lightning.temperature.statistics import standard_deviation

MASKS = [-math.inf, -1e4, -65504.0, -1e9, -1e30, torch.finfo(torch.bfloat16).min, torch.finfo(torch.float32).min]


def terms(policy: TemperaturePolicy, student: Tensor, teacher: Tensor) -> Temperature:
    temperature = policy(Signals(student, teacher))
    assert isinstance(temperature, Temperature)
    return temperature


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "policy",
    [
        LogitStandardization(),
        LogitStdTemperature(),
        SharpnessTemperature(),
        DisagreementTemperature(by="cosine"),
        EntropyTemperature(),
        EnergyTemperature(),
        ConfidenceTemperature(),
        MaxLogitTemperature(ratio=2.0),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_masked_classes_count_for_nothing(policy: TemperaturePolicy, mask: float) -> None:
    torch.manual_seed(0)
    student, teacher = 5 * torch.randn(4, 6), 5 * torch.randn(4, 6)
    student.requires_grad_()
    padded = [torch.cat((z, torch.full((4, 3), mask)), -1) for z in (student, teacher)]
    got, expected = terms(policy, padded[0], padded[1]), terms(policy, student, teacher)
    torch.testing.assert_close(got.student, expected.student)
    torch.testing.assert_close(got.teacher, expected.teacher)
    if expected.student.requires_grad:
        gradients = [torch.autograd.grad(t.student.sum(), student)[0] for t in (got, expected)]
        torch.testing.assert_close(gradients[0], gradients[1])


def test_the_value_of_the_issue() -> None:
    """Softened probabilities of a class masked by −1e4 must not depend on the mask."""
    logits = torch.tensor([[3.0, 0.0, -3.0, -1e4]])
    t = terms(LogitStandardization(1.0), logits, logits).teacher
    torch.testing.assert_close(t, standard_deviation(logits[:, :3]) + 1e-7)


def test_a_mask_that_is_added_to_the_logits() -> None:
    logits = torch.randn(2, 6)
    masked = torch.zeros(2, 6, dtype=torch.bool)
    masked[:, 4:] = True
    assert torch.equal(masked_classes(logits - 1e4 * masked), masked)


def test_a_mask_beside_the_bound_in_bfloat16() -> None:
    """−9,000 rounds to −9,024 there, so that a comparison in that type would take the mask for a logit."""
    logits = torch.tensor([[3.0, 0.0, -3.0, -9024.0]], dtype=torch.bfloat16)
    assert masked_classes(logits).tolist() == [[False, False, False, True]]
    assert torch.equal(masked_classes(logits), masked_classes(logits.float()))


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6, 1e30])
@pytest.mark.parametrize("shift", [0.0, -1e5])
def test_large_logits_are_no_masks(scale: float, shift: float) -> None:
    logits = scale * torch.tensor([[3.0, 0.0, -3.0], [1.0, 2.0, 1.5], [0.0, -5.0, 1.0]]) + shift
    assert not masked_classes(logits).any()
    assert not masked_classes(torch.full((2, 3), -scale)).any()
