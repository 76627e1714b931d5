from __future__ import annotations

import math

import pytest
import torch

from kd_lightning.functional import kd_loss
from kd_lightning.temperature import (
    AsymmetricTemperature,
    InstanceTemperature,
    LearnableTemperature,
    ProductTemperature,
    Progress,
    Signals,
)


def reference_gradient(batch, raw, low, high):
    """d/draw of T² · KL with T = low + (high − low) · σ(raw), by hand in float64: T² is differentiated too."""
    raw = torch.tensor([raw], dtype=torch.float64, requires_grad=True)
    t = low + (high - low) / (1 + (-raw).exp())
    p_s, p_t = ((z / t).exp() / (z / t).exp().sum(-1, keepdim=True) for z in (batch.student.detach(), batch.teacher))
    loss = t**2 * (p_t * (p_t / p_s).log()).sum(-1).mean()
    (gradient,) = torch.autograd.grad(loss, raw)
    return t.item(), loss.item(), gradient.item()


def gradient_of(policy, batch, progress=None):
    loss = kd_loss(batch.student, batch.teacher, policy(batch.signals(progress=progress or Progress())))
    return torch.autograd.grad(loss, policy.raw)[0].item()


class TestLearnable:
    def test_ctkd_start(self, batch):
        """T = 1 + 20·σ(1) = 15.62."""
        policy = LearnableTemperature()
        assert policy(batch.signals()).student.item() == pytest.approx(15.62, abs=1e-4)
        assert policy.raw.item() == pytest.approx(1.0, abs=1e-3)
        assert 1 + 20 / (1 + math.exp(-1)) == pytest.approx(15.62, abs=2e-3)

    @pytest.mark.parametrize("init_value", [1.5, 4.0, 15.62, 20.5])
    def test_value_and_gradient_with_t_squared_in_the_graph(self, batch, init_value):
        policy = LearnableTemperature(init_value, adversarial=False)
        t, loss, gradient = reference_gradient(batch, policy.raw.item(), 1.0, 21.0)
        ours = policy(batch.signals())
        assert ours.student.item() == pytest.approx(t, rel=1e-6)
        assert kd_loss(batch.student, batch.teacher, ours).item() == pytest.approx(loss, rel=1e-6)
        assert gradient_of(policy, batch) == pytest.approx(gradient, rel=1e-4)  # float32 parameter

    @pytest.mark.parametrize(("epoch", "strength"), [(0, 0.02447174), (4, 0.5), (9, 1.0), (200, 1.0)])
    def test_reversal_warms_up(self, batch, epoch, strength):
        policy = LearnableTemperature(init_value=4.0)
        _, _, gradient = reference_gradient(batch, policy.raw.item(), 1.0, 21.0)
        ours = gradient_of(policy, batch, Progress(epoch=epoch))
        assert ours == pytest.approx(-strength * gradient, rel=1e-5, abs=1e-9)

    def test_without_warm_up(self, batch):
        policy = LearnableTemperature(init_value=4.0, warmup_epochs=0)
        helper = LearnableTemperature(init_value=4.0, adversarial=False)
        assert gradient_of(policy, batch) == pytest.approx(-gradient_of(helper, batch), rel=1e-6)

    def test_the_student_is_not_reversed(self, batch):
        gradients = []
        for adversarial in (True, False):
            t = LearnableTemperature(init_value=4.0, adversarial=adversarial, warmup_epochs=0)(batch.signals())
            gradients += torch.autograd.grad(kd_loss(batch.student, batch.teacher, t), batch.student)
        torch.testing.assert_close(*gradients)

    @pytest.mark.parametrize(("adversarial", "direction"), [(True, 1), (False, -1)])
    def test_direction_of_a_step(self, batch, adversarial, direction):
        policy = LearnableTemperature(init_value=2.0, adversarial=adversarial, warmup_epochs=0)
        optimizer = torch.optim.SGD(policy.param_groups(), lr=0.1)

        def loss():
            return kd_loss(batch.student, batch.teacher, policy(batch.signals()))

        before = loss()
        before.backward()
        optimizer.step()
        assert (loss() - before).item() * direction > 0

    def test_param_groups(self):
        policy = LearnableTemperature()
        assert policy.param_groups() == [{"params": [policy.raw], "weight_decay": 0.0}]
        policy = LearnableTemperature(lr=0.3)
        assert policy.param_groups() == [{"params": [policy.raw], "weight_decay": 0.0, "lr": 0.3}]
        assert ProductTemperature([2.0, 3.0]).param_groups() == []

    def test_param_groups_of_a_combination_keep_their_learning_rates(self):
        fast, slow = LearnableTemperature(lr=0.3), LearnableTemperature()
        groups = AsymmetricTemperature(fast, ProductTemperature([slow, fast, 2.0])).param_groups()
        assert [(group["params"], group.get("lr")) for group in groups] == [([fast.raw], 0.3), ([slow.raw], None)]
        torch.optim.SGD(groups, lr=0.1)  # refuses a parameter in two groups

    def test_bounds_hold_for_any_parameter(self, batch):
        policy = LearnableTemperature(min_value=1.0, max_value=21.0)
        for raw in (-1e4, 1e4):
            policy.raw.data.fill_(raw)
            assert 1.0 <= policy(batch.signals()).student.item() <= 21.0

    def test_the_parameter_has_a_gradient_in_the_first_epoch(self, batch):
        policy = LearnableTemperature()
        kd_loss(batch.student, batch.teacher, policy(batch.signals())).backward()
        assert policy.raw.grad is not None
        assert policy.raw.grad.item() != 0.0

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"init_value": 1.0}, "strictly between min_value=1 and max_value=21"),
            ({"init_value": 30.0}, "strictly between"),
            ({"min_value": 30.0}, "must not be above max_value"),
            ({"warmup_epochs": -1}, "warmup_epochs must be 0"),
            ({"lr": 0.0}, "lr must be positive"),
        ],
    )
    def test_errors(self, settings, message):
        with pytest.raises(ValueError, match=message):
            LearnableTemperature(**settings)


