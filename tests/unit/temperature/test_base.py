from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from kd_lightning.functional import kd_loss
from kd_lightning.temperature import (
    ClassFrequencyTemperature,
    ConstantTemperature,
    CosineSchedule,
    DisagreementTemperature,
    JoinedTemperature,
    LearnableTemperature,
    LinearSchedule,
    LogitStdTemperature,
    MultiTemperature,
    Progress,
    ScheduledTemperature,
    Signals,
    Temperature,
    TemperaturePolicy,
    as_policy,
)


class Given(TemperaturePolicy):
    """Returns what it was given."""

    def __init__(self, *fields, **bounds):
        super().__init__(**bounds)
        self.fields = fields

    def compute(self, signals):
        return Temperature(*self.fields)


def scaled(progress: Progress, factor: float) -> float:
    return factor * progress.fraction


def signals(dtype=torch.float32, **others):
    return Signals(torch.randn(4, 3, dtype=dtype), torch.randn(4, 3, dtype=dtype), **others)


class TestSignals:
    def test_valid(self):
        targets = torch.tensor([0, -100, 2, 1])
        for valid in (signals(targets=targets).valid, signals(targets=targets.abs(), ignore_index=100).valid):
            assert valid is not None
            assert valid.tolist() == [True, False, True, True]
        assert signals(targets=targets, ignore_index=None).valid is None

    @pytest.mark.parametrize("targets", [None, torch.rand(4, 3), torch.rand(4), torch.zeros(4, 3, dtype=torch.long)])
    def test_no_class_targets(self, targets):
        assert signals(targets=targets).class_targets is None
        assert signals(targets=targets).valid is None

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_full(self, dtype):
        value = signals(dtype).full(1.1)
        assert value.shape == (1,)
        assert value.dtype == dtype
        assert value.item() == pytest.approx(1.1, rel=1e-6)

    def test_replace(self):
        before = signals()
        after = before.replace(progress=Progress(step=3))
        assert after.progress.step == 3
        assert after.student_logits is before.student_logits


class TestBounds:
    def test_clamped(self):
        t = torch.tensor([[0.001], [0.5], [3.0], [1e6]])
        out = Given(t, t, min_temperature=0.2, max_temperature=9.0)(signals())
        assert out.student.flatten().tolist() == pytest.approx([0.2, 0.5, 3.0, 9.0])
        assert out.teacher is out.student

    @pytest.mark.parametrize("bounds", [(0.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan, 1.0)])
    def test_errors(self, bounds):
        with pytest.raises(ValueError, match="0 < min_temperature <= max_temperature < inf"):
            Given(torch.ones(1), torch.ones(1), min_temperature=bounds[0], max_temperature=bounds[1])

    def test_multiplier_before_bounds(self):
        policy = Given(torch.ones(1), torch.ones(1), max_temperature=4.0)
        policy.multiplier.fill_(8.0)
        assert policy(signals()).student.item() == 4.0

    def test_a_scale_is_in_units_of_t_squared(self):
        policy = Given(torch.ones(1), torch.ones(1), torch.full((1,), 3.0))
        policy.multiplier.fill_(2.0)
        assert policy(signals()).scale.item() == 12.0


class TestShapes:
    @pytest.mark.parametrize("shape", [(), (1,), (4, 1), (1, 3), (4, 3), (1, 1)])
    def test_accepted(self, shape):
        t = torch.full(shape, 2.0)
        assert Given(t, t)(signals()).student.shape == (t.shape or (1,))

    @pytest.mark.parametrize("shape", [(4,), (3,), (3, 4), (2, 1), (1, 4, 1)])
    def test_refused(self, shape):
        t = torch.full(shape, 2.0)
        with pytest.raises(ValueError, match=r"which does not fit logits of shape \(4, 3\)"):
            Given(t, t)(signals())

    def test_a_number_will_do(self):
        assert Given(2.0, 3.0)(signals()).teacher.item() == 3.0

    @pytest.mark.parametrize(
        "returned", [4.0, torch.ones(1), None, "hot", [], [2.0], (torch.ones(1), torch.ones(1)), [None]]
    )
    def test_types_refused(self, returned):
        class Wrong(TemperaturePolicy):
            def compute(self, signals):
                return returned

        with pytest.raises(TypeError, match=r"Wrong.compute must return a Temperature of two tensors, or a sequence"):
            Wrong()(signals())
        with pytest.raises(TypeError, match=r"Given.compute must return a Temperature of two tensors, or a sequence"):
            Given(None, None)(signals())

    @pytest.mark.parametrize("value", [torch.full((4, 1), -1.0), torch.tensor([[1.0], [2.0], [-0.1], [1.0]]), -1.0])
    def test_negative(self, value):
        """A bound would have made it 0.05."""
        with pytest.raises(
            ValueError, match=r"Given.compute returned a negative temperature. Temperatures are positive"
        ):
            Given(value, value)(signals())
        with pytest.raises(ValueError, match=r"Given.compute returned a negative temperature"):
            Given(torch.ones(1), value)(signals())

    def test_a_message_names_the_class(self):
        with pytest.raises(ValueError, match=r"^Given: student temperature has shape \(4,\)"):
            Given(torch.ones(4), torch.ones(4))(signals())

    @pytest.mark.parametrize("value", [-1.0, 0.0, math.nan, math.inf])
    def test_a_multiplier_that_cannot_be(self, value):
        state = ConstantTemperature(2.0).state_dict()
        state["multiplier"] = torch.tensor([value])
        with pytest.raises(ValueError, match=r"the multiplier of ConstantTemperature must be positive and finite, but"):
            ConstantTemperature(3.0).load_state_dict(state)

    def test_nan(self):
        t = torch.full((4, 1), math.nan)
        with pytest.raises(ValueError, match="student temperature must be positive and finite"):
            Given(t, t)(signals())

    def test_negative_scale(self):
        with pytest.raises(ValueError, match="scale must be finite and not negative"):
            Given(torch.ones(1), torch.ones(1), -torch.ones(1))(signals())


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_logits_are_computed_in_float32(self, dtype):
        class Seen(TemperaturePolicy):
            def compute(self, signals):
                assert signals.student_logits.dtype == signals.teacher_logits.dtype == torch.float32
                return Temperature(torch.ones(1), torch.ones(1))

        batch = signals(dtype)
        t = Seen()(batch)
        assert t.student.dtype == torch.float32
        assert kd_loss(batch.student_logits, batch.teacher_logits, t).dtype == torch.float32

    def test_mixed_halves(self):
        batch = Signals(torch.randn(4, 3, dtype=torch.bfloat16), torch.randn(4, 3))
        assert ConstantTemperature(2.0)(batch).student.item() == 2.0

    @pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, nn.Module.double])
    def test_state_stays_float32(self, cast):
        class Learned(TemperaturePolicy):
            def __init__(self):
                super().__init__()
                self.raw = nn.Parameter(torch.full((1,), 1.2345678))
                self.inner = ConstantTemperature(2.0)

            def compute(self, signals):
                return Temperature(self.raw, self.raw)

        student, policy = nn.Linear(2, 2), Learned()
        cast(nn.Sequential(student, policy))
        assert student.weight.dtype != torch.float32
        assert {tensor.dtype for tensor in policy.state_dict().values()} == {torch.float32}
        assert policy.raw.item() == pytest.approx(1.2345678, rel=1e-7)

    def test_a_slow_moving_average_moves_in_bfloat16(self):
        policy = ConstantTemperature(2.0).bfloat16()
        for _ in range(40):
            policy.multiplier.mul_(0.999)
        assert policy.multiplier.item() == pytest.approx(0.999**40, rel=1e-5)

    def test_state_is_not_zero_dimensional(self):
        """FSDP refuses 0-d parameters and buffers."""
        assert ConstantTemperature(2.0).multiplier.shape == (1,)


