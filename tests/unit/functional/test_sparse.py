"""Targets of a few classes: values and gradients by formulas on all classes, in extended precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.testing import assert_close

from kd_lightning import functional, losses
from kd_lightning.functional import Sparse, Temperature, kd_loss, row_loss, rows_fast
from kd_lightning.functional.sparse import Tail

Array = Any


# ---- independent formulas: one row at a time ----


def kl(p: Array, q: Array) -> Any:
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def jsd(p: Array, q: Array) -> Any:
    mixture = 0.3 * q + 0.7 * p
    return 0.3 * kl(q, mixture) + 0.7 * kl(p, mixture)


def cross_entropy(p: Array, q: Array) -> Any:
    return -sum(b * np.log(a) for a, b in zip(p, q, strict=True) if b > 0)


def alpha_beta(p: Array, q: Array, a: float = 0.4, b: float = 0.8) -> Any:
    return ((b * p ** (a + b) + a * q ** (a + b)) / (a + b) - q**a * p**b).sum() / (a * b)


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[Array, Array], Any]]] = {
    "kd_loss": (kd_loss, lambda p, q: kl(q, p)),
    "reverse_kd_loss": (functional.reverse_kd_loss, kl),
    "jsd_loss": (lambda *args, **options: functional.jsd_loss(*args, beta=0.3, **options), jsd),
    "total_variation_loss": (
        lambda *args, **options: functional.total_variation_loss(*args, **{"scale": "student_teacher"} | options),
        lambda p, q: abs(p - q).sum() / 2,
    ),
    "soft_cross_entropy_loss": (functional.soft_cross_entropy_loss, cross_entropy),
    "symmetric_kd_loss": (functional.symmetric_kd_loss, lambda p, q: (kl(p, q) + kl(q, p)) / 2),
    "skew_kd_loss": (functional.skew_kd_loss, lambda p, q: kl(q, 0.1 * q + 0.9 * p)),
    "todi_loss": (functional.todi_loss, lambda p, q: kl(p, q) + kl(q, p)),
    "entropy_gated_kd_loss": (
        functional.entropy_gated_kd_loss,
        lambda p, q: kl(p, q) + (kl(q, p) if cross_entropy(q, q) > 0.8 else 0.0),
    ),
    "alpha_beta_kd_loss": (
        lambda *args, **options: functional.alpha_beta_kd_loss(*args, alpha=0.4, beta=0.8, **options),
        alpha_beta,
    ),
}
PAIRS: list[tuple[str, Tail]] = [
    ("kd_loss", "bucket"),
    ("kd_loss", "uniform"),
    ("kd_loss", "renormalize"),
    ("kd_loss", "drop"),
    ("reverse_kd_loss", "bucket"),
    ("reverse_kd_loss", "uniform"),
    ("jsd_loss", "bucket"),
    ("jsd_loss", "uniform"),
    ("jsd_loss", "renormalize"),
    ("total_variation_loss", "bucket"),
    ("total_variation_loss", "uniform"),
    ("total_variation_loss", "renormalize"),
    ("soft_cross_entropy_loss", "bucket"),
    ("soft_cross_entropy_loss", "uniform"),
    ("soft_cross_entropy_loss", "renormalize"),
    ("symmetric_kd_loss", "bucket"),
    ("symmetric_kd_loss", "uniform"),
    ("skew_kd_loss", "bucket"),
    ("skew_kd_loss", "uniform"),
    ("skew_kd_loss", "renormalize"),
    ("todi_loss", "bucket"),
    ("todi_loss", "uniform"),
    ("entropy_gated_kd_loss", "uniform"),
    ("alpha_beta_kd_loss", "uniform"),
]
INFINITE = ("reverse_kd_loss", "symmetric_kd_loss", "todi_loss", "entropy_gated_kd_loss")  # where the teacher has a 0
each = pytest.mark.parametrize(("name", "tail"), PAIRS)


def softmax(z: Array, t: Any) -> Array:
    power = np.exp((z - z.max()) / t)
    return power / power.sum()


def reference(name: str, s: Tensor, target: Sparse, t_s: float, t_t: float) -> Array:
    """The loss per row without its scale."""
    equation, made_at, found = LOSSES[name][1], target.temperature, []
    for z, indices, log_probs in zip(*(x.detach().numpy() for x in (s, target.indices, target.log_probs)), strict=True):
        keep = log_probs > -np.inf
        index, q = indices[keep], np.exp(log_probs[keep].astype(np.longdouble))
        p = softmax(z.astype(np.longdouble), np.longdouble(t_s))
        rest = np.setdiff1d(np.arange(len(p)), index)
        if target.tail == "drop":
            found.append((q * np.log(q / p[index])).sum())
            continue
        if target.tail == "bucket":
            p, q = np.append(p[index], p[rest].sum()), np.append(q, 1 - q.sum())
        else:
            dense = np.zeros(len(p), np.longdouble)
            dense[index] = q ** (made_at / np.longdouble(t_t))
            if target.tail == "uniform":
                dense[rest] = ((1 - q.sum()) / len(rest)) ** (made_at / np.longdouble(t_t))
            q = dense / dense.sum()
        found.append(equation(p, q))
    return np.array(found, np.float64)


def targets_of(
    rows: int, classes: int, k: int, tail: Tail, made_at: float = 1.0, padded: bool = False, mass: float | None = None
) -> Sparse:
    """Draw k classes of each row with a mass below 1; where padded, the last entries name none."""
    indices = torch.stack([torch.randperm(classes)[:k] for _ in range(rows)])
    log_probs = torch.randn(rows, k, dtype=torch.float64).mul(2).log_softmax(-1)
    log_probs += math.log(float(torch.rand(()) * 0.9 + 0.05) if mass is None else mass)
    if padded:
        gone = (torch.arange(k) >= torch.randint(1, k + 1, (rows, 1))) & (torch.arange(k) > 0)
        log_probs, indices = log_probs.masked_fill(gone, -math.inf), indices.masked_fill(gone, 0)
    return Sparse(indices, log_probs, made_at, tail)


def fast_path_off() -> Any:
    return mock.patch.object(row_loss, "closed_form_applies", return_value=False)


def gradients(loss: Tensor, *inputs: Tensor) -> Any:
    return (loss.detach(), *torch.autograd.grad(loss.sum(), inputs))


# ---- values and gradients ----


@each
@settings(deadline=None, max_examples=15)
@given(
    rows=st.integers(1, 4),
    classes=st.integers(3, 9),
    k=st.integers(1, 8),
    t_s=st.floats(0.3, 20.0),
    t_t=st.floats(0.3, 20.0),
    made_at=st.floats(0.5, 4.0),
    spread=st.sampled_from([0.01, 1.0, 6.0]),
    padded=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_value_by_the_independent_formula(name, tail, rows, classes, k, t_s, t_t, made_at, spread, padded, seed):
    torch.manual_seed(seed)
    t_t = t_t if tail in ("uniform", "renormalize") else made_at
    s = torch.randn(rows, classes, dtype=torch.float64, requires_grad=True)
    target = targets_of(rows, classes, min(k, classes - 1), tail, made_at, padded)
    temperature = Temperature(*(torch.full((rows, 1), t, dtype=torch.float64) for t in (t_s, t_t)))
    expected = reference(name, s, target, t_s, t_t) * t_s * t_t
    for context in (mock.MagicMock(), fast_path_off()):
        with context:
            got = LOSSES[name][0](s, target, temperature, reduction="none").detach().numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-11 * max(t_s * t_t, 1))


@pytest.mark.slow
@each
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_by_finite_differences(name, tail, padded):
    torch.manual_seed(3)
    s = torch.randn(2, 5, dtype=torch.float64).mul(2).requires_grad_()
    target = targets_of(2, 5, 3, tail, 1.5, padded)
    t_s = torch.rand(2, 1, dtype=torch.float64).add(0.7).requires_grad_()
    t_t = torch.full((2, 1), 1.5, dtype=torch.float64)
    inputs = [s, t_s]
    if tail in ("uniform", "renormalize"):  # the others take the temperature at which they were made
        inputs.append(t_t.mul_(1.3).requires_grad_())
    if name == "total_variation_loss":  # |p − q| has kinks: stay away from them
        inputs[0] = (s.detach() * 3).requires_grad_()

    def loss(s: Tensor, t_s: Tensor, t_t: Tensor = t_t) -> Tensor:
        return LOSSES[name][0](s, target, Temperature(t_s, t_t))

    if name != "todi_loss":  # its weights are constants
        assert torch.autograd.gradcheck(loss, inputs, nondet_tol=1e-12)
        assert torch.autograd.gradgradcheck(loss, inputs, nondet_tol=1e-12)
    with fast_path_off():
        slow = gradients(loss(*inputs), *inputs)
    assert_close(gradients(loss(*inputs), *inputs), slow, rtol=1e-10, atol=1e-12)


def test_bucket_and_drop_have_a_closed_gradient():
    """bucket: p − q for the named, p_i (1 − r / P) for the rest; drop: m p − q."""
    torch.manual_seed(0)
    s = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    target = targets_of(5, 12, 4, "bucket")
    p, q = s.detach().softmax(-1), target.log_probs.exp()
    expected = p * (1 - (1 - q.sum(-1, keepdim=True)) / p.scatter(-1, target.indices, 0.0).sum(-1, keepdim=True))
    expected = expected.scatter(-1, target.indices, p.gather(-1, target.indices) - q)
    (gradient,) = torch.autograd.grad(kd_loss(s, target, 1.0, reduction="sum"), s)
    assert_close(gradient, expected)
    dropped = Sparse(target.indices, target.log_probs, tail="drop")
    (gradient,) = torch.autograd.grad(kd_loss(s, dropped, 1.0, reduction="sum"), s)
    assert_close(gradient, (q.sum(-1, keepdim=True) * p).scatter_add(-1, target.indices, -q))


def test_all_but_one_class_are_the_loss_on_all():
    s, t = (torch.randn(6, 7, dtype=torch.float64) * 3 for _ in range(2))
    for name, tail in PAIRS:
        if tail in ("bucket", "uniform"):
            loss = LOSSES[name][0]
            target = Sparse.top_k(t, 6, 2.0, tail)
            for t_s in (2.0, 3.0):
                temperature = Temperature(torch.tensor(t_s), torch.tensor(2.0))
                assert_close(loss(s, target, temperature), loss(s, t, temperature), rtol=1e-9, atol=1e-12)


def test_bucket_is_a_lower_bound():
    s, t = (torch.randn(50, 30, dtype=torch.float64) * 3 for _ in range(2))
    for name in ("kd_loss", "reverse_kd_loss", "jsd_loss", "total_variation_loss"):
        loss = LOSSES[name][0]
        coarse = loss(s, Sparse.top_k(t, 5), 1.0, reduction="none")
        assert (coarse <= loss(s, t, 1.0, reduction="none") + 1e-12).all()
        assert (coarse >= 0).all()


def test_uniform_and_renormalize_are_brought_to_every_temperature():
    """The loss is that of the logits that such a teacher would have."""
    t = torch.full((4, 20), -2.0, dtype=torch.float64).scatter(1, torch.randint(20, (4, 1)), 3.0)
    s = torch.randn(4, 20, dtype=torch.float64)
    for made_at in (0.5, 1.0, 3.0):
        uniform = Sparse.top_k(t, 5, made_at, "uniform")
        assert_close(kd_loss(s, uniform, 4.0), kd_loss(s, t, 4.0))
        alone = Sparse.top_k(t, 5, made_at, "renormalize")
        masked = torch.full_like(t, -math.inf).scatter(1, alone.indices, t.gather(1, alone.indices))
        assert_close(kd_loss(s, alone, 4.0), kd_loss(s, masked, 4.0))


# ---- unnormalised mass ----


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_drop_is_what_axolotl_computes(temperature):
    """Σ q (log q − log p) over the entries that are not masked, the student's p over the whole vocabulary."""
    torch.manual_seed(0)
    student = torch.randn(2, 40, 256)
    ids = torch.stack([torch.randperm(256)[:8] for _ in range(80)]).view(2, 40, 8)
    log_probs = torch.randn(2, 40, 8).log_softmax(-1)  # sums to 1 before entries are masked
    mask = torch.rand(2, 40, 8) < 0.8
    mask[..., 0] = True
    log_p = (student / temperature).log_softmax(-1).gather(-1, ids)
    expected = (log_probs.exp() * (log_probs - log_p))[mask].sum() / mask.sum()
    target = Sparse(ids, log_probs.masked_fill(~mask, -math.inf), temperature, "drop")
    got = kd_loss(student, target, temperature, scale="none", num_items=mask.sum())
    assert_close(got, expected)


