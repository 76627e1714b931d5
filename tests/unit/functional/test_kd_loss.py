"""kd_loss: its value, its gradients and its edges."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any, get_args

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.testing import assert_close

from kd_lightning.functional import Temperature, kd_loss, tempered_log_softmax
from kd_lightning.functional.rows import Scale

INF = math.inf


def logits(*shape: int, dtype: torch.dtype = torch.float64, spread: float = 2.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * spread).to(dtype).requires_grad_()


def value_and_gradient(loss: Tensor, *inputs: Tensor) -> Any:
    return (loss.detach(), *torch.autograd.grad(loss, inputs))


@pytest.fixture(scope="session")
def batch(reference: dict[str, Any]) -> Any:
    student = torch.tensor(reference["student_logits"], dtype=torch.float64)
    return student, torch.tensor(reference["teacher_logits"], dtype=torch.float64)


class TestReferenceValues:
    @pytest.mark.parametrize("t", [1, 2, 4])
    def test_value(self, batch, reference, t):
        loss = kd_loss(batch[0], batch[1], float(t))
        assert loss.item() == pytest.approx(reference["values"][f"fkl_batchmean_T{t}_xT2"], rel=1e-12)
        unscaled = kd_loss(batch[0], batch[1], float(t), scale="none")
        assert unscaled.item() == pytest.approx(reference["values"][f"fkl_batchmean_T{t}"], rel=1e-12)

    def test_gradient(self, batch, reference):
        student = batch[0].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(kd_loss(student, batch[1], 4.0), student)
        expected = torch.tensor(reference["values"]["grad_fkl_T4_xT2"], dtype=torch.float64)
        assert_close(gradient, expected, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("t", [1, 2, 4])
    def test_value_and_gradient_by_decimal_arithmetic(self, batch, exact, t):
        def row_loss(s, z):
            return t**2 * exact.kl(exact.softmax(z, Decimal(t)), exact.softmax(s, Decimal(t)))

        student = batch[0].clone().requires_grad_()
        loss, gradient = value_and_gradient(kd_loss(student, batch[1], float(t)), student)
        rows = list(zip(batch[0].tolist(), batch[1].tolist(), strict=True))
        assert loss.item() == pytest.approx(sum(exact.value(row_loss, *row) for row in rows) / 4, rel=1e-12)
        expected = torch.tensor([exact.gradient(row_loss, *row) for row in rows], dtype=torch.float64) / 4
        assert_close(gradient, expected, rtol=1e-10, atol=1e-13)

    def test_ignored_position(self, batch, reference):
        loss = kd_loss(batch[0], batch[1], 1.0, targets=torch.tensor(reference["targets_with_ignored"]))
        assert loss.item() == pytest.approx(reference["values"]["fkl_masked_mean_T1"], rel=1e-12)

    def test_student_and_teacher_temperatures_differ(self, batch, reference):
        temperature = Temperature(torch.tensor(1.0), torch.tensor(4.0))
        loss = kd_loss(batch[0], batch[1], temperature, scale="none")
        assert loss.item() == pytest.approx(reference["values"]["ttm_l0.25"], rel=1e-12)

    def test_standardised_logits_are_a_temperature_per_sample(self, batch, reference):
        student, teacher = (z.std(-1, keepdim=True) + 1e-7 for z in batch)
        temperature = Temperature(2 * student, 2 * teacher, scale=torch.tensor(4.0))
        loss = kd_loss(batch[0], batch[1], temperature)
        assert loss.item() == pytest.approx(reference["values"]["logitstd_fkl_T2_xT2"], rel=1e-12)


class TestScale:
    @pytest.mark.parametrize(
        ("rule", "factor"), [("student_teacher", 6.0), ("student", 4.0), ("teacher", 9.0), ("none", 1.0)]
    )
    def test_rules(self, rule: Scale, factor):
        s, t = logits(4, 5), logits(4, 5)
        temperature = Temperature(torch.tensor(2.0), torch.tensor(3.0))
        plain = kd_loss(s, t, temperature, scale="none")
        assert_close(kd_loss(s, t, temperature, scale=rule), factor * plain)

    def test_every_rule_is_tested_above(self):
        assert set(get_args(Scale)) == {"student_teacher", "student", "teacher", "none"}

    @pytest.mark.parametrize("rule", get_args(Scale))
    def test_of_the_temperature_wins(self, rule: Scale):
        s, t = logits(4, 5), logits(4, 5)
        two, factor = torch.tensor(2.0), torch.rand(4, 1, dtype=torch.float64)
        rows = kd_loss(s, t, 2.0, scale="none", reduction="none")
        assert_close(kd_loss(s, t, Temperature(two, two, factor), scale=rule), (rows * factor[:, 0]).mean())

    def test_per_sample_goes_before_the_mean(self):
        """mean(T²·KL), not mean(T²)·mean(KL): the broadcast bug of published code."""
        s, t = logits(3, 5), logits(3, 5)
        per_sample = torch.tensor([[1.0], [2.0], [8.0]], dtype=torch.float64)
        rows = torch.stack([kd_loss(s[i], t[i], per_sample[i].item()) for i in range(3)])
        assert_close(kd_loss(s, t, per_sample, reduction="none"), rows)
        assert_close(kd_loss(s, t, per_sample), rows.mean())

    def test_class_wise_is_the_mean_over_classes(self):
        s, t = logits(3, 4), logits(3, 4)
        per_class = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
        plain = kd_loss(s, t, per_class, scale="none")
        assert_close(kd_loss(s, t, per_class), plain * (1 + 4 + 9 + 16) / 4)

    def test_mixed_layouts(self):
        s, t = logits(3, 4), logits(3, 4)
        per_class, per_sample = torch.rand(1, 4, dtype=torch.float64) + 1, torch.rand(3, 1, dtype=torch.float64) + 1
        mixed = Temperature(per_class, per_sample)
        full = Temperature(per_class.expand(3, 4), per_sample.expand(3, 4))
        assert_close(kd_loss(s, t, mixed), kd_loss(s, t, full))


class TestLayout:
    def test_class_dim(self):
        s, t = logits(2, 5, 3, 4), logits(2, 5, 3, 4)
        labels = torch.randint(5, (2, 3, 4))
        labels[0, :2] = 255
        temperature = torch.rand(2, 1, 3, 4, dtype=torch.float64) + 1
        got = value_and_gradient(
            kd_loss(s, t, temperature, targets=labels, class_dim=1, ignore_index=255), s
        )  # fmt: skip
        last = [x.movedim(1, -1) for x in (s, t, temperature)]
        expected = value_and_gradient(kd_loss(*last, targets=labels, class_dim=3, ignore_index=255), s)
        assert_close(got, expected)

    @pytest.mark.parametrize("class_dim", [0, 1, 2, -1, -2, -3])
    def test_every_class_dim(self, class_dim):
        s, t = logits(3, 4, 5), logits(3, 4, 5)
        expected = kd_loss(s.movedim(class_dim, -1), t.movedim(class_dim, -1), 2.0, reduction="none")
        assert_close(kd_loss(s, t, 2.0, class_dim=class_dim, reduction="none"), expected)

    def test_tokens_are_averaged_over_valid_tokens(self):
        s, t = logits(2, 3, 5), logits(2, 3, 5)
        labels = torch.tensor([[1, -100, -100], [2, 3, 4]])
        rows = kd_loss(s, t, 2.0, reduction="none")
        assert rows.shape == (2, 3)
        assert_close(kd_loss(s, t, 2.0, targets=labels), rows[labels != -100].mean())

    def test_token_wise_temperature(self):
        s, t = logits(2, 3, 5), logits(2, 3, 5)
        temperature = torch.rand(2, 3, 1, dtype=torch.float64) + 0.5
        flat = kd_loss(s.flatten(0, 1), t.flatten(0, 1), temperature.flatten(0, 1), reduction="none")
        assert_close(kd_loss(s, t, temperature, reduction="none").flatten(), flat)

    def test_one_sample_without_batch_dimension(self):
        s, t = logits(5), logits(5)
        assert_close(kd_loss(s, t, 2.0), kd_loss(s[None], t[None], 2.0))

    @pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
    def test_one_element_of_any_shape_is_a_number(self, shape):
        s, t = logits(4, 5), logits(4, 5)
        assert_close(kd_loss(s, t, torch.full(shape, 3.0)), kd_loss(s, t, 3.0))

    def test_no_rows(self):
        s, t = logits(0, 5), logits(0, 5)
        loss, gradient = value_and_gradient(kd_loss(s, t, torch.ones(0, 1)), s)
        assert loss == 0
        assert gradient.shape == (0, 5)


class TestReduction:
    def test_kinds(self):
        s, t = logits(4, 5), logits(4, 5)
        targets = torch.tensor([0, -100, 2, 3])
        rows = kd_loss(s, t, 3.0, targets=targets, reduction="none")
        assert rows[1] == 0
        assert_close(kd_loss(s, t, 3.0, targets=targets, reduction="sum"), rows.sum())
        assert_close(kd_loss(s, t, 3.0, targets=targets), rows.sum() / 3)

    def test_ignored_rows_may_hold_nan(self):
        s, t = logits(4, 5), logits(4, 5)
        targets = torch.tensor([0, -100, 2, -100])
        keep = targets >= 0
        with torch.no_grad():
            s[1], t[3] = math.nan, INF
        loss, gradient = value_and_gradient(kd_loss(s, t, 2.0, targets=targets), s)
        assert_close(loss, kd_loss(s[keep], t[keep], 2.0).detach())
        assert gradient[~keep].eq(0).all()
        assert gradient[keep].isfinite().all()

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_nothing_valid(self, reduction):
        s, t = logits(3, 5), logits(3, 5)
        targets = torch.full((3,), -100)
        loss, gradient = value_and_gradient(kd_loss(s, t, 2.0, targets=targets, reduction=reduction), s)
        assert loss == 0
        assert gradient.eq(0).all()

    def test_without_ignore_index_all_count(self):
        s, t = logits(3, 5), logits(3, 5)
        targets = torch.tensor([0, -100, 1])
        assert_close(kd_loss(s, t, 2.0, targets=targets, ignore_index=None), kd_loss(s, t, 2.0))

    def test_soft_targets_leave_nothing_out(self):
        s, t = logits(3, 5), logits(3, 5)
        assert_close(kd_loss(s, t, 2.0, targets=torch.rand(3, 5)), kd_loss(s, t, 2.0))


class TestGradient:
    @pytest.mark.parametrize("layout", [(1, 1), (4, 1), (1, 5), (4, 5)], ids=str)
    def test_by_finite_differences(self, layout):
        s, t = logits(4, 5), logits(4, 5)
        student = (torch.rand(layout, dtype=torch.float64) * 3 + 0.5).requires_grad_()
        teacher = (torch.rand(layout, dtype=torch.float64) * 3 + 0.5).requires_grad_()
        targets = torch.tensor([0, 1, -100, 3])

        def loss(s: Tensor, t: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
            return kd_loss(s, t, Temperature(student, teacher), targets=targets)

        assert torch.autograd.gradcheck(loss, (s, t, student, teacher))
        assert torch.autograd.gradgradcheck(loss, (s, t, student, teacher))

    def test_of_student_logits_is_the_difference_of_probabilities(self):
        s, t = logits(4, 5), logits(4, 5)
        (gradient,) = torch.autograd.grad(kd_loss(s, t, Temperature(torch.tensor(2.0), torch.tensor(3.0))), s)
        assert_close(gradient, 2 * 3 / 2 * (torch.softmax(s / 2, -1) - torch.softmax(t / 3, -1)) / 4)

    def test_of_the_temperature_by_decimal_arithmetic(self, exact):
        """T² is in the graph: d(T²·KL)/dT, not T²·dKL/dT."""
        s, t = logits(3, 5), logits(3, 5)
        temperature = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(kd_loss(s, t, temperature), temperature)
        rows = [[[Decimal(x) for x in row] for row in z.tolist()] for z in (s, t)]

        def loss(T: Decimal) -> Decimal:
            terms = (exact.kl(exact.softmax(b, T), exact.softmax(a, T)) for a, b in zip(*rows, strict=True))
            return T * T * sum(terms) / 3

        assert gradient.item() == pytest.approx(exact.derivative(loss, 2.5), rel=1e-10)

    def test_of_a_row_left_out_is_zero_for_its_temperature_too(self):
        s, t = logits(3, 5), logits(3, 5)
        with torch.no_grad():
            s[1] = math.nan
        temperature = torch.full((3, 1), 2.0, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(kd_loss(s, t, temperature, targets=torch.tensor([0, -100, 1])), temperature)
        assert gradient[1] == 0
        assert gradient.isfinite().all()

    def test_reaches_the_teacher_when_asked(self):
        s, t = logits(3, 5), logits(3, 5)
        (gradient,) = torch.autograd.grad(kd_loss(s, t, 2.0), t)
        assert gradient.abs().sum() > 0

    def test_twice_through_one_graph(self):
        s, t = logits(3, 5), logits(3, 5)
        loss = kd_loss(s, t, 2.0)
        (first,) = torch.autograd.grad(loss, s, retain_graph=True)
        (second,) = torch.autograd.grad(2 * loss, s, retain_graph=True)
        (third,) = torch.autograd.grad(loss, s)
        assert_close(second, 2 * first)
        assert_close(third, first)

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own forward-mode formulas
    def test_under_functional_transforms(self):
        s, t = logits(3, 5), logits(3, 5)
        (expected,) = torch.autograd.grad(kd_loss(s, t, 2.0), s)
        assert_close(torch.func.grad(lambda x: kd_loss(x, t, 2.0))(s), expected)
        rows = torch.func.vmap(lambda a, b: kd_loss(a, b, 2.0))(s, t)
        assert_close(rows, kd_loss(s, t, 2.0, reduction="none"))
        pushed = torch.func.jvp(lambda x: kd_loss(x, t.detach(), 2.0), (s,), (torch.ones_like(s) * s,))
        assert_close(pushed[1], (expected * s).sum())


class TestIdentities:
    @pytest.mark.parametrize("t", [0.05, 1.0, 4.0, 100.0])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_identical_logits_have_exactly_no_loss_and_no_gradient(self, dtype, t):
        s = logits(4, 50, dtype=dtype, spread=5.0)
        loss, gradient = value_and_gradient(kd_loss(s, s.detach().clone(), t), s)
        assert loss == 0
        assert gradient.eq(0).all()

    def test_hot_limit_is_the_centred_squared_difference(self):
        """T²·KL → mean over classes of ((s − s̄) − (t − t̄))² / 2."""
        s, t = logits(4, 10), logits(4, 10)
        difference = (s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))
        loss, gradient = value_and_gradient(kd_loss(s, t, 1e4), s)
        assert_close(loss, (difference.square().mean(-1) / 2).mean().detach(), rtol=1e-3, atol=0.0)
        assert_close(gradient, difference.detach() / 10 / 4, rtol=0.0, atol=1e-4)

    @settings(deadline=None, max_examples=40)
    @given(
        rows=st.integers(1, 5),
        classes=st.integers(2, 40),
        t=st.floats(0.05, 100.0),
        spread=st.sampled_from([0.01, 1.0, 30.0]),
        seed=st.integers(0, 2**16),
    )
    def test_shift_invariant_and_not_negative(self, rows, classes, t, spread, seed):
        generator = torch.Generator().manual_seed(seed)
        s, z = (torch.randn(2, rows, classes, generator=generator, dtype=torch.float64) * spread).unbind()
        loss = kd_loss(s, z, t)
        assert loss >= -1e-12 * t * t
        assert_close(kd_loss(s + 3, z - 7, t), loss, rtol=1e-8, atol=1e-10 * t * t)


class TestHardLogits:
    def test_classes_masked_on_both_sides_drop_out(self):
        s, t = logits(3, 8), logits(3, 8)
        temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        expected = value_and_gradient(kd_loss(s[:, :5], t[:, :5], temperature), s, temperature)
        padded = [z.detach().clone() for z in (s, t)]
        for z in padded:
            z[:, 5:] = -INF
        padded[0].requires_grad_()
        got = value_and_gradient(kd_loss(padded[0], padded[1], temperature), padded[0], temperature)
        assert_close(got, expected)

    def test_a_class_only_the_teacher_masks_is_a_zero_probability(self):
        s, t = logits(3, 5), logits(3, 5)
        with torch.no_grad():
            t[:, 0] = -INF
        loss, gradient = value_and_gradient(kd_loss(s, t, 2.0), s)
        assert loss.isfinite()
        assert_close(gradient, 2 * (torch.softmax(s / 2, -1) - torch.softmax(t / 2, -1)) / 3)

    def test_a_class_only_the_student_masks_is_an_infinite_divergence(self):
        s, t = logits(3, 5), logits(3, 5)
        with torch.no_grad():
            s[1, 0] = -INF
        assert kd_loss(s, t, 2.0) == INF

    @pytest.mark.parametrize("t", [0.05, 1.0, 100.0])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_huge_logits(self, dtype, t):
        s, z = logits(3, 5, dtype=dtype, spread=1e4), logits(3, 5, dtype=dtype, spread=1e4)
        loss, gradient = value_and_gradient(kd_loss(s, z, t), s)
        expected = value_and_gradient(kd_loss(wide := s.detach().double().requires_grad_(), z.double(), t), wide)
        assert_close((loss, gradient), tuple(x.to(dtype) for x in expected), rtol=1e-5, atol=1e-5)

    def test_equal_rows(self):
        s = torch.full((2, 5), 3.0, requires_grad=True)
        loss, gradient = value_and_gradient(kd_loss(s, torch.full((2, 5), -7.0), 2.0), s)
        assert_close((loss, gradient), (torch.tensor(0.0), torch.zeros(2, 5)), atol=5e-6, rtol=0)

    def test_two_classes(self):
        s, t = logits(3, 2), logits(3, 2)
        p, q = torch.sigmoid((t[:, 0] - t[:, 1]) / 2), torch.sigmoid((s[:, 0] - s[:, 1]) / 2)
        assert_close(kd_loss(s, t, 2.0), 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean())


class TestPrecision:
    @pytest.mark.parametrize("t", [0.5, 1.0, 4.0, 8.0, 20.0])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_inputs_are_computed_in_float32(self, dtype, t):
        s, z = logits(16, 1000, dtype=dtype), logits(16, 1000, dtype=dtype)
        loss, gradient = value_and_gradient(kd_loss(s, z, t), s)
        wide = s.detach().double().requires_grad_()
        expected = value_and_gradient(kd_loss(wide, z.detach().double(), t), wide)
        assert loss.dtype == torch.float32
        assert gradient.dtype == dtype
        assert_close(loss.double(), expected[0], rtol=1e-4, atol=0)
        rounding = (expected[1].to(dtype) - expected[1]).norm()  # what the dtype costs whoever computes
        assert (gradient - expected[1]).norm() <= max(2e-3 * expected[1].norm(), 1.01 * rounding)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_under_autocast(self, dtype):
        s, t = logits(4, 50, dtype=torch.float32), logits(4, 50, dtype=torch.float32)
        expected = value_and_gradient(kd_loss(s, t, 4.0), s)
        with torch.autocast("cpu", dtype=dtype):
            loss = kd_loss(s, t, 4.0)
        assert_close(value_and_gradient(loss, s), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_the_temperature_dtype_does_not_set_the_precision(self, dtype):
        s, t = logits(4, 50, dtype=torch.float32), logits(4, 50, dtype=torch.float32)
        temperature = torch.tensor([[1.25], [2.5], [3.25], [5.0]], dtype=dtype)
        loss = kd_loss(s, t, temperature)
        assert loss.dtype == torch.float32
        assert_close(loss, kd_loss(s, t, temperature.float()))

    def test_float64_stays(self):
        assert kd_loss(logits(2, 3), logits(2, 3), 2.0).dtype == torch.float64


class TestErrors:
    @pytest.mark.parametrize(
        ("student", "teacher", "message"),
        [
            ((2, 3), (3, 3), r"same shape, got \(2, 3\) and \(3, 3\)"),
            ((2, 3), (2, 3, 1), "same shape"),
            ((2, 1), (2, 1), "at least two classes"),
            ((), (), "class_dim=-1 is not a dimension"),
        ],
    )
    def test_logits(self, student, teacher, message):
        with pytest.raises(ValueError, match=message):
            kd_loss(torch.zeros(student), torch.zeros(teacher), 2.0)

    def test_student_with_more_classes(self):
        with pytest.raises(ValueError, match="class counts differ"):
            kd_loss(torch.zeros(2, 4), torch.zeros(2, 3), 2.0)

    def test_integer_logits(self):
        with pytest.raises(ValueError, match="floating point"):
            kd_loss(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long), 2.0)

    @pytest.mark.parametrize("value", [0.0, -1.0, INF, math.nan])
    def test_temperature_out_of_range(self, value):
        with pytest.raises(ValueError, match="positive"):
            kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), value)
        with pytest.raises(ValueError, match="positive"):
            kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor(value))
        with pytest.raises(ValueError, match="positive"):
            kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([[1.0], [value]]))

    @pytest.mark.parametrize("shape", [(2,), (3,), (3, 1), (1, 2), (2, 3, 1)])
    def test_temperature_shape(self, shape):
        with pytest.raises(ValueError, match=r"does not fit logits of shape \(2, 3\)"):
            kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(shape))

    @pytest.mark.parametrize("value", ["4", None, True, [4.0]])
    def test_temperature_type(self, value):
        with pytest.raises(TypeError, match="number, a tensor or a Temperature"):
            kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), value)

    def test_negative_scale(self):
        one = torch.tensor(1.0)
        with pytest.raises(ValueError, match="not negative"):
            kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), Temperature(one, one, -one))

    def test_targets_of_another_shape(self):
        with pytest.raises(ValueError, match=r"without the class dimension, \(2,\), got \(3,\)"):
            kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), 2.0, targets=torch.zeros(3, dtype=torch.long))

    def test_options(self):
        scale: Any = "T²"
        reduction: Any = "batchmean"
        with pytest.raises(ValueError, match="scale must be one of"):
            kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), 2.0, scale=scale)
        with pytest.raises(ValueError, match="reduction must be one of"):
            kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), 2.0, reduction=reduction)
        with pytest.raises(ValueError, match="class_dim=2"):
            kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), 2.0, class_dim=2)


def test_tempered_log_softmax_passes_no_nan_to_the_temperature():
    z = torch.tensor([[1.0, -INF, 0.0]], dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    log_p = tempered_log_softmax(z, temperature)
    gradients = torch.autograd.grad(log_p[:, [0, 2]].sum(), (z, temperature))
    assert all(gradient.isfinite().all() for gradient in gradients)
