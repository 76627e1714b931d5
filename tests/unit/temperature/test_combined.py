from __future__ import annotations

import pytest
import torch

from kd_lightning.functional import Temperature, kd_loss
from kd_lightning.temperature import (
    AsymmetricTemperature,
    ClassFrequencyTemperature,
    JoinedTemperature,
    LearnableTemperature,
    LinearSchedule,
    LogitStdTemperature,
    LossGapTemperature,
    MultiTemperature,
    ProductTemperature,
    Progress,
    SharpnessTemperature,
)


class TestProduct:
    def test_formula(self, check, batch):
        def formula(student, teacher, targets):
            t_s, t_t = 0.75 * 2 * student.std(-1, keepdim=True), 0.75 * 2 * teacher.std(-1, keepdim=True)
            return t_s, t_t, (2 * teacher.std(-1, keepdim=True)) ** 2 * 0.75**2

        policy = ProductTemperature([LogitStdTemperature(2.0), LinearSchedule(1.0, 0.5)])
        check(policy, batch, formula, progress=Progress(step=5, max_steps=10))

    def test_without_a_scale_the_rule_of_the_loss_applies(self, batch):
        t = ProductTemperature([2.0, AsymmetricTemperature(1.0, 3.0)])(batch.signals())
        assert isinstance(t, Temperature)
        assert (t.student.item(), t.teacher.item(), t.scale) == (2.0, 6.0, None)

    def test_shapes_broadcast(self, batch):
        policy = ProductTemperature([ClassFrequencyTemperature([1, 2, 3, 4, 5]), LogitStdTemperature(), 2.0])
        t = policy(batch.signals())
        assert isinstance(t, Temperature)
        assert t.student.shape == (4, 5)
        loss = kd_loss(policy.transform(batch.student), policy.transform(batch.teacher), t)
        assert torch.isfinite(loss)

    def test_the_product_is_bounded(self, batch):
        t = ProductTemperature([20.0, 20.0])(batch.signals())
        assert isinstance(t, Temperature)
        assert t.student.item() == 100.0

    def test_one_temperature_each(self, batch):
        with pytest.raises(ValueError, match="multiplies policies of one temperature each"):
            ProductTemperature([MultiTemperature([1.0, 2.0])])(batch.signals())

    @pytest.mark.parametrize("policies", [[], 4.0, "4", LogitStdTemperature()])
    def test_errors(self, policies):
        with pytest.raises(ValueError, match="ProductTemperature needs a list"):
            ProductTemperature(policies)

    def test_part_error(self):
        with pytest.raises(TypeError, match="must be a number, a schedule"):
            ProductTemperature(["4"])  # pyright: ignore[reportArgumentType]


class TestJoined:
    def at(self, policy, batch, **progress):
        t = policy(batch.signals(progress=Progress(**progress)))
        assert isinstance(t, Temperature)
        return t.student

    def test_switches_and_gives_each_its_own_segment(self, batch):
        policy = JoinedTemperature([LinearSchedule(1.0, 5.0), 3.0, LinearSchedule(8.0, 4.0)], boundaries=[4, 6])
        values = [self.at(policy, batch, epoch=epoch, max_epochs=10).item() for epoch in (0, 2, 4, 5, 6, 8, 10)]
        assert values == pytest.approx([1.0, 3.0, 3.0, 3.0, 8.0, 6.0, 4.0])

    def test_by_steps(self, batch):
        policy = JoinedTemperature([1.0, 2.0], boundaries=[7], unit="step")
        assert [self.at(policy, batch, step=step).item() for step in (6, 7)] == [1.0, 2.0]

    def test_state_moves_only_while_on(self, batch):
        inner = LossGapTemperature()
        policy = JoinedTemperature([4.0, inner], boundaries=[1])
        self.at(policy, batch, epoch=0, max_epochs=2)
        assert inner.value.item() == 4.0
        self.at(policy, batch, epoch=2, max_epochs=2)
        assert inner.value.item() < 4.0

    def test_a_learnable_part_has_a_gradient_while_off(self, batch):
        learnable = LearnableTemperature(warmup_epochs=0)
        policy = JoinedTemperature([4.0, learnable], boundaries=[1])
        kd_loss(batch.student, batch.teacher, policy(batch.signals())).backward()
        assert learnable.raw.grad is not None
        assert learnable.raw.grad.item() == 0.0

    def test_several_temperatures(self, batch):
        terms = JoinedTemperature([1.0, MultiTemperature([2.0, 3.0])], [1])(batch.signals(progress=Progress(epoch=1)))
        assert [term.student.item() for term in terms if isinstance(term, Temperature)] == [2.0, 3.0]

    @pytest.mark.parametrize(
        ("boundaries", "unit", "message"),
        [
            ([1, 2], "epoch", "one boundary between each two policies, got 2 policies and 2 boundaries"),
            ([0], "epoch", "boundaries must be positive"),
            ([1], "day", "unit must be 'epoch' or 'step', got 'day'"),
        ],
    )
    def test_errors(self, boundaries, unit, message):
        with pytest.raises(ValueError, match=message):
            JoinedTemperature([1.0, 2.0], boundaries, unit)


class TestMulti:
    def test_each_its_own_t_squared(self, batch):
        policy = MultiTemperature()
        terms = policy(batch.signals())
        assert len(terms) == 5
        total = sum(kd_loss(batch.student, batch.teacher, t) for t in terms if isinstance(t, Temperature))
        expected = 0.0
        for t in (2.0, 3.0, 4.0, 5.0, 6.0):
            p_s, p_t = ((z.detach() / t).softmax(-1) for z in (batch.student, batch.teacher))
            expected = expected + t**2 * (p_t * (p_t / p_s).log()).sum(-1).mean()
        torch.testing.assert_close(torch.as_tensor(total), torch.as_tensor(expected))

    def test_policies_and_nesting(self, batch):
        policy = MultiTemperature([SharpnessTemperature(4.0), MultiTemperature([2.0, 3.0])])
        assert len(policy(batch.signals())) == 3

    def test_multiplier_moves_all(self, batch):
        policy = MultiTemperature([2.0, 4.0])
        policy.multiplier.fill_(0.5)
        assert [t.student.item() for t in policy(batch.signals()) if isinstance(t, Temperature)] == [1.0, 2.0]

    def test_errors(self):
        with pytest.raises(ValueError, match="MultiTemperature needs a list"):
            MultiTemperature([])
