from __future__ import annotations

import math

import pytest
import torch

from kd_lightning.functional import kd_loss
from kd_lightning.temperature import (
    ConfidenceTemperature,
    DisagreementTemperature,
    EntropyTemperature,
    LogitStandardization,
    LogitStdTemperature,
    SharpnessTemperature,
    Signals,
    TargetConfidenceTemperature,
)

INF = math.inf


def softmax(logits):
    return logits.exp() / logits.exp().sum(-1, keepdim=True)


def std(logits):
    mean = logits.sum(-1, keepdim=True) / logits.shape[-1]
    return (((logits - mean) ** 2).sum(-1, keepdim=True) / (logits.shape[-1] - 1)) ** 0.5


@pytest.fixture(params=["samples", "tokens"])
def data(request, batch, tokens):
    return batch if request.param == "samples" else tokens


class TestConfidence:
    def test_switch(self, check, data):
        threshold = softmax(data.teacher).amax(-1).median().item() + 1e-9

        def formula(student, teacher, targets):
            t = torch.full((*targets.shape, 1), 2.0, dtype=torch.float64)
            t[softmax(teacher).amax(-1) > threshold] = 0.5
            return t, t, t * t

        check(ConfidenceTemperature(threshold, confident=0.5, unsure=2.0), data, formula)

    def test_soft(self, check, data):
        def formula(student, teacher, targets):
            gate = 1 / (1 + (-(softmax(teacher).amax(-1, keepdim=True) - 0.7) / 0.1).exp())
            t = gate * 1.5 + (1 - gate) * 5.0
            return t, t, t * t

        check(ConfidenceTemperature(0.7, confident=1.5, unsure=5.0, softness=0.1), data, formula)

    def test_softness_ends(self, batch):
        switch = ConfidenceTemperature(0.6)(batch.signals()).student
        hardly_soft = ConfidenceTemperature(0.6, softness=1e-6)(batch.signals()).student
        very_soft = ConfidenceTemperature(0.6, softness=1e6)(batch.signals()).student
        torch.testing.assert_close(hardly_soft, switch.double())
        torch.testing.assert_close(very_soft, torch.full_like(very_soft, 1.25), rtol=1e-5, atol=0)

    def test_threshold_ends(self, batch):
        assert (ConfidenceTemperature(threshold=0.0)(batch.signals()).student == 0.5).all()
        assert (ConfidenceTemperature(threshold=1.0)(batch.signals()).student == 2.0).all()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"threshold": 1.5}, "threshold is a probability"),
            ({"softness": -0.1}, "softness must be"),
            ({"confident": 0.0}, "confident must be a temperature within"),
            ({"unsure": 200.0}, "unsure must be a temperature within"),
        ],
    )
    def test_errors(self, settings, message):
        with pytest.raises(ValueError, match=message):
            ConfidenceTemperature(**settings)


class TestEntropy:
    def test_formula(self, check, data):
        def formula(student, teacher, targets):
            p = softmax(teacher)
            t = 1.5 + 4.0 * -(p * p.log()).sum(-1, keepdim=True) / math.log(teacher.shape[-1])
            return t, t, t * t

        check(EntropyTemperature(min_value=1.5, max_value=5.5), data, formula)

    def test_classes_masked_out_do_not_count(self):
        teacher = torch.tensor([[0.0, 0.0, 0.0, -INF], [0.0, -INF, -INF, -INF]])
        t = EntropyTemperature(2.0, 6.0)(Signals(torch.zeros(2, 4), teacher)).teacher
        assert t.flatten().tolist() == [6.0, 2.0]

    def test_errors(self):
        with pytest.raises(ValueError, match="min_value must not be above max_value, got min_value=6, max_value=2"):
            EntropyTemperature(6.0, 2.0)


