"""The fast path: that it is taken, what it holds in memory, what it asks of the host; and the compiled form."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from kd_lightning.functional import Temperature, dkd_loss, kd_loss, row_loss, rows_fast
from kd_lightning.functional.rows_fast import _chunks


def peak_bytes(function: Any) -> int:
    """The most memory that was allocated at once while the function ran, over what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    recorded: Any = profiler.profiler
    changes = [event.nbytes() for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    class_dim=st.integers(0, 3),
    size=st.integers(1, 200),
)
def test_chunks_cover_every_row_once(shape, class_dim, size):
    class_dim %= len(shape)
    seen = torch.zeros(shape)
    with mock.patch.object(rows_fast, "CHUNK_CPU", size):
        for part in _chunks(seen, class_dim):
            seen[part] += 1
            assert seen[part].shape[class_dim] == shape[class_dim]
            assert seen[part].numel() <= max(2 * size, shape[class_dim])
    assert seen.eq(1).all()


class TestIsTaken:
    def test_by_what(self):
        s, t = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
        learnt, per_class = torch.ones(1, requires_grad=True), torch.ones(1, 5)
        with mock.patch.object(row_loss, "definition", side_effect=AssertionError("the fast path was not taken")):
            for temperature in (4.0, torch.tensor(4.0), torch.ones(3, 1), learnt, per_class):
                kd_loss(s, t, temperature).backward()
            kd_loss(s, t, Temperature(learnt, torch.ones(3, 1).requires_grad_())).backward()
            with torch.no_grad():
                kd_loss(s, t.requires_grad_(), per_class.requires_grad_())

    def test_not_by_what(self):
        s, t = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
        with mock.patch.object(row_loss, "closed_form", side_effect=AssertionError("the fast path was taken")):
            kd_loss(s, t, torch.ones(1, 5, requires_grad=True)).backward()
            kd_loss(s, t.clone().requires_grad_(), 4.0).backward()
            torch.func.grad(lambda x: kd_loss(x, t, 4.0))(s)


class TestOneChunk:
    """One chunk, constant temperatures, nothing left out: what training on a classification batch calls."""

    def test_is_the_sum_of_several(self):
        s, t = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.randn(6, 5, dtype=torch.float64)
        whole = dkd_loss(s, t, 3.0, targets=torch.arange(6) % 5)
        with mock.patch.object(rows_fast, "CHUNK_CPU", 5):
            in_parts = dkd_loss(s, t, 3.0, targets=torch.arange(6) % 5)
        assert_close(whole, in_parts, rtol=1e-14, atol=0)
        for factor in (1.0, 0.9, -2.0):
            of_whole, of_parts = (
                torch.autograd.grad(factor * loss, s, retain_graph=True)[0] for loss in (whole, in_parts)
            )
            assert_close(of_whole, of_parts, rtol=1e-12, atol=1e-15)

    def test_second_backward_and_second_derivative(self):
        s, t = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(3, 5, dtype=torch.float64)
        loss = 0.9 * kd_loss(s, t, 3.0)
        first = torch.autograd.grad(loss, s, retain_graph=True)
        assert_close(torch.autograd.grad(loss, s, retain_graph=True), first)
        assert_close(torch.autograd.grad(loss, s, create_graph=True), first)
        assert torch.autograd.gradgradcheck(lambda s: kd_loss(s, t, 3.0), s)

    def test_float16_gradient_does_not_underflow_before_the_scaler(self):
        s, t = torch.randn(2**14, 8).half().requires_grad_(), torch.randn(2**14, 8).half()
        (got,) = torch.autograd.grad(2.0**16 * kd_loss(s, t, 1.0), s)
        wide = s.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(2.0**16 * kd_loss(wide, t.double(), 1.0), wide)
        assert_close(got.double(), expected, rtol=2e-3, atol=1e-6)

    def test_targets_that_leave_nothing_out_are_no_mask(self):
        s, t = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            with_targets = kd_loss(s, t, 4.0, targets=torch.tensor([0, 1, 2]))
        assert not {event.key for event in profiler.key_averages()} & {"aten::where", "aten::masked_fill_"}
        assert torch.equal(with_targets, kd_loss(s, t, 4.0))

    def test_logits_changed_in_place_are_refused(self):
        """The second derivative would be that of other logits."""
        s, t = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
        loss = kd_loss(s, t, 4.0)
        t.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_gradient_of_a_learnt_temperature_survives_a_second_backward():
    """The factor T² depends on T too: the recomputation must not count that path twice."""
    s, t = (torch.randn(3, 5, dtype=torch.float64) for _ in range(2))
    raw = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    s.requires_grad_()
    loss = kd_loss(s, t, raw.exp())
    first = torch.autograd.grad(loss, (s, raw), retain_graph=True)
    assert_close(torch.autograd.grad(loss, (s, raw), retain_graph=True), first)
    assert_close(torch.autograd.grad(loss, (s, raw), create_graph=True), first)
    assert_close(torch.autograd.grad(3 * loss, (s, raw)), tuple(3 * g for g in first))