def test_drop_may_be_negative():
    target = Sparse(torch.tensor([[1]]), torch.tensor([[math.log(0.1)]]), tail="drop")
    s = torch.tensor([[0.0, 3.0, 0.0]])
    expected = 0.1 * (math.log(0.1) - s.log_softmax(-1)[0, 1].item())
    assert kd_loss(s, target, 1.0).item() == pytest.approx(expected)
    assert expected < 0


def test_mass_a_little_above_one_is_rounding():
    target = Sparse(torch.tensor([[0, 1]]), torch.tensor([[0.702, 0.302]], dtype=torch.float16).log())
    s = torch.randn(1, 4)
    q = target.log_probs.float().softmax(-1)
    expected = (q * (q.log() - s.log_softmax(-1)[:, :2])).sum()
    assert_close(kd_loss(s, target, 1.0), expected, rtol=1e-5, atol=1e-6)


def test_a_rest_below_the_last_digit_counts():
    """float32 has no 1 − (1 − 1e-9), but the classes of the rest have a share at T = 4."""
    t = torch.cat([torch.tensor([[25.0]]), torch.zeros(1, 5000)], 1)
    s = torch.randn(1, 5001)
    target = Sparse.top_k(t, 1, tail="uniform")
    assert target.log_probs.exp().sum() == 1
    assert_close(kd_loss(s, target, 4.0), kd_loss(s, t, 4.0), rtol=1e-4, atol=1e-4)
    forgot = Sparse(target.indices, target.log_probs, tail="uniform")
    assert (kd_loss(s, forgot, 4.0) - kd_loss(s, t, 4.0)).abs() > 1


