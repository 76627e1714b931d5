"""Temperatures by the largest logit and by the energy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_lightning.temperature import EnergyTemperature, MaxLogitTemperature, Signals


def test_max_logit_by_the_formula(batch, check):
    def formula(student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z_s = student.detach()
        t_s, t_t = ((z.max(-1, keepdim=True).values - z.mean(-1, keepdim=True)) / 1.5 for z in (z_s, teacher))
        return t_s, t_t, t_s * t_t

    check(MaxLogitTemperature(1.5), batch, formula)


def test_max_logit_gives_every_sample_the_same_largest_logit(batch):
    temperature = MaxLogitTemperature(1.5)(batch.signals())
    for logits, t in ((batch.student, temperature.student), (batch.teacher, temperature.teacher)):
        centred = (logits - logits.mean(-1, keepdim=True)).detach() / t
        torch.testing.assert_close(centred.amax(-1), torch.full((4,), 1.5, dtype=torch.float64))


def test_max_logit_of_constant_logits_is_the_lower_bound():
    logits = torch.full((2, 3), 1e4 / 3)
    temperature = MaxLogitTemperature(2.0)(Signals(logits, logits))
    torch.testing.assert_close(temperature.student, torch.full((2, 1), 0.05))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("shift", [0.0, 20.0])
def test_energy_by_the_formula(tokens, share, shift):
    """One token after the other, its own constant added to each, the energies of the valid ones ranked by numpy."""
    teacher = tokens.teacher + shift * torch.rand(2, 7, 1, dtype=torch.float64)
    valid = (tokens.targets != -100).numpy()
    z = tokens.teacher.numpy()
    energy = -np.log(np.exp(z - z.mean(-1, keepdims=True)).sum(-1))
    many = int(share * valid.sum())
    highest = np.argsort(-energy[valid])[:many]
    expected = np.full(valid.sum(), 5.0)
    expected[highest] = 1.0
    policy = EnergyTemperature(low_energy=5.0, high_energy=1.0, share=share)
    got = policy(tokens.signals(teacher_logits=teacher))
    np.testing.assert_array_equal(got.student.squeeze(-1).numpy()[valid], expected)
    assert got.teacher is got.student


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_energy_by_a_threshold_of_the_whole_data(share: float) -> None:
    """Samples are high whose energy is among the data's highest, whatever the batches, as published."""
    logits = 3 * torch.randn(40, 6, dtype=torch.float64) + 20 * torch.rand(40, 1, dtype=torch.float64)
    z = logits.numpy()
    energy = -np.log(np.exp(z - z.mean(-1, keepdims=True)).sum(-1))
    threshold = EnergyTemperature.energy(logits).quantile(1 - share).item()
    policy = EnergyTemperature(low_energy=5.0, high_energy=1.0, threshold=threshold)
    expected = np.where(np.argsort(np.argsort(-energy)) < share * 40, 1.0, 5.0)
    for size in (40, 8, 3):
        got = [policy(Signals(part, part)).student for part in logits.split(size)]
        np.testing.assert_array_equal(torch.cat(got).squeeze(-1).numpy(), expected)


def test_energy_of_equal_logits_is_low():
    zeros = torch.zeros(4, 3)
    assert EnergyTemperature()(Signals(zeros, zeros)).student.eq(6.0).all()


def test_energy_without_a_valid_position():
    policy = EnergyTemperature()
    zeros = torch.zeros(2, 3)
    assert policy(Signals(zeros, zeros, torch.full((2,), -100))).student.isfinite().all()