class TestConstantTemperature:
    """A constant of one element is computed with as a Python number: the same loss, in the same precision."""

    @pytest.mark.parametrize("targets", [None, torch.tensor([1, -100, 2])], ids=["all", "masked"])
    @pytest.mark.parametrize("num_items", [None, 7, torch.tensor([7])])
    @pytest.mark.parametrize("chunk", [2, 100])
    def test_is_the_loss_of_a_learnt_one(self, targets, num_items, chunk):
        s, t = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(3, 5, dtype=torch.float64)
        one = torch.tensor([2.5], dtype=torch.float64)
        with mock.patch.object(rows_fast, "CHUNK_CPU", chunk):
            expected, *others = (
                kd_loss(s, t, temperature, targets=targets, num_items=num_items)
                for temperature in (one.clone().requires_grad_(), one, one[0], 2.5, Temperature(one, one, one * one))
            )
            (gradient,) = torch.autograd.grad(expected, s)
            for loss in others:
                assert loss.dtype == torch.float64
                assert_close(loss, expected, rtol=1e-14, atol=0)
                assert_close(torch.autograd.grad(loss, s, create_graph=True)[0], gradient, rtol=1e-12, atol=1e-15)

    def test_runs_no_kernel_for_its_scalars(self):
        s, t = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
        for temperature in (4.0, torch.tensor([4.0])):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                kd_loss(s, t, temperature).backward()
            names = {event.key for event in profiler.key_averages()}
            assert not names & {"aten::full", "aten::where", "aten::masked_fill", "aten::aminmax", "aten::reshape"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_one_copy_of_the_logits(dtype):
    s, t = torch.randn(64, 2**16).to(dtype).requires_grad_(), torch.randn(64, 2**16).to(dtype)
    peak = peak_bytes(lambda: kd_loss(s, t, 4.0).backward())
    scratch = 6 * rows_fast.CHUNK_CPU * 4
    assert peak <= s.nbytes + scratch


def test_memory_without_gradient_is_the_scratch():
    s, t = torch.randn(64, 2**16), torch.randn(64, 2**16)
    assert peak_bytes(lambda: kd_loss(s, t, 4.0)) <= 6 * rows_fast.CHUNK_CPU * 4


@pytest.mark.parametrize("targets", [None, torch.zeros(6, dtype=torch.long, device="meta")], ids=["all", "masked"])
def test_waits_for_no_device(targets):
    """A meta tensor has no values: to look at one is an error, as it would be a wait on an accelerator."""
    s, t = torch.randn(6, 5, device="meta", requires_grad=True), torch.randn(6, 5, device="meta")
    for temperature in (4.0, torch.ones(1, device="meta", requires_grad=True), torch.ones(6, 1, device="meta")):
        with mock.patch.object(rows_fast, "CHUNK_ACCELERATOR", 10):
            loss = kd_loss(s, t, temperature, targets=targets)
            assert loss.shape == ()
            loss.backward()


@pytest.mark.slow
class TestCompiled:
    def test_without_graph_break(self):
        s, t = torch.randn(4, 50, requires_grad=True), torch.randn(4, 50)
        targets = torch.tensor([0, -100, 1, 2])
        temperature = torch.tensor(4.0, requires_grad=True)
        compiled: Any = torch.compile(kd_loss, backend="aot_eager", fullgraph=True)
        got = torch.autograd.grad(compiled(s, t, temperature, targets=targets), (s, temperature))
        expected = torch.autograd.grad(kd_loss(s, t, temperature, targets=targets), (s, temperature))
        assert_close(got, expected)

    def test_one_graph_for_every_value_of_a_temperature_tensor(self):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        compiled: Any = torch.compile(kd_loss, backend=counter)
        s, t = torch.randn(4, 50, requires_grad=True), torch.randn(4, 50)
        for value in range(1, 8):
            compiled(s, t, torch.tensor(float(value)))
        assert counter.frame_count == 1
        for value in range(1, 8):
            compiled(s, t, float(value))
        assert counter.frame_count <= 3

    def test_identical_logits_have_exactly_no_loss_and_no_gradient(self):
        s = torch.randn(4, 50, requires_grad=True)
        compiled: Any = torch.compile(kd_loss, backend="aot_eager", fullgraph=True)
        loss: torch.Tensor = compiled(s, s.detach().clone(), 4.0)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, s)[0].eq(0).all()
