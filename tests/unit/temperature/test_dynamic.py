from __future__ import annotations

import math

import pytest
import torch

from kd_lightning.temperature import CapacityTemperature, LossGapTemperature, Progress, Signals


def gapped(gap, teacher_loss=0.1):
    """Signals of two classes whose cross-entropies are ``teacher_loss`` and ``teacher_loss + gap``."""

    def logits(loss):
        p = math.exp(-loss)
        return torch.tensor([[math.log(p / (1 - p)), 0.0]], dtype=torch.float64)

    return Signals(logits(teacher_loss + gap), logits(teacher_loss), torch.tensor([0]))


class Dts:
    """The authors' rule in plain Python."""

    def __init__(self, t0=4.0, low=2.0, high=4.0, curve=1.0):
        self.t0, self.low, self.high, self.curve = t0, low, high, curve
        self.t = t0

    def step(self, teacher_loss, student_loss, epoch, epochs):
        cos = 0.5 * (1 + math.cos(self.curve * math.pi * epoch / epochs))
        d = teacher_loss - student_loss
        a = d / (d + 1)
        if a > 1:
            if a > 2:
                a = 1.35
            target = self.t0 * cos * a
        else:
            target = self.t0 * cos
        self.t = 0.9 * self.t + 0.1 * min(max(target, self.low), self.high)
        return self.t


class TestLossGap:
    @pytest.mark.parametrize(("low", "high", "curve"), [(2.0, 4.0, 1.0), (1.0, 12.0, 0.5)])
    def test_follows_the_published_rule(self, low, high, curve):
        policy, reference = LossGapTemperature(4.0, low, high, curve), Dts(4.0, low, high, curve)
        gaps = [3.0, 2.5, 2.1, 1.7, 1.2, 0.9, 0.5, 0.2, 0.0, -0.2]
        for epoch, gap in enumerate(gaps):
            signals = gapped(gap, 0.5).replace(progress=Progress(epoch=epoch, max_epochs=len(gaps)))
            expected = reference.step(0.5, 0.5 + gap, epoch, len(gaps))
            assert policy(signals).student.item() == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize(
        ("gap", "gate"), [(0.5, 1.0), (0.99, 1.0), (1.2, 1.35), (1.9, 1.35), (2.0001, 2.0), (3.0, 1.5), (6.0, 1.2)]
    )
    def test_gate_is_not_monotone(self, gap, gate):
        policy = LossGapTemperature(4.0, 1.0, 20.0, curve=0.0, momentum=0.0)
        t = policy(gapped(gap).replace(progress=Progress(max_epochs=1))).student
        assert t.item() == pytest.approx(4.0 * gate, rel=1e-3)

    def test_finite_at_the_singularity(self):
        policy = LossGapTemperature(4.0, 1.0, 20.0, momentum=0.0)
        for gap in (1.0 - 1e-7, 1.0, 1.0 + 1e-7):
            assert torch.isfinite(policy(gapped(gap).replace(progress=Progress(max_epochs=1))).student).all()

    def test_only_valid_positions_count(self):
        progress = Progress(max_epochs=1)
        signals = Signals(
            torch.tensor([[0.0, 0.0], [-50.0, 50.0]]), torch.zeros(2, 2), torch.tensor([0, -100]), progress
        )
        policy = LossGapTemperature(4.0, 1.0, 20.0, curve=0.0, momentum=0.0)
        assert policy(signals).student.item() == pytest.approx(4.0)

    def test_evaluation_and_empty_batches_leave_the_state(self, batch):
        policy = LossGapTemperature()
        end = Progress(epoch=1, max_epochs=1)
        policy.eval()(batch.signals(progress=end))
        policy.train()(batch.signals(progress=end, targets=torch.full((4,), -100)))
        policy(batch.signals(progress=end, student_logits=torch.full((4, 5), math.nan)))
        assert policy.value.item() == 4.0
        policy(batch.signals(progress=end))
        assert policy.value.item() == pytest.approx(3.8)

    def test_by_steps_where_epochs_are_unknown(self, batch):
        policy = LossGapTemperature(4.0, 1.0, 4.0, momentum=0.0)
        assert policy(batch.signals(progress=Progress(step=1, max_steps=2))).student.item() == pytest.approx(2.0)
        with pytest.raises(ValueError, match="neither max_steps nor max_epochs"):
            policy(batch.signals())

    def test_backward_after_two_forwards(self, batch):
        """Gradient accumulation in one graph: the state that moved must not be part of it."""
        policy = LossGapTemperature()
        progress = Progress(max_epochs=3)
        total = sum((batch.student * policy(batch.signals(progress=progress)).student).sum() for _ in range(2))
        assert isinstance(total, torch.Tensor)
        total.backward()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"min_value": 5.0}, "must not be above max_value"),
            ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1"),
            ({"curve": -1.0}, "curve must be"),
            ({"init_value": 0.0}, "init_value must be a temperature"),
        ],
    )
    def test_errors(self, settings, message):
        with pytest.raises(ValueError, match=message):
            LossGapTemperature(**settings)

    def test_needs_labels(self, batch):
        with pytest.raises(ValueError, match="LossGapTemperature reads the label"):
            LossGapTemperature()(batch.signals(targets=None, progress=Progress(max_epochs=1)))


