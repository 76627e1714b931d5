# pyright: reportArgumentType=false
from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_lightning.temperature import (
    ConstantSchedule,
    CosineSchedule,
    CyclicSchedule,
    ExponentialSchedule,
    JoinedSchedule,
    LinearSchedule,
    Progress,
    StepSchedule,
)

values = st.floats(0.0, 1e3)
positive = st.floats(0.01, 1e3)


class TestProgress:
    @pytest.mark.parametrize(
        ("progress", "fraction"),
        [
            (Progress(step=5, max_steps=20, epoch=9, max_epochs=10), 0.25),
            (Progress(epoch=3, max_epochs=4), 0.75),
            (Progress(step=50, max_steps=20), 1.0),
            (Progress(step=0, max_steps=0), 0.0),
        ],
    )
    def test_fraction(self, progress, fraction):
        assert progress.fraction == fraction

    def test_no_end(self):
        with pytest.raises(ValueError, match="neither max_steps nor max_epochs"):
            _ = Progress(step=3).fraction

    @given(step=st.integers(0, 100), begin=st.integers(0, 5), length=st.integers(1, 5))
    def test_segment(self, step, begin, length):
        whole = Progress(step=step, max_steps=100, epoch=step // 10, max_epochs=10)
        part = whole.segment(begin, begin + length, "epoch")
        assert part == Progress(max(step - 10 * begin, 0), 10 * length, max(step // 10 - begin, 0), length)

    def test_segment_to_the_end_and_by_steps(self):
        whole = Progress(step=60, max_steps=100, epoch=6, max_epochs=10)
        assert whole.segment(50, None, "step") == Progress(10, 50, 1, 5)
        assert Progress(step=60).segment(50, 80, "step") == Progress(10, 30, 0, None)


class TestEquations:
    """Against the equations, written out."""

    @given(a=values, b=values, until=st.floats(0.01, 1.0), step=st.integers(0, 300))
    def test_linear_and_cosine(self, a, b, until, step):
        f = min(step / 200 / until, 1.0)
        progress = Progress(step=step, max_steps=200)
        if step <= 200:
            linear, cosine = LinearSchedule(a, b, until)(progress), CosineSchedule(a, b, until)(progress)
            assert linear == pytest.approx((1 - f) * a + f * b, abs=1e-9)
            assert cosine == pytest.approx(b + (a - b) * math.cos(math.pi * f / 2) ** 2, abs=1e-9)

    @given(a=positive, factor=st.floats(0.05, 0.99), end=positive, n=st.integers(0, 2000))
    def test_exponential(self, a, factor, end, n):
        floor = min(a, end)
        value = ExponentialSchedule(a, factor, floor)(Progress(epoch=n))
        assert value == pytest.approx(max(a * factor**n, floor), rel=1e-9)

    def test_exponential_rise_does_not_overflow(self):
        assert ExponentialSchedule(1.0, 10.0, 8.0)(Progress(epoch=100_000)) == 8.0
        assert ExponentialSchedule(3.0, 1.0, 3.0)(Progress(epoch=7)) == 3.0

    @given(n=st.integers(0, 50))
    def test_step(self, n):
        value = StepSchedule(8.0, (10, 20, 40), 0.5, "step")(Progress(step=n))
        assert value == 8.0 * 0.5 ** len([m for m in (10, 20, 40) if m <= n])

    @given(a=values, b=values, period=st.integers(1, 40), n=st.integers(0, 200))
    def test_cyclic(self, a, b, period, n):
        cosine = CyclicSchedule(a, b, period)(Progress(epoch=n))
        assert cosine == pytest.approx((a + b) / 2 + (a - b) / 2 * math.cos(2 * math.pi * n / period), abs=1e-6)
        triangle = CyclicSchedule(a, b, period, "triangle")(Progress(epoch=n))
        distance = min(n % period, period - n % period) / (period / 2)
        assert triangle == pytest.approx(a + (b - a) * distance, abs=1e-6)


class TestJoined:
    schedule = JoinedSchedule([LinearSchedule(1.0, 8.0), ConstantSchedule(8.0), CosineSchedule(8.0, 2.0)], [4, 6])

    @pytest.mark.parametrize(
        ("epoch", "value"),
        [(0, 1.0), (2, 4.5), (3, 6.25), (4, 8.0), (5, 8.0), (6, 8.0), (8, 5.0), (10, 2.0), (99, 2.0)],
    )
    def test_segments(self, epoch, value):
        assert self.schedule(Progress(epoch=epoch, max_epochs=10)) == pytest.approx(value)

    def test_segments_in_epochs_with_known_steps_move_within_an_epoch(self):
        progress = Progress(step=25, max_steps=100, epoch=2, max_epochs=10)
        assert self.schedule(progress) == pytest.approx(1.0 + 7.0 * 25 / 40)

    def test_by_steps(self):
        schedule = JoinedSchedule([ConstantSchedule(1.0), LinearSchedule(2.0, 4.0)], [50], unit="step")
        assert [schedule(Progress(step=s, max_steps=100)) for s in (49, 50, 75, 100)] == [1.0, 2.0, 3.0, 4.0]

    def test_the_last_part_needs_an_end(self):
        assert self.schedule(Progress(epoch=2)) == 4.5
        with pytest.raises(ValueError, match="neither max_steps nor max_epochs"):
            self.schedule(Progress(epoch=7))

    def test_nested(self):
        outer = JoinedSchedule([ConstantSchedule(9.0), self.schedule], [10])
        assert outer(Progress(epoch=12, max_epochs=20)) == self.schedule(Progress(epoch=2, max_epochs=10))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ConstantSchedule(-1.0), "value must be a finite number, not negative, got -1.0"),
        (lambda: ConstantSchedule(True), "value must be a finite number"),
        (lambda: ConstantSchedule("4"), "value must be a finite number"),
        (lambda: LinearSchedule(math.nan, 1.0), "init_value must be a finite number"),
        (lambda: LinearSchedule(1.0, 2.0, until=0.0), r"until must be a share of the run in \(0, 1\]"),
        (lambda: CosineSchedule(1.0, math.inf), "end_value must be a finite number"),
        (lambda: CosineSchedule(1.0, 2.0, until=1.5), "until must be a share"),
        (lambda: ExponentialSchedule(0.0), "init_value must be a finite number, positive"),
        (lambda: ExponentialSchedule(1.0, 0.5, 2.0), "moves away from end_value=2"),
        (lambda: ExponentialSchedule(3.0, 1.5, 2.0), "moves away"),
        (lambda: ExponentialSchedule(3.0, unit="day"), "unit must be 'epoch' or 'step', got 'day'"),
        (lambda: StepSchedule(8.0, (20, 10)), "milestones must be positive and strictly rising"),
        (lambda: StepSchedule(8.0, (0,)), "milestones must be positive"),
        (lambda: StepSchedule(8.0, (1,), factor=0.0), "factor must be a finite number, positive"),
        (lambda: CyclicSchedule(1.0, 2.0, 0), "period must be a finite number, positive"),
        (lambda: CyclicSchedule(1.0, 2.0, 4, "square"), "shape must be 'cosine' or 'triangle'"),
        (lambda: JoinedSchedule([ConstantSchedule(1.0)], [3]), "got 1 schedules and 1 boundaries"),
        (lambda: JoinedSchedule([ConstantSchedule(1.0)] * 3, [3, 3]), "boundaries must be positive and strictly"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
