from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from kd_lightning.functional import kd_loss
from kd_lightning.temperature import (
    ClassFrequencyTemperature,
    CorrectWrongTemperature,
    JoinedTemperature,
    ProductTemperature,
    Signals,
)


def centred(logits):
    return logits - logits.sum(-1, keepdim=True) / logits.shape[-1]


class TestClassFrequency:
    COUNTS = (500, 250, 20, 100, 5)

    @pytest.mark.parametrize("direction", ["rare_high", "rare_low"])
    def test_formula(self, check, batch, direction):
        def formula(student, teacher, targets):
            logs = [math.log(n) for n in self.COUNTS]
            rarity = [(logs[0] - value) / (logs[0] - logs[4]) for value in logs]
            if direction == "rare_low":
                rarity = [1 - r for r in rarity]
            t = torch.tensor([[1.5 + 3.0 * r for r in rarity]], dtype=torch.float64)
            return t, t, (t * t).mean().reshape(1)

        policy = ClassFrequencyTemperature(self.COUNTS, 1.5, 4.5, direction)
        check(policy, batch, formula, rtol=1e-6, loss_sees=centred)

    def test_direction(self, batch):
        t = ClassFrequencyTemperature(self.COUNTS, 2.0, 6.0)(batch.signals()).student
        assert t[0, 0] == 2.0
        assert t[0, 4] == 6.0

    def test_equal_counts(self, batch):
        assert (ClassFrequencyTemperature([7] * 5, 2.0, 6.0)(batch.signals()).student == 4.0).all()

    def test_an_absent_class_counts_as_the_rarest(self, batch):
        t = ClassFrequencyTemperature([100, 10, 0, 10, 50], 2.0, 6.0)(batch.signals()).student
        assert t[0, 2] == t[0, 1] == 6.0

    def test_tokens(self, tokens):
        t = ClassFrequencyTemperature(torch.arange(1, 12))(tokens.signals())
        assert t.student.shape == (1, 1, 11)

    def test_blind_to_a_shift_of_the_logits(self, batch):
        policy = ClassFrequencyTemperature(self.COUNTS)

        def loss(student):
            temperature = policy(batch.signals(student_logits=student))
            return kd_loss(policy.transform(student), policy.transform(batch.teacher), temperature)

        torch.testing.assert_close(loss(batch.student + 7.0), loss(batch.student))

    def test_from_the_data_module(self, batch):
        policy = ClassFrequencyTemperature(min_value=2.0, max_value=6.0)
        with pytest.raises(ValueError, match="has no class counts"):
            policy(batch.signals())
        policy.setup_data(None)
        policy.setup_data(SimpleNamespace())
        policy.setup_data(SimpleNamespace(class_counts=torch.tensor(self.COUNTS)))
        assert policy(batch.signals()).student[0, 4] == 6.0

    def test_given_counts_stay(self):
        policy = ClassFrequencyTemperature([1, 2, 3])
        policy.setup_data(SimpleNamespace(class_counts=[5, 5, 5]))
        assert policy.class_counts.tolist() == [1, 2, 3]

    def test_combinations_pass_the_data_on(self):
        inner = ClassFrequencyTemperature()
        outer = JoinedTemperature([4.0, ProductTemperature([inner, 0.5])], boundaries=[3])
        outer.setup_data(SimpleNamespace(class_counts=[5, 6, 7]))
        assert inner.class_counts.tolist() == [5, 6, 7]

    def test_a_checkpoint_brings_the_counts(self, batch):
        trained = ClassFrequencyTemperature()
        trained.setup_data(SimpleNamespace(class_counts=self.COUNTS))
        fresh = ClassFrequencyTemperature()
        fresh.load_state_dict(trained.state_dict())
        torch.testing.assert_close(fresh(batch.signals()).student, trained(batch.signals()).student)

    def test_a_checkpoint_without_counts_leaves_ours(self):
        policy = ClassFrequencyTemperature(self.COUNTS)
        policy.load_state_dict(ClassFrequencyTemperature().state_dict())
        assert policy.class_counts.tolist() == list(self.COUNTS)

    def test_a_checkpoint_of_other_classes_is_refused(self):
        policy = ClassFrequencyTemperature([1, 2, 3])
        with pytest.raises(RuntimeError, match="size mismatch"):
            policy.load_state_dict(ClassFrequencyTemperature(self.COUNTS).state_dict())

    def test_wrong_number_of_classes(self, batch):
        with pytest.raises(ValueError, match="counts of 3 classes, but the logits have 5"):
            ClassFrequencyTemperature([1, 2, 3])(batch.signals())

    @pytest.mark.parametrize("counts", [[], [3], [0, 0], [1, -1], [1, math.nan]])
    def test_counts_errors(self, counts):
        with pytest.raises(ValueError, match="class_counts must be"):
            ClassFrequencyTemperature(counts)

    def test_direction_error(self):
        with pytest.raises(ValueError, match="'rare_high' or 'rare_low', got 'up'"):
            ClassFrequencyTemperature([1, 2], direction="up")  # pyright: ignore[reportArgumentType]


class TestCorrectWrong:
    def test_formula(self, check, batch):
        def formula(student, teacher, targets):
            t_t = torch.full((4, 5), 1.5, dtype=torch.float64)
            for i, y in enumerate([0, 4, 1, 2]):
                t_t[i, y] = 5.0
            one = torch.ones(1, dtype=torch.float64)
            return one, t_t, one

        check(CorrectWrongTemperature(correct=5.0, wrong=1.5), batch, formula, loss_sees=centred)

    def test_the_loss_is_the_published_one_where_the_mean_is_zero(self):
        """Soft cross-entropy with the teacher's label scaled apart, minus the teacher's entropy; no T²."""
        student, teacher = torch.tensor([[2.0, -1.0, -1.0]]), torch.tensor([[4.0, 1.0, -5.0]])
        targets = torch.tensor([0])
        policy = CorrectWrongTemperature(correct=4.0, wrong=2.0)
        p_t = (teacher / torch.tensor([[4.0, 2.0, 2.0]])).softmax(-1)
        expected = -(p_t * student.log_softmax(-1)).sum() + (p_t * p_t.log()).sum()
        loss = kd_loss(policy.transform(student), policy.transform(teacher), policy(Signals(student, teacher, targets)))
        torch.testing.assert_close(loss, expected)

    def test_tokens_with_some_left_out(self, tokens):
        t = CorrectWrongTemperature()(tokens.signals()).teacher
        assert t.shape == (2, 7, 11)
        assert ((t == 4.0).sum(-1)[tokens.targets != -100] == 1).all()

    def test_needs_labels(self, batch):
        with pytest.raises(ValueError, match="CorrectWrongTemperature reads the label"):
            CorrectWrongTemperature()(batch.signals(targets=None))