class TestCapacity:
    def reference_ratio(self, signals, t):
        p_s, p_t = ((z.detach().double() / t).softmax(-1) for z in (signals.student_logits, signals.teacher_logits))
        keep = torch.ones(p_t.shape[:-1], dtype=torch.bool) if signals.valid is None else signals.valid
        missed = (p_t * (p_t / p_s).log()).sum(-1)[keep].mean()
        return (missed / -(p_t * p_t.log()).sum(-1)[keep].mean()).item()

    @pytest.mark.parametrize("name", ["batch", "tokens"])
    def test_ratio_and_its_average(self, request, name):
        signals = request.getfixturevalue(name).signals()
        policy = CapacityTemperature(init_value=3.0, overload=1e6, underload=0.0)
        assert policy.ratio.item() == -1.0
        policy(signals)
        first = self.reference_ratio(signals, 3.0)
        assert policy.ratio.item() == pytest.approx(first, rel=1e-5)
        other = signals.replace(student_logits=-signals.student_logits)
        policy(other)
        expected = 0.9 * first + 0.1 * self.reference_ratio(other, 3.0)
        assert policy.ratio.item() == pytest.approx(expected, rel=1e-5)

    def test_lowered_raised_and_left(self, batch):
        r = self.reference_ratio(batch.signals(), 4.0)
        for overload, underload, expected in ((0.9 * r, 0.0, 3.6), (9.0, 1.1 * r, 4 / 0.9), (1.1 * r, 0.9 * r, 4.0)):
            policy = CapacityTemperature(4.0, overload, underload, factor=0.9, interval=3)
            values = [policy(batch.signals()).student.item() for _ in range(3)]
            assert values == pytest.approx([4.0, 4.0, expected])

    def test_interval_starts_again(self, batch):
        policy = CapacityTemperature(8.0, overload=0.0, underload=0.0, factor=0.5, interval=2, min_value=1.0)
        values = [policy(batch.signals()).student.item() for _ in range(8)]
        assert values == [8.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0, 1.0]

    def test_a_perfect_student_raises_to_the_end(self, batch):
        policy = CapacityTemperature(4.0, factor=0.5, interval=1, max_value=10.0)
        signals = batch.signals(student_logits=batch.teacher)
        assert [policy(signals).student.item() for _ in range(3)] == [8.0, 10.0, 10.0]

    def test_evaluation_and_broken_batches_leave_the_state(self, batch):
        policy = CapacityTemperature(4.0, overload=0.0, underload=0.0, interval=1)
        policy.eval()(batch.signals())
        policy.train()(batch.signals(targets=torch.full((4,), -100)))
        policy(batch.signals(student_logits=torch.full((4, 5), math.nan)))
        assert policy.value.item() == 4.0
        assert policy.ratio.item() == -1.0

    def test_judges_the_temperature_that_the_loss_used(self, batch):
        policy = CapacityTemperature(4.0)
        policy.multiplier.fill_(0.5)
        policy(batch.signals())
        assert policy.ratio.item() == pytest.approx(self.reference_ratio(batch.signals(), 2.0), rel=1e-5)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"init_value": 20.0}, "init_value must lie between"),
            ({"overload": 0.1, "underload": 0.2}, "0 <= underload <= overload"),
            ({"factor": 1.0}, "factor must lie between 0 and 1"),
            ({"interval": 0}, "interval must be 1"),
            ({"momentum": -0.1}, "momentum must lie"),
            ({"min_value": 0.0}, "min_value must be a temperature"),
        ],
    )
    def test_errors(self, settings, message):
        with pytest.raises(ValueError, match=message):
            CapacityTemperature(**settings)