class TestAsPolicy:
    def test_each_kind(self):
        policy = ConstantTemperature(3.0)
        assert as_policy(policy) is policy
        assert isinstance(as_policy(4), ConstantTemperature)
        assert isinstance(as_policy(CosineSchedule(8.0, 1.0)), ScheduledTemperature)
        assert isinstance(as_policy(lambda progress: 2.0), ScheduledTemperature)
        assert isinstance(as_policy(partial(scaled, factor=2.0)), ScheduledTemperature)

    @pytest.mark.parametrize("wrong", [True, None, "4", nn.Linear(1, 1), ConstantTemperature, torch.ones(1)])
    def test_errors(self, wrong):
        with pytest.raises(TypeError, match="temperature must be a number, a schedule"):
            as_policy(wrong)


class TestScheduled:
    def test_constant_errors(self):
        for value in (0.0, -1.0, math.nan, math.inf, 200.0):
            with pytest.raises(ValueError, match="temperature must be a positive, finite number within"):
                ConstantTemperature(value)

    def test_follows_the_schedule_and_its_floor(self):
        policy = ScheduledTemperature(LinearSchedule(8.0, 0.0 + 1e-9), min_temperature=1.0)
        values = [policy(signals(progress=Progress(step=s, max_steps=8))).student.item() for s in (0, 4, 8)]
        assert values == pytest.approx([8.0, 4.0, 1.0])

    @pytest.mark.parametrize("value", [0.0, -2.0, math.nan, math.inf])
    def test_schedule_value_errors(self, value):
        with pytest.raises(ValueError, match="must give positive, finite values"):
            ScheduledTemperature(lambda progress: value)(signals())

    @pytest.mark.parametrize("value", [None, "4", torch.tensor(4.0)])
    def test_schedule_type_errors(self, value):
        with pytest.raises(TypeError, match=r"a schedule must return a number, but .* returned "):
            ScheduledTemperature(lambda progress: value)(signals())

    def test_not_callable(self):
        with pytest.raises(TypeError, match="schedule must be a function"):
            ScheduledTemperature(4.0)  # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError, match="schedule must be a function"):
            ScheduledTemperature(CosineSchedule)  # pyright: ignore[reportArgumentType]


def test_extra_repr_shows_bounds_that_are_not_the_defaults():
    assert repr(ConstantTemperature(2.0, max_temperature=8.0)) == "ConstantTemperature(value=2, max_temperature=8)"


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (
            ScheduledTemperature(CosineSchedule(8.0, 2.0)),
            "schedule=CosineSchedule(init_value=8.0, end_value=2.0, until=1.0)",
        ),
        (
            LearnableTemperature(4.0),
            "init_value=4, min_value=1, max_value=21, adversarial=True, warmup_epochs=10, lr=None",
        ),
        (DisagreementTemperature(), "beta=2, gamma=1, base=4, by='cosine', center=True"),
        (JoinedTemperature([1.0, 4.0], [5], min_temperature=1.0), "boundaries=(5,), unit='epoch', min_temperature=1"),
        (ClassFrequencyTemperature([1, 2]), "class_counts=[1, 2], min_value=2, max_value=6, direction='rare_high'"),
        (MultiTemperature([1.0]), ""),
    ],
)
def test_extra_repr_is_the_text_that_checkpoints_hold(policy, text):
    assert policy.extra_repr() == text


def test_a_misspelt_bound_is_an_error():
    with pytest.raises(TypeError, match="max_temprature"):
        LogitStdTemperature(max_temprature=50.0)  # pyright: ignore[reportCallIssue]
