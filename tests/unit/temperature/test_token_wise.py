from __future__ import annotations

import math

import pytest
import torch

from kd_lightning.temperature import Signals, TokenDifficultyTemperature


@pytest.mark.parametrize("name", ["batch", "tokens"])
@pytest.mark.parametrize(("base", "strength"), [(1.0, 0.5), (2.0, -0.3)])
def test_formula(check, request, name, base, strength):
    def formula(student, teacher, targets):
        p_s, p_t = student.detach().softmax(-1), teacher.softmax(-1)
        s = (1 - (p_s * p_t).sqrt().sum(-1)).sqrt()  # Hellinger by the Bhattacharyya coefficient
        valid = sorted(s[targets != -100].tolist())
        median = valid[(len(valid) - 1) // 2]
        t = (base * (-strength * torch.tanh((s / median).log())).exp()).unsqueeze(-1)
        return t, t, t * t

    check(TokenDifficultyTemperature(base, strength), request.getfixturevalue(name), formula)


def test_tokens_left_out_do_not_move_the_median(tokens):
    before = TokenDifficultyTemperature()(tokens.signals()).student
    student = tokens.student.detach().clone()
    student[tokens.targets == -100] *= 50
    after = TokenDifficultyTemperature()(tokens.signals(student_logits=student)).student
    valid = tokens.targets != -100
    torch.testing.assert_close(after[valid], before[valid])


def test_hard_tokens_are_colder(tokens):
    policy, signals = TokenDifficultyTemperature(base=2.0, strength=0.5), tokens.signals(targets=None)
    t = policy(signals).student
    assert 2 * math.exp(-0.5) <= t.min() < 2 < t.max() <= 2 * math.exp(0.5)


def test_no_gradient_through_t(tokens):
    assert not TokenDifficultyTemperature()(tokens.signals()).student.requires_grad


def test_no_valid_token(tokens):
    t = TokenDifficultyTemperature(base=3.0)(tokens.signals(targets=torch.full((2, 7), -100)))
    assert (t.student == 3.0).all()


def test_a_model_with_itself_has_the_base():
    logits = torch.randn(2, 3, 4)
    assert (TokenDifficultyTemperature(base=3.0)(Signals(logits, logits)).student == 3.0).all()


def test_errors():
    with pytest.raises(ValueError, match="strength must be a finite number"):
        TokenDifficultyTemperature(strength=math.inf)