class TestInstance:
    def test_formula(self, check, batch):
        policy = InstanceTemperature(5, hidden_size=8, init_value=4.0, adversarial=False)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        w1, b1, w2, b2 = (p.detach().double() for p in policy.network.parameters())

        def formula(student, teacher, targets):
            x = [(z.detach().softmax(-1).log().clamp(min=-10) + 10) / 10 for z in (student, teacher)]
            hidden = (torch.cat(x, -1) @ w1.T + b1).clamp(min=0)
            t = 1 + 20 * torch.sigmoid(hidden @ w2.T + b2)
            return t, t, t * t

        check(policy, batch, formula, rtol=1e-5)

    def test_starts_at_init_value_for_all(self, tokens):
        t = InstanceTemperature(11, init_value=4.0)(tokens.signals()).student
        assert t.shape == (2, 7, 1)
        torch.testing.assert_close(t, torch.full_like(t, 4.0))

    def test_the_network_learns_and_the_student_gets_nothing_through_it(self, batch):
        policy = InstanceTemperature(5, adversarial=False)
        t = policy(batch.signals()).student
        t.sum().backward()
        assert batch.student.grad is None
        last = policy.network[-1]
        assert isinstance(last, torch.nn.Linear)
        assert last.weight.grad is not None
        assert last.weight.grad.abs().sum() > 0

    def test_reversed(self, batch):
        gradients = []
        policy = InstanceTemperature(5, warmup_epochs=4)
        for adversarial in (True, False):
            policy.adversarial = adversarial
            loss = kd_loss(batch.student, batch.teacher, policy(batch.signals(progress=Progress(epoch=1))))
            gradients.append(torch.autograd.grad(loss, list(policy.network.parameters())[-1])[0])
        torch.testing.assert_close(gradients[0], -0.5 * gradients[1])

    def test_under_autocast(self):
        policy = InstanceTemperature(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            t = policy(Signals(torch.randn(2, 3), torch.randn(2, 3))).student
        assert t.dtype == torch.float32

    def test_errors(self, batch):
        with pytest.raises(ValueError, match="built for num_classes=7, got logits of 5 classes"):
            InstanceTemperature(7)(batch.signals())
        with pytest.raises(ValueError, match="two or more classes"):
            InstanceTemperature(1)