class TestLogitStd:
    @pytest.mark.parametrize("factor", [0.5, 2.0])
    def test_formula(self, check, data, factor):
        def formula(student, teacher, targets):
            return factor * std(student), factor * std(teacher), (factor * std(teacher)) ** 2

        check(LogitStdTemperature(factor), data, formula)

    def test_detached(self, check, data):
        def formula(student, teacher, targets):
            return 2 * std(student).detach(), 2 * std(teacher), (2 * std(teacher)) ** 2

        check(LogitStdTemperature(2.0, detach=True), data, formula)

    def test_published_default_leaks_through_the_student(self, batch):
        policy = LogitStdTemperature()
        assert policy(batch.signals()).student.requires_grad
        assert not LogitStdTemperature(detach=True)(batch.signals()).student.requires_grad

    def test_scale_follows_the_bounded_temperature(self, batch):
        policy = LogitStdTemperature(factor=100.0, max_temperature=10.0)
        assert policy(batch.signals()).scale.unique().tolist() == [100.0]

    def test_scale_follows_the_multiplier(self, batch):
        policy = LogitStdTemperature()
        before = policy(batch.signals())
        policy.multiplier.fill_(0.5)
        after = policy(batch.signals())
        torch.testing.assert_close(after.scale, before.scale / 4)
        torch.testing.assert_close(after.student, before.student / 2)

    def test_masked_classes_do_not_count(self):
        logits = torch.tensor([[1.0, 2.0, 4.0, -INF]])
        t = LogitStdTemperature(1.0)(Signals(logits, logits)).student
        torch.testing.assert_close(t, torch.tensor([[1.0, 2.0, 4.0]]).std(-1, keepdim=True))

    def test_constant_logits_have_a_finite_gradient(self):
        student = torch.zeros(2, 4, requires_grad=True)
        signals = Signals(student, torch.randn(2, 4))
        kd_loss(student, signals.teacher_logits, LogitStdTemperature()(signals)).backward()
        assert student.grad is not None
        assert torch.isfinite(student.grad).all()

    @pytest.mark.parametrize("policy", [LogitStdTemperature(), LogitStandardization()])
    def test_two_classes(self, policy):
        with pytest.raises(ValueError, match="Got 2 classes"):
            policy(Signals(torch.zeros(3, 2), torch.zeros(3, 2)))

    @pytest.mark.parametrize("factor", [0.0, -1.0, INF])
    def test_errors(self, factor):
        with pytest.raises(ValueError, match="factor must be a positive, finite number"):
            LogitStdTemperature(factor)


class TestLogitStandardization:
    def test_formula(self, check, data):
        def formula(student, teacher, targets):
            t_s, t_t = (3.0 * (std(z) + 1e-7) for z in (student, teacher))
            return t_s, t_t, torch.tensor([9.0], dtype=torch.float64)

        check(LogitStandardization(3.0), data, formula, rtol=1e-7)

    def test_reference_value(self, batch):
        """Computed apart, from the authors' code: z-score, then T = 2, then T²."""
        t = LogitStandardization(2.0)(batch.signals())
        assert kd_loss(batch.student, batch.teacher, t).item() == pytest.approx(0.26092259126901957, rel=1e-6)

    def test_the_size_of_the_logits_does_not_matter(self, batch):
        policy = LogitStandardization(2.0)
        loss = kd_loss(batch.student, batch.teacher, policy(batch.signals()))
        larger = kd_loss(batch.student, 3 * batch.teacher, policy(batch.signals(teacher_logits=3 * batch.teacher)))
        torch.testing.assert_close(larger, loss, rtol=1e-6, atol=0)

    def test_errors(self):
        with pytest.raises(ValueError, match="temperature must be a temperature within"):
            LogitStandardization(0.0)


class TestSharpness:
    @pytest.mark.parametrize("detach", [False, True])
    def test_formula(self, check, data, detach):
        def formula(student, teacher, targets):
            m_s, m_t = ((z - z.sum(-1, keepdim=True) / z.shape[-1]).amax(-1, keepdim=True) for z in (student, teacher))
            m_s = m_s.detach() if detach else m_s
            t_s, t_t = 2 * m_s / (m_s + m_t) * 4.0, 2 * m_t / (m_s + m_t) * 4.0
            return t_s, t_t, t_s * t_t

        check(SharpnessTemperature(4.0, detach=detach), data, formula, rtol=1e-6)

    def test_as_published_where_the_means_are_zero(self):
        student, teacher = torch.tensor([[2.0, -1.0, -1.0]]), torch.tensor([[4.0, 1.0, -5.0]])
        t = SharpnessTemperature(4.0)(Signals(student, teacher))
        assert t.student.item() == pytest.approx(2 * 2 / (4 + 2) * 4)
        assert t.teacher.item() == pytest.approx(2 * 4 / (4 + 2) * 4)

    def test_never_negative_and_blind_to_a_shift(self):
        """Maxima of −1 and 1.0001 give T_s = −79 987 as published."""
        student, teacher = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[1.0001, 0.0, -1.0]])
        policy = SharpnessTemperature(4.0)
        t = policy(Signals(student, teacher))
        assert 0 < t.student.item() < 8
        torch.testing.assert_close(policy(Signals(student + 5, teacher)).student, t.student)

    def test_constant_logits(self):
        t = SharpnessTemperature(4.0)(Signals(torch.zeros(1, 3), torch.zeros(1, 3)))
        assert t.student.item() == t.teacher.item() == pytest.approx(4.0)


