from __future__ import annotations

import pytest
import torch

from kd_lightning.functional import kd_loss
from kd_lightning.temperature import (
    AsymmetricTemperature,
    ClassFrequencyTemperature,
    CosineSchedule,
    MultiTemperature,
    Progress,
    TransformedTeacherTemperature,
)


class TestAsymmetric:
    def test_formula(self, check, batch):
        def formula(student, teacher, targets):
            t_s, t_t = torch.tensor([1.5], dtype=torch.float64), torch.tensor([5.0], dtype=torch.float64)
            return t_s, t_t, t_s * t_t

        policy = AsymmetricTemperature(1.5, CosineSchedule(8.0, 2.0))
        check(policy, batch, formula, progress=Progress(step=50, max_steps=100))

    def test_both_sides_are_centred(self, batch):
        policy = AsymmetricTemperature(student=2.0, teacher=ClassFrequencyTemperature([1, 2, 3, 4, 5]))
        assert policy.transform(batch.teacher).mean(-1).abs().max() < 1e-12

    def test_one_temperature_each(self, batch):
        with pytest.raises(ValueError, match="one temperature each"):
            AsymmetricTemperature(student=1.0, teacher=MultiTemperature([2.0, 3.0]))(batch.signals())


class TestTransformedTeacher:
    @pytest.mark.parametrize("gamma", [0.25, 1.0])
    def test_power_transform(self, check, batch, gamma):
        def formula(student, teacher, targets):
            one = torch.ones(1, dtype=torch.float64)
            return one, one / gamma, one

        check(TransformedTeacherTemperature(gamma), batch, formula)
        p_t, p_s = batch.teacher.softmax(-1), batch.student.softmax(-1)
        powered = p_t**gamma / (p_t**gamma).sum(-1, keepdim=True)
        expected = (powered * (powered / p_s).log()).sum(-1).mean()
        loss = kd_loss(batch.student, batch.teacher, TransformedTeacherTemperature(gamma)(batch.signals()))
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)

    def test_reference_value(self, batch):
        t = TransformedTeacherTemperature(gamma=0.25)(batch.signals())
        assert kd_loss(batch.student, batch.teacher, t).item() == pytest.approx(0.7318592300506958, rel=1e-6)

    @pytest.mark.parametrize("name", ["batch", "tokens"])
    def test_item_weight(self, check, request, name):
        def formula(student, teacher, targets):
            one = torch.ones(1, dtype=torch.float64)
            p = teacher.exp() / teacher.exp().sum(-1, keepdim=True)
            return one, one / 0.2, (p**0.2).sum(-1, keepdim=True)

        check(TransformedTeacherTemperature(0.2, weighted=True), request.getfixturevalue(name), formula, rtol=1e-6)

    @pytest.mark.parametrize(("gamma", "message"), [(0.0, "gamma must be a positive"), (0.001, "1 / gamma must be")])
    def test_errors(self, gamma, message):
        with pytest.raises(ValueError, match=message):
            TransformedTeacherTemperature(gamma)