# ---- random samples ----


def test_samples_are_distinct_and_of_the_distribution():
    torch.manual_seed(0)
    logits = torch.randn(2, 3000, 12, dtype=torch.float64)
    logits[:] = logits[:1, :1]
    target = Sparse.sampled(logits, 8, temperature=2.0)
    named = target.log_probs > -math.inf
    assert target.indices.shape == (2, 3000, 8)
    assert_close(target.log_probs.exp().sum(-1), torch.ones(2, 3000, dtype=torch.float64))
    shares = torch.zeros_like(logits).scatter_add(-1, target.indices, target.log_probs.exp())
    q = (logits[0, 0] / 2).softmax(-1)
    error = ((q * (1 - q)) / (8 * 6000)).sqrt()
    assert ((shares.mean((0, 1)) - q).abs() < 4 * error).all()
    for row, mask in zip(target.indices[0, :50], named[0, :50], strict=True):
        assert len(set(row[mask].tolist())) == mask.sum()


def test_the_gradient_of_samples_is_unbiased_and_that_of_a_top_k_is_not():
    torch.manual_seed(0)
    logits, count = torch.randn(12, dtype=torch.float64), 20_000
    s = torch.randn(12, dtype=torch.float64).expand(count, 12).clone().requires_grad_()
    for t in (1.0, 2.0):
        exact = t * ((s[0].detach() / t).softmax(-1) - (logits / t).softmax(-1))
        drawn = kd_loss(s, Sparse.sampled(logits.expand(count, 12), 4, t), t, reduction="sum")
        (gradient,) = torch.autograd.grad(drawn, s)
        error = gradient.std(0) / math.sqrt(count)
        assert ((gradient.mean(0) - exact).abs() < 4 * error).all()
        (biased,) = torch.autograd.grad(kd_loss(s[:1], Sparse.top_k(logits[None], 4, t, "renormalize"), t), s)
        assert ((biased[0] - exact).abs() > 4 * error).any()