class TestDisagreement:
    @pytest.mark.parametrize("center", [True, False])
    def test_flsw(self, check, data, center):
        def formula(student, teacher, targets):
            s, t = student.detach(), teacher
            if center:
                s, t = s - s.mean(-1, keepdim=True), t - t.mean(-1, keepdim=True)
            cosine = (s * t).sum(-1) / ((s * s).sum(-1) * (t * t).sum(-1)) ** 0.5
            w = ((1 - cosine) + 1e-4) ** 0.5
            temperature = (4.0 + 1.5 * (w[targets != -100].mean() - w)).unsqueeze(-1)
            return temperature, temperature, temperature**2

        check(DisagreementTemperature(beta=1.5, gamma=0.5, base=4.0, center=center), data, formula)

    def test_cwsm(self, check, data):
        def formula(student, teacher, targets):
            w = 1 / (softmax(student.detach()).amax(-1) + 1e-3)
            temperature = (5.0 - 0.3 * (w[targets != -100].mean() - w)).unsqueeze(-1)
            return temperature, temperature, temperature**2

        check(DisagreementTemperature(beta=-0.3, base=5.0, by="confidence"), data, formula)

    def test_beta_zero_is_constant(self, batch):
        assert (DisagreementTemperature(beta=0.0, base=3.0)(batch.signals()).student == 3.0).all()

    def test_large_beta_stays_within_the_bounds(self, batch):
        t = DisagreementTemperature(beta=80.0, min_temperature=1.0)(batch.signals()).student
        assert t.min().item() == 1.0

    def test_without_a_valid_position(self, batch):
        t = DisagreementTemperature()(batch.signals(targets=torch.full((4,), -100)))
        assert torch.isfinite(t.student).all()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"gamma": 0.0}, "gamma must be a positive"),
            ({"beta": math.nan}, "beta must be a finite"),
            ({"base": -1.0}, "base must be a temperature"),
            ({"by": "angle"}, "'cosine' or 'confidence', got 'angle'"),
        ],
    )
    def test_errors(self, settings, message):
        with pytest.raises(ValueError, match=message):
            DisagreementTemperature(**settings)


class TestTargetConfidence:
    @pytest.mark.parametrize("beta", [1.0, 0.3, -1.0])
    def test_formula(self, check, data, beta):
        def formula(student, teacher, targets):
            known = torch.where(targets == -100, 0, targets)
            p = torch.zeros(targets.shape, dtype=torch.float64)
            for index in [tuple(i) for i in torch.ones_like(targets).nonzero().tolist()]:
                p[index] = softmax(teacher)[(*index, int(known[index]))]
            t = (2.0 + 0.5 * (1 + beta * torch.cos(math.pi * (1 - p))) * 5.0).unsqueeze(-1)
            return t, t, t * t

        check(TargetConfidenceTemperature(2.0, 7.0, beta), data, formula)

    @pytest.mark.parametrize("targets", [None, torch.zeros(4, 5)])
    def test_needs_class_indices(self, batch, targets):
        with pytest.raises(ValueError, match="TargetConfidenceTemperature reads the label of each position"):
            TargetConfidenceTemperature()(batch.signals(targets=targets))

    def test_errors(self):
        with pytest.raises(ValueError, match=r"beta must lie in \[-1, 1\], got 2"):
            TargetConfidenceTemperature(beta=2.0)
