"""fused_linear_kd_loss is kd_loss of the two linear layers, plus the cross-entropy."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor
from torch.testing import assert_close

from kd_lightning.functional import Temperature, fused_linear_kd_loss
from kd_lightning.functional.divergences import (
    BernoulliKL,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SoftCrossEntropy,
    SquaredError,
    TotalVariation,
)
from kd_lightning.functional.mixed_divergences import AlphaBeta, EntropyGatedKL, SkewKL, SymmetricKL, ToDi
from kd_lightning.functional.row_loss import row_loss
from kd_lightning.losses import FusedLinearKDLoss, LogitLoss

DIVERGENCES: list[Divergence] = [
    ReverseKL(), JensenShannon(0.3), TotalVariation(), SoftCrossEntropy(), SquaredError(), BernoulliKL(), ToDi(),
    SymmetricKL(0.3), EntropyGatedKL(1.5), SkewKL(0.2), SkewKL(0.2, reverse=True), AlphaBeta(0.8, 0.3),
]  # fmt: skip


def setting(*positions: int, dtype: torch.dtype = torch.float64, classes: int = 11, width: int = 6) -> Any:
    student = torch.randn(*positions, width, dtype=torch.float64), torch.randn(classes, width, dtype=torch.float64)
    teacher = torch.randn(*positions, 4, dtype=torch.float64), torch.randn(classes, 4, dtype=torch.float64)
    inputs = [x.to(dtype) for x in (*student, *teacher)]
    return inputs[0].requires_grad_(), inputs[1].requires_grad_(), inputs[2], inputs[3]


def composed(
    h: Tensor, w: Tensor, ht: Tensor, wt: Tensor, temperature: Any, bias: Any = None, **options: Any
) -> Tensor:
    """The plain way."""
    divergence = options.pop("divergence", ForwardKL())
    task_weight, kd_weight = options.pop("task_weight", 0.0), options.pop("kd_weight", 1.0)
    s, t = F.linear(h, w, bias), F.linear(ht, wt)[..., : len(w)]
    loss = kd_weight * row_loss(divergence, s, t, temperature, **options)
    if task_weight:
        targets, mean = options["targets"], options.get("reduction", "mean") == "mean"
        total = F.cross_entropy(s.flatten(0, -2), targets.flatten(), reduction="sum")
        loss = loss + task_weight * (total / (targets != -100).sum().clamp(min=1) if mean else total)
    return loss


@settings(deadline=None, max_examples=60)
@given(
    positions=st.sampled_from([(7,), (2, 5)]),
    chunk_size=st.sampled_from([1, 3, 100]),
    kind=st.sampled_from(["number", "learnt", "per position", "per class"]),
    masked=st.sampled_from([0.0, 0.4, 1.0]),
    task_weight=st.sampled_from([0.0, 0.3]),
    reduction=st.sampled_from(["mean", "sum"]),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_is_the_composition(positions, chunk_size, kind, masked, task_weight, reduction, with_bias, seed):
    torch.manual_seed(seed)
    h, w, ht, wt = setting(*positions)
    targets = torch.randint(11, positions)
    targets[torch.rand(positions) < masked] = -100
    wanted = [h, w]
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True) if with_bias else None
    if bias is not None:
        wanted.append(bias)
    temperature: Any = 2.5
    if kind != "number":
        shape = {"learnt": (1,), "per position": (*positions, 1), "per class": (1,) * len(positions) + (11,)}[kind]
        temperature = Temperature(*(torch.rand(shape, dtype=torch.float64) * 3 + 0.5 for _ in range(2)))
        if kind != "per class":
            wanted += [x.requires_grad_() for x in temperature[:2]]
    options: Any = {
        "targets": targets, "reduction": reduction, "task_weight": task_weight, "kd_weight": 0.7
    }  # fmt: skip

    expected = composed(h, w, ht, wt, temperature, bias, **options)
    expected = (expected.detach(), *torch.autograd.grad(expected, wanted))
    loss = fused_linear_kd_loss(h, w, ht, wt, temperature, student_bias=bias, chunk_size=chunk_size, **options)
    got = (loss.detach(), *torch.autograd.grad(loss, wanted, retain_graph=True))
    assert_close(got, expected, rtol=1e-10, atol=1e-11)
    again = (loss.detach(), *torch.autograd.grad(loss, wanted))
    assert_close(again, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_every_divergence_without_labels(divergence):
    h, w, ht, wt = setting(2, 5)
    targets = torch.randint(11, (2, 5))
    targets[0, 1:3] = -100
    temperature = Temperature(*(torch.tensor([t], dtype=torch.float64, requires_grad=True) for t in (2.5, 1.5)))
    options: Any = {"targets": targets, "task_weight": 0.3, "kd_weight": 0.7, "divergence": divergence}
    wanted = [h, w, *temperature[:2]]
    expected = composed(h, w, ht, wt, temperature, **options)
    expected = (expected.detach(), *torch.autograd.grad(expected, wanted))
    loss = fused_linear_kd_loss(h, w, ht, wt, temperature, chunk_size=3, **options)
    for again in (True, False):  # the second backward is the definition's
        got = (loss.detach(), *torch.autograd.grad(loss, wanted, retain_graph=again))
        assert_close(got, expected, rtol=1e-10, atol=1e-11)


def test_the_module_takes_the_divergence_from_logits_too():
    s, t = (torch.randn(2, 5, 7) for _ in range(2))
    module = FusedLinearKDLoss(divergence=JensenShannon(0.3), scale="none")
    assert repr(module).startswith("FusedLinearKDLoss(chunk_size=256, divergence=JensenShannon(beta=0.3), scale='none'")
    assert_close(module(s, t, 2.0), row_loss(JensenShannon(0.3), s, t, 2.0, scale="none"), rtol=0, atol=0)


def test_divergence_from_yaml():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--kd_loss", type=LogitLoss)
    skew = {"class_path": "kd_lightning.functional.mixed_divergences.SkewKL", "init_args": {"reverse": True}}
    given = {"class_path": "kd_lightning.losses.FusedLinearKDLoss", "init_args": {"divergence": skew}}
    built = parser.instantiate(parser.parse_object({"kd_loss": given})).kd_loss
    assert built.divergence == SkewKL(0.1, reverse=True)
    skew["init_args"] = {"skew": 2.0}
    with pytest.raises((ArgumentError, ValueError), match=r"skew must lie between 0 and 1, got 2\.0"):
        parser.instantiate(parser.parse_object({"kd_loss": given}))


def test_teacher_logits_in_place_of_its_head():
    h, w, ht, wt = setting(7)
    before = (logits := F.linear(ht, wt)).clone()
    loss = fused_linear_kd_loss(h, w, None, None, 2.0, teacher_logits=logits, chunk_size=3)
    assert_close(loss, composed(h, w, ht, wt, 2.0))
    assert_close(logits, before, rtol=0, atol=0)


def test_padded_vocabulary_of_the_teacher():
    h, w, ht, wt = setting(7)
    assert_close(fused_linear_kd_loss(h, w[:9], ht, wt, 2.0), composed(h, w[:9], ht, wt, 2.0))


def test_num_items():
    h, w, ht, wt = setting(7)
    assert_close(fused_linear_kd_loss(h, w, ht, wt, 2.0, num_items=14), composed(h, w, ht, wt, 2.0) / 2)


def test_derivatives():
    h, w, ht, wt = setting(3, classes=4, width=2)
    temperature = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, -100, 3])

    def loss(h: Tensor, w: Tensor, temperature: Tensor) -> Tensor:
        return fused_linear_kd_loss(h, w, ht, wt[:4], temperature, targets=labels, task_weight=0.5, chunk_size=2)

    assert torch.autograd.gradcheck(loss, (h, w, temperature), nondet_tol=1e-12)
    assert torch.autograd.gradgradcheck(loss, (h, w, temperature), nondet_tol=1e-12)
    (expected,) = torch.autograd.grad(loss(h, w, temperature), h)
    assert_close(torch.func.grad(loss)(h, w, temperature), expected)


def test_without_rows():
    h, w, ht, wt = setting(0)
    loss = fused_linear_kd_loss(h, w, ht, wt, 2.0)
    gradients = torch.autograd.grad(loss, (h, w))
    assert loss == 0
    assert gradients[1].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    h, w, ht, wt = setting(32, dtype=dtype, classes=50, width=16)
    got = torch.autograd.grad(fused_linear_kd_loss(h, w, ht, wt, 4.0, chunk_size=8) * 64, (h, w))
    wide = [x.detach().double().requires_grad_() for x in (h, w)]
    # the logits are rounded once, as a linear layer in this dtype rounds them
    expected = torch.autograd.grad(composed(wide[0], wide[1], ht.double(), wt.double(), 4.0) * 64, wide)
    for mine, exact in zip(got, expected, strict=True):
        assert mine.dtype == dtype
        assert (mine - exact).norm() <= (2e-2 if dtype == torch.bfloat16 else 3e-3) * exact.norm()


def test_under_autocast():
    h, w, ht, wt = setting(32, dtype=torch.float32, classes=50, width=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused_linear_kd_loss(h, w, ht, wt, 4.0)
        expected = composed(h, w, ht, wt, 4.0)
    assert_close(loss, expected, rtol=1e-2, atol=1e-3)
    for mine, theirs in zip(torch.autograd.grad(loss, (h, w)), torch.autograd.grad(expected, (h, w)), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() <= 2e-2 * theirs.norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("divergence", "chunks"), [(ForwardKL(), 5), *((divergence, 9) for divergence in DIVERGENCES)], ids=repr
)
def test_memory_grows_with_the_chunk_not_with_the_rows(divergence, chunks):
    def peak(rows: int, chunk_size: int) -> int:
        h, w, ht, wt = setting(rows, dtype=torch.float32, classes=5000, width=8)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            fused_linear_kd_loss(h, w, ht, wt, 2.0, chunk_size=chunk_size, divergence=divergence).backward()
        recorded: Any = profiler.profiler
        changes = [event.nbytes() for event in recorded.kineto_results.events() if event.name() == "[memory]"]
        return max(itertools.accumulate(changes))

    logits = 4 * 5000
    assert peak(512, 32) <= 1.1 * peak(128, 32)
    assert peak(512, 32) <= chunks * 32 * logits + 1.3 * 5000 * 8 * 4
    assert peak(512, 128) >= 2 * peak(512, 32)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", [ForwardKL(), JensenShannon(0.3), AlphaBeta(0.8, 0.3)], ids=repr)
def test_compiles_without_graph_break(divergence):
    h, w, ht, wt = setting(7, dtype=torch.float32)
    compiled: Any = torch.compile(fused_linear_kd_loss, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(h, w, ht, wt, torch.tensor(2.0), chunk_size=3, divergence=divergence), (h, w))
    expected = composed(h, w, ht, wt, 2.0, divergence=divergence)
    assert_close(got, torch.autograd.grad(expected, (h, w)), rtol=1e-4, atol=1e-6)


def test_errors():
    h, w, ht, wt = setting(7)
    with pytest.raises(ValueError, match="do not fit together"):
        fused_linear_kd_loss(h, w.t(), ht, wt, 2.0)
    with pytest.raises(ValueError, match="or as teacher_logits"):
        fused_linear_kd_loss(h, w, None, None, 2.0)
    with pytest.raises(ValueError, match="or as teacher_logits"):
        fused_linear_kd_loss(h, w, ht, wt, 2.0, teacher_logits=torch.zeros(7, 11))
    with pytest.raises(ValueError, match=r"positions and 11 classes, got \(3,\)"):
        fused_linear_kd_loss(h, w, ht[:3], wt, 2.0)
    with pytest.raises(ValueError, match=r"11 classes, got .* and 9"):
        fused_linear_kd_loss(h, w, ht, wt[:9], 2.0)
    with pytest.raises(ValueError, match="the teacher is a constant"):
        fused_linear_kd_loss(h, w, ht.requires_grad_(), wt, 2.0)
    with pytest.raises(ValueError, match="needs targets"):
        fused_linear_kd_loss(h, w, ht.detach(), wt, 2.0, task_weight=0.5)
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        fused_linear_kd_loss(h, w, ht.detach(), wt, 2.0, chunk_size=0)