def test_samples_follow_their_generator():
    logits = torch.randn(4, 9)
    one, two = (Sparse.sampled(logits, 5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.indices, two.indices)
    assert torch.equal(one.log_probs, two.log_probs)


# ---- layouts, masks, chunks, types ----


@each
@settings(deadline=None, max_examples=12)
@given(
    layout=st.sampled_from([((7, 5), -1), ((2, 3, 5), -1), ((2, 5, 3, 2), 1), ((5, 7), 0)]),
    chunk=st.sampled_from([1, 12, 31, 10**6]),
    masked=st.sampled_from([0.0, 0.4, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    learnt=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 2**16),
)
def test_fast_path_is_the_definition(name, tail, layout, chunk, masked, reduction, learnt, dtype, seed):
    """In every layout, however it is cut into chunks; positions that are left out may hold anything."""
    torch.manual_seed(seed)
    shape, class_dim = layout
    positions = list(shape)
    classes = positions.pop(class_dim)
    count = math.prod(positions)
    target = targets_of(count, classes, 3, tail, 1.25, padded=True)
    s = torch.randn(shape, dtype=torch.float64).mul(2).to(dtype)
    labels = torch.randint(classes, positions)
    labels[torch.rand(positions) < masked] = -100
    out = labels.flatten() == -100
    with torch.no_grad():
        s.movedim(class_dim, -1)[labels == -100] = math.nan
        target.indices[out] = -7
        target.log_probs[out] = math.nan
    target = Sparse(target.indices.view(*positions, 3), target.log_probs.view(*positions, 3), 1.25, tail)
    per_position = [1 if dim == class_dim % len(shape) else size for dim, size in enumerate(shape)]
    temp = Temperature((torch.rand(per_position, dtype=dtype) + 0.5), torch.full(per_position, 1.25, dtype=dtype))
    wanted = [s.requires_grad_()]
    if learnt:
        wanted.append(temp.student.requires_grad_())
        if tail in ("uniform", "renormalize"):
            wanted.append(temp.teacher.requires_grad_())
    loss, options = LOSSES[name][0], {"targets": labels, "class_dim": class_dim, "reduction": reduction}
    weights = torch.rand(positions if reduction == "none" else [], dtype=dtype)
    with mock.patch.object(rows_fast, "CHUNK_CPU", chunk):
        fast = gradients(loss(s, target, temp, **options) * weights, *wanted)
    exact = [x.detach().double().requires_grad_() for x in wanted]
    temp = Temperature(*(x.double() for x in [*exact[1:], *temp[len(exact) - 1 : 2]]))
    with fast_path_off():
        slow = gradients(loss(exact[0], target, temp, **options) * weights.double(), *exact)
    assert all(x.isfinite().all() for x in fast)
    rtol, atol = (1e-10, 1e-12) if dtype == torch.float64 else (1e-5, 1e-4)
    assert_close([x.double() for x in fast], [*slow], rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each
def test_half_precision_is_widened_first(name, tail, dtype):
    torch.manual_seed(0)
    s = (torch.randn(8, 300) * 4).to(dtype).requires_grad_()
    target = targets_of(8, 300, 16, tail, 2.0, mass=0.9)
    loss, gradient = gradients(LOSSES[name][0](s, target, 2.0), s)
    exact = s.detach().double().requires_grad_()
    expected, expected_gradient = gradients(LOSSES[name][0](exact, target, 2.0), exact)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert_close(gradient.double(), expected_gradient, rtol=3 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("t", [0.05, 1.0, 100.0])
@each
def test_extreme_logits_and_temperatures(name, tail, t, size):
    """Values and gradients stay finite, and near those in float64."""
    torch.manual_seed(0)
    s = (torch.randn(6, 50) * size).requires_grad_()
    made_at = t if tail in ("bucket", "drop") else 1.0
    target = targets_of(6, 50, 5, tail, made_at)
    loss, gradient = gradients(LOSSES[name][0](s, target, t), s)
    exact = s.detach().double().requires_grad_()
    expected, expected_gradient = gradients(LOSSES[name][0](exact, target, t), exact)
    assert loss.isfinite()
    assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5 * max(1.0, t * t) + 1e-7 * size * t)
    assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-5 * max(1.0, t))


@each
def test_a_certain_teacher_and_a_student_without_some_classes(name, tail):
    """q = 1 leaves nothing for the rest; classes that the student masks are in the rest with nothing."""
    target = Sparse(torch.tensor([[2], [0]]), torch.zeros(2, 1), tail=tail)
    s = torch.tensor([[0.0, 1.0, 2.0, -math.inf], [3.0, -math.inf, -math.inf, -math.inf]], requires_grad=True)
    if name in INFINITE:
        assert LOSSES[name][0](s, target, 1.0, reduction="none")[0] == math.inf
        return
    loss, gradient = gradients(LOSSES[name][0](s, target, 1.0, reduction="none"), s)
    p = s.detach().softmax(-1)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    assert loss[1].abs() < 1e-6
    if name == "kd_loss":
        assert_close(loss[0], -p[0, 2].log())
        assert_close(gradient[0], p[0] - torch.tensor([0.0, 0.0, 1.0, 0.0]))


def test_int32_and_uint16_indices():
    log_probs = torch.full((2, 2), 0.3).log()
    s = torch.randn(2, 5)
    expected = kd_loss(s, Sparse(torch.tensor([[0, 4], [1, 2]]), log_probs), 1.0)
    for dtype in (torch.int32, torch.uint16, torch.uint8):
        assert torch.equal(kd_loss(s, Sparse(torch.tensor([[0, 4], [1, 2]]).to(dtype), log_probs), 1.0), expected)


def test_modules_conventions_and_several_temperatures():
    s, t = (torch.randn(4, 9, dtype=torch.float64) for _ in range(2))
    target = Sparse.top_k(t, 4, tail="uniform")
    expected = kd_loss(s, target, 2.0)
    assert_close(losses.KDLoss()(s, target, 2.0), expected)
    assert_close(losses.KDLoss(convention="trl")(s, target, 2.0) * 4, expected)
    assert_close(losses.KDLoss(convention="modelopt")(s, target, 2.0) * 9, expected)
    several = functional.multi_temperature_kd_loss(s, target, 2.0, factors=(0.5, 2.0))
    assert_close(several, (kd_loss(s, target, 1.0) + kd_loss(s, target, 4.0)) / 2)


def test_no_dense_teacher_is_held():
    """Beside the gradient nothing of the logits' size is allocated."""
    from torch.profiler import ProfilerActivity, profile

    s = torch.randn(256, 4096, requires_grad=True)
    for tail in ("bucket", "uniform", "renormalize", "drop"):
        target = Sparse.top_k(s.detach(), 16, tail=tail)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            kd_loss(s, target, 1.0)
        large = [event for event in seen.events() or () if event.self_cpu_memory_usage >= s.numel() * 4]
        assert len(large) == 1, tail  # the gradient's buffer


@pytest.mark.slow
@each
def test_compiles(name, tail):
    s = torch.randn(4, 9, requires_grad=True)
    target = Sparse.top_k(torch.randn(4, 9), 3, tail=tail)

    def loss(s: Tensor, indices: Tensor, log_probs: Tensor) -> Tensor:
        return LOSSES[name][0](s, Sparse(indices, log_probs, tail=tail), 1.0)

    expected = gradients(LOSSES[name][0](s, Sparse(target.indices, target.log_probs, tail=tail), 1.0), s)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(gradients(compiled(s, target.indices, target.log_probs), s), expected)
