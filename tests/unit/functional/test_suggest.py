"""The suggested temperature: targets are as soft as stated there."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kd_lightning.functional import suggest_temperature

LOGITS = 5 * torch.randn(40, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def entropy_share(logits: Tensor, t: float) -> float:
    p = torch.softmax(logits / t, -1)
    return (-(p * p.clamp(min=1e-300).log()).sum(-1)).mean().item() / math.log(logits.shape[-1])


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_the_mean_entropy_is_the_stated_part_of_log_c(share: float) -> None:
    assert entropy_share(LOGITS, suggest_temperature(LOGITS, entropy=share)) == pytest.approx(share, abs=1e-8)


@pytest.mark.parametrize("top", [0.95, 0.5, 0.2])
def test_the_mean_top_probability_is_the_stated_one(top: float) -> None:
    t = suggest_temperature(LOGITS, top_probability=top)
    assert (LOGITS / t).softmax(-1).amax(-1).mean().item() == pytest.approx(top, abs=1e-8)


def test_two_classes_in_closed_form() -> None:
    """p = σ(d / T) for logits (d, 0), so that T = d / log(p / (1 − p))."""
    t = suggest_temperature(torch.tensor([[6.0, 0.0]]), top_probability=0.8)
    assert t == pytest.approx(6 / math.log(4), rel=1e-9)


def test_scaled_logits_scale_the_temperature_and_a_shift_does_not() -> None:
    t = suggest_temperature(LOGITS, entropy=0.4)
    assert suggest_temperature(3 * LOGITS, entropy=0.4) == pytest.approx(3 * t, rel=1e-9)
    assert suggest_temperature(LOGITS + 100, entropy=0.4) == pytest.approx(t, rel=1e-9)


def test_masked_classes_do_not_count() -> None:
    masked = torch.cat([LOGITS, torch.full((40, 5), -math.inf)], -1)
    assert suggest_temperature(masked, entropy=0.4) == pytest.approx(suggest_temperature(LOGITS, entropy=0.4))
    single = torch.full((3, 15), -math.inf)
    single[:, 2] = 1.0
    with_single = torch.cat([masked, single.double()])  # a row with one class has one target at every temperature
    assert suggest_temperature(with_single, entropy=0.4) == pytest.approx(suggest_temperature(LOGITS, entropy=0.4))


def test_any_layout_and_type() -> None:
    t = suggest_temperature(LOGITS, entropy=0.4)
    maps = LOGITS.reshape(4, 10, 10).movedim(-1, 1)
    assert suggest_temperature(maps, entropy=0.4, class_dim=1) == pytest.approx(t)
    assert suggest_temperature(LOGITS.bfloat16(), entropy=0.4) == pytest.approx(t, rel=1e-2)
