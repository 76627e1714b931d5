"""The contract of losses between logits: an exported class without a setting here fails."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor
from torch.testing import assert_close

from kd_lightning import functional, losses
from kd_lightning.functional import Temperature, row_loss, rows_fast
from kd_lightning.losses import LogitLoss

Array = Any


# ---- independent formulas: numpy in extended precision, one row at a time, as the publications write them ----


def softmax(z: Array, t: Array) -> Array:
    power = np.exp((z - z.max()) / t) if np.ndim(t) == 0 else np.exp(z / t)
    return power / power.sum()


def kl(p: Array, q: Array) -> Any:
    return (p * np.log(p / q)).sum()


def sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


def jsd(s: Array, t: Array, ts: Any, tt: Any, y: int, beta: float) -> Any:
    p, q = softmax(s, ts), softmax(t, tt)
    mixture = beta * q + (1 - beta) * p
    return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)


def dkd(s: Array, t: Array, ts: Any, tt: Any, y: int, alpha: float, beta: float) -> Any:
    p, q = softmax(s, ts), softmax(t, tt)
    rest_p, rest_q = np.delete(p, y), np.delete(q, y)
    target = kl(np.array([q[y], rest_q.sum()]), np.array([p[y], rest_p.sum()]))
    return alpha * target + beta * kl(rest_q / rest_q.sum(), rest_p / rest_p.sum())


def bernoulli(s: Array, t: Array, ts: Any, tt: Any, y: int) -> Any:
    return kl(sigmoid(t / tt), sigmoid(s / ts)) + kl(sigmoid(-t / tt), sigmoid(-s / ts))


def skew(s: Array, t: Array, ts: Any, tt: Any, y: int, share: float, reverse: bool) -> Any:
    p, q = softmax(s, ts), softmax(t, tt)
    outer, inner = (p, q) if reverse else (q, p)
    return kl(outer, share * outer + (1 - share) * inner)


def both(s: Array, t: Array, ts: Any, tt: Any, y: int, forward: float, reverse: float) -> Any:
    p, q = softmax(s, ts), softmax(t, tt)
    return forward * kl(q, p) + reverse * kl(p, q)


def entropy_gated(s: Array, t: Array, ts: Any, tt: Any, y: int, threshold: float) -> Any:
    q = softmax(t, tt)
    return both(s, t, ts, tt, y, forward=-(q * np.log(q)).sum() > threshold, reverse=1.0)


def alpha_beta(s: Array, t: Array, ts: Any, tt: Any, y: int, alpha: float, beta: float) -> Any:
    """Return the form of Cichocki and Amari, whose sum of three powers has no cancelled terms."""
    p, q = softmax(s, ts), softmax(t, tt)
    total = alpha + beta
    powers = q**alpha * p**beta - alpha / total * q**total - beta / total * p**total
    return -powers.sum() / (alpha * beta)


def nkd_others(s: Array, t: Array, ts: Any, tt: Any, y: int) -> Any:
    p, q = np.delete(softmax(s, ts), y), np.delete(softmax(t, tt), y)
    return -(q / q.sum() * np.log(p / p.sum())).sum()


@dataclass(frozen=True)
class Setting:
    """The construction of a loss, and its independent formula."""

    module: LogitLoss
    row: Callable[..., Any] | None
    """One row: (s, t, T_s, T_t, y) → the value before the scale. None: the loss is not one of rows."""
    unscaled_row: Callable[..., Any] = lambda *_: 0.0
    """A part that neither temperature nor scale touch."""
    vanishes: bool = True
    """Identical logits cost exactly nothing."""
    shift_invariant: bool = True
    min_classes: int = 2
    needs_targets: bool = False
    own_scale: str = "student_teacher"
    factors: tuple[float, ...] = (1.0,)
    constants: bool = False
    """Weights inside are constants, which finite differences would move."""


SETTINGS: dict[str, Setting] = {
    "KDLoss": Setting(losses.KDLoss(), lambda s, t, ts, tt, y: kl(softmax(t, tt), softmax(s, ts))),
    "FusedLinearKDLoss": Setting(
        losses.FusedLinearKDLoss(), lambda s, t, ts, tt, y: kl(softmax(t, tt), softmax(s, ts))
    ),
    "ReverseKDLoss": Setting(losses.ReverseKDLoss(), lambda s, t, ts, tt, y: kl(softmax(s, ts), softmax(t, tt))),
    "JSDLoss": Setting(losses.JSDLoss(beta=0.3), lambda *row: jsd(*row, beta=0.3)),
    "SymmetricKLLoss": Setting(
        losses.SymmetricKLLoss(reverse_weight=0.3), lambda *row: both(*row, forward=0.7, reverse=0.3)
    ),
    "EntropyGatedKLLoss": Setting(
        losses.EntropyGatedKLLoss(threshold=1.2), lambda *row: entropy_gated(*row, threshold=1.2)
    ),
    "ToDiLoss": Setting(losses.ToDiLoss(), lambda *row: both(*row, forward=1.0, reverse=1.0), constants=True),
    "SkewKLLoss": Setting(losses.SkewKLLoss(skew=0.2), lambda *row: skew(*row, share=0.2, reverse=False)),
    "SkewKLLoss, reverse": Setting(
        losses.SkewKLLoss(skew=0.2, reverse=True), lambda *row: skew(*row, share=0.2, reverse=True)
    ),
    "AlphaBetaKDLoss": Setting(
        losses.AlphaBetaKDLoss(alpha=0.8, beta=0.3), lambda *row: alpha_beta(*row, alpha=0.8, beta=0.3)
    ),
    "TotalVariationLoss": Setting(
        losses.TotalVariationLoss(),
        lambda s, t, ts, tt, y: np.abs(softmax(t, tt) - softmax(s, ts)).sum() / 2,
        own_scale="none",
    ),
    "SoftCrossEntropyLoss": Setting(
        losses.SoftCrossEntropyLoss(),
        lambda s, t, ts, tt, y: -(softmax(t, tt) * np.log(softmax(s, ts))).sum(),
        vanishes=False,
    ),
    "HardLabelLoss": Setting(
        losses.HardLabelLoss(),
        lambda *row: 0.0,
        lambda s, t, ts, tt, y: -np.log(softmax(s, 1.0)[t.argmax()]),
        vanishes=False,
        own_scale="none",
    ),
    "MSELogitsLoss": Setting(
        losses.MSELogitsLoss(),
        lambda s, t, ts, tt, y: ((s / ts - t / tt) ** 2).mean(),
        shift_invariant=False,
        min_classes=1,
    ),
    "BernoulliKDLoss": Setting(losses.BernoulliKDLoss(), bernoulli, shift_invariant=False, min_classes=1),
    "DKDLoss": Setting(
        losses.DKDLoss(alpha=0.7, beta=3.0),
        lambda *row: dkd(*row, alpha=0.7, beta=3.0),
        min_classes=3,
        needs_targets=True,
    ),
    "NKDLoss": Setting(
        losses.NKDLoss(gamma=2.0),
        lambda *row: 2.0 * nkd_others(*row),
        lambda s, t, ts, tt, y: -softmax(t, 1.0)[y] * np.log(softmax(s, 1.0)[y]),
        vanishes=False,
        min_classes=3,
        needs_targets=True,
    ),
    "DISTLoss": Setting(losses.DISTLoss(), None, vanishes=False, min_classes=3, own_scale="none"),
    "MultiTemperatureKDLoss": Setting(
        losses.MultiTemperatureKDLoss(factors=(0.5, 2.0)),
        lambda s, t, ts, tt, y: kl(softmax(t, tt), softmax(s, ts)),
        factors=(0.5, 2.0),
    ),
}
ROWWISE = [name for name, setting in SETTINGS.items() if setting.row is not None]
VANISHING = [name for name, setting in SETTINGS.items() if setting.vanishes]


def test_every_exported_loss_has_a_setting():
    exported = {name for name in losses.__all__ if issubclass(getattr(losses, name), LogitLoss)} - {"LogitLoss"}
    assert {type(setting.module).__name__ for setting in SETTINGS.values()} == exported, (
        "a loss is exported without a setting in this file, or the other way round"
    )


def reference(setting: Setting, s: Tensor, t: Tensor, ts: Tensor, tt: Tensor, targets: Tensor | None) -> Array:
    """The loss per row by the independent formula; temperatures of shape (N, 1) or (N, C)."""
    rows = []
    labels = torch.zeros(len(s), dtype=torch.long) if targets is None else targets
    arrays = [x.detach().double().numpy().astype(np.longdouble) for x in (s, t, ts, tt)]
    for z_s, z_t, t_s, t_t, y in zip(*arrays, labels.tolist(), strict=True):
        t_s, t_t = (x[0] if len(x) == 1 else x for x in (t_s, t_t))
        scale = 1.0 if setting.own_scale == "none" else np.mean(t_s * t_t)
        assert setting.row is not None
        terms = [f * f * scale * setting.row(z_s, z_t, f * t_s, f * t_t, y) for f in setting.factors]
        rows.append(sum(terms) / len(terms) + setting.unscaled_row(z_s, z_t, t_s, t_t, y))
    return np.array(rows, dtype=np.float64)


def draw(name: str, *shape: int, dtype: torch.dtype = torch.float64, spread: float = 2.0) -> tuple[Tensor, Tensor, Any]:
    s, t = ((torch.randn(*shape, dtype=torch.float64) * spread).to(dtype) for _ in range(2))
    targets = torch.randint(shape[-1], shape[:-1]) if SETTINGS[name].needs_targets else None
    return s.requires_grad_(), t, targets


def built(name: str, **options: Any) -> LogitLoss:
    """The class with its defaults, and a value where it has none."""
    module: Any = SETTINGS[name].module
    parameters = inspect.signature(type(module)).parameters
    required = {option for option in module.options if parameters[option].default is inspect.Parameter.empty}
    return type(module)(**{option: getattr(module, option) for option in required}, **options)


def fast_path_off() -> Any:
    return mock.patch.object(row_loss, "closed_form_applies", return_value=False)


def gradients(loss: Tensor, *inputs: Tensor) -> Any:
    return (loss.detach(), *torch.autograd.grad(loss.sum(), inputs))


# ---- values and gradients ----


@pytest.mark.parametrize("name", ROWWISE)
@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 4),
    classes=st.integers(3, 9),
    t_s=st.floats(0.3, 20.0),
    t_t=st.floats(0.3, 20.0),
    spread=st.sampled_from([0.01, 1.0, 6.0]),
    seed=st.integers(0, 2**16),
)
def test_value_by_the_independent_formula(name, rows, classes, t_s, t_t, spread, seed):
    torch.manual_seed(seed)
    setting = SETTINGS[name]
    s, t, targets = draw(name, rows, classes, spread=spread)
    ts, tt = (torch.full((rows, 1), x, dtype=torch.float64) for x in (t_s, t_t))
    module = copy.copy(setting.module)
    module.reduction = "none"
    expected = reference(setting, s, t, ts, tt, targets)
    for context in (mock.MagicMock(), fast_path_off()):
        with context:
            got = module(s, t, Temperature(ts, tt), targets).detach().numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12 * max(t_s * t_t, 1))


@pytest.mark.parametrize("layout", [(1, 6), (4, 6)], ids=str)
@pytest.mark.parametrize("name", ROWWISE)
def test_class_wise_temperature_by_the_independent_formula(name, layout):
    setting = SETTINGS[name]
    s, t, targets = draw(name, 4, 6)
    ts, tt = (torch.rand(layout, dtype=torch.float64) * 3 + 0.5 for _ in range(2))
    expected = reference(setting, s, t, ts.expand(4, 6), tt.expand(4, 6), targets)
    got = setting.module(s, t, Temperature(ts, tt), targets)
    assert got.item() == pytest.approx(expected.mean(), rel=1e-10)


def correlation(x: Array, y: Array) -> Any:
    """Pearson's, with 1e-8 added to the product of the norms, as the authors of DIST do."""
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / (np.linalg.norm(x) * np.linalg.norm(y) + 1e-8)


def test_dist_by_the_independent_formula():
    s, t, _ = draw("DISTLoss", 6, 5)
    valid = torch.tensor([0, 1, -100, 2, 3, -100])
    p, q = (np.array([softmax(row, 1.5) for row in z.detach().numpy()])[(valid >= 0).numpy()] for z in (s, t))
    between_classes = np.mean([1 - correlation(a, b) for a, b in zip(p, q, strict=True)])
    within_classes = np.mean([1 - correlation(a, b) for a, b in zip(p.T, q.T, strict=True)])
    got = losses.DISTLoss(beta=0.7, gamma=2.0)(s, t, 1.5, valid)
    assert got.item() == pytest.approx(0.7 * between_classes + 2.0 * within_classes, rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SETTINGS if not SETTINGS[name].constants])
def test_gradients_by_finite_differences(name):
    s, t, targets = draw(name, 3, 5)
    t.requires_grad_()
    ts, tt = (torch.rand(3, 1, dtype=torch.float64).add(0.7).requires_grad_() for _ in range(2))
    module = SETTINGS[name].module
    if name == "TotalVariationLoss":  # |p − q| has kinks: stay away from them
        t = t.detach() + 5 * torch.arange(5)
        t.requires_grad_()

    def loss(s: Tensor, t: Tensor, ts: Tensor, tt: Tensor) -> Tensor:
        return module(s, t, Temperature(ts, tt), targets)

    if name == "NKDLoss":  # its first term takes the teacher's confidence as a constant
        t.requires_grad_(False)
    assert torch.autograd.gradcheck(loss, (s, t, ts, tt), nondet_tol=1e-12)
    t.requires_grad_(False)
    assert torch.autograd.gradcheck(loss, (s, t, ts, tt), nondet_tol=1e-12)  # a second backward is the definition's
    assert torch.autograd.gradgradcheck(loss, (s, t, ts, tt), nondet_tol=1e-12)


def layouts() -> Iterator[tuple[tuple[int, ...], int]]:
    yield (7, 5), -1
    yield (2, 3, 5), -1
    yield (2, 5, 3, 2), 1
    yield (5, 7), 0


@pytest.mark.parametrize("name", SETTINGS)
@settings(deadline=None, max_examples=30)
@given(
    layout=st.sampled_from(list(layouts())),
    chunk=st.sampled_from([1, 12, 31, 10**6]),
    masked=st.sampled_from([0.0, 0.4, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    temperature=st.sampled_from(["number", "learnt", "per position", "per class"]),
    scale=st.sampled_from(["student_teacher", "student", "teacher", "none"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 2**16),
)
def test_fast_path_is_the_definition(name, layout, chunk, masked, reduction, temperature, scale, dtype, seed):
    """In every layout, however it is cut into chunks, with every gradient."""
    torch.manual_seed(seed)
    shape, class_dim = layout
    s, t = ((torch.randn(shape, dtype=torch.float64) * 2).to(dtype) for _ in range(2))
    positions = list(shape)
    classes = positions.pop(class_dim)
    targets = torch.randint(classes, positions)
    targets[torch.rand(positions) < masked] = -100
    with torch.no_grad():  # a position that is left out may hold anything
        s.movedim(class_dim, -1)[targets == -100] = math.nan
        t.movedim(class_dim, -1)[targets == -100] = math.inf
    wanted = [s.requires_grad_()]
    if temperature == "number":
        temp: Any = 2.5
    else:
        per_position = [1 if dim == class_dim % len(shape) else size for dim, size in enumerate(shape)]
        per_class = [size if dim == class_dim % len(shape) else 1 for dim, size in enumerate(shape)]
        one_of = {"learnt": [1], "per position": per_position, "per class": per_class}[temperature]
        temp = Temperature(*((torch.rand(one_of, dtype=dtype) * 3 + 0.5) for _ in range(2)))
        if temperature != "per class":
            wanted += [temp.student.requires_grad_(), temp.teacher.requires_grad_()]
    module = copy.copy(SETTINGS[name].module)
    module.class_dim, module.reduction, module.scale = class_dim, reduction, scale
    weights = torch.rand(positions if reduction == "none" else [], dtype=dtype)

    with mock.patch.object(rows_fast, "CHUNK_CPU", chunk):
        fast = gradients(module(s, t, temp, targets) * weights, *wanted)
    exact = [x.detach().double().requires_grad_() for x in wanted]  # in float32 the definition itself loses digits
    if isinstance(temp, Temperature):
        temp = Temperature(*(exact[1:] or (x.double() for x in temp[:2])))
    with fast_path_off():
        slow = gradients(module(exact[0], t.double(), temp, targets) * weights.double(), *exact)
    assert all(x.isfinite().all() for x in fast)
    # T² ≤ 12 and the sum over up to 35 positions magnify the rounding
    rtol, atol = (1e-12, 1e-12) if dtype == torch.float64 else (1e-5, 1e-4)
    assert_close([x.double() for x in fast], [*slow], rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", SETTINGS)
def test_gradient_reaches_the_student_through_every_term(name):
    s, t, targets = draw(name, 4, 5)
    module = SETTINGS[name].module
    weights = [option for option in module.options if option in ("alpha", "beta", "gamma") and name != "JSDLoss"]
    for only in weights if getattr(module, "convention", True) is True else []:
        alone = copy.copy(module)
        for option in weights:
            setattr(alone, option, 1.0 if option == only else 0.0)
        (gradient,) = torch.autograd.grad(alone(s, t, 2.0, targets), s)
        assert gradient.abs().sum() > 1e-4, only
    (gradient,) = torch.autograd.grad(module(s, t, 2.0, targets), s)
    assert gradient.abs().sum() > 1e-4


# ---- identities ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", [0.05, 1.0, 4.0, 100.0])
@pytest.mark.parametrize("name", VANISHING)
def test_identical_logits_have_no_loss_and_no_gradient(name, t, dtype):
    s, _, targets = draw(name, 6, 40, dtype=dtype, spread=5.0)
    loss, gradient = gradients(SETTINGS[name].module(s, s.detach().clone(), t, targets), s)
    assert loss == 0
    assert gradient.eq(0).all()
    with fast_path_off():
        loss, gradient = gradients(SETTINGS[name].module(s, s.detach().clone(), t, targets), s)
    assert loss == 0
    if name in ("KDLoss", "TotalVariationLoss", "MSELogitsLoss"):
        assert gradient.eq(0).all()
    assert gradient.abs().max() <= 1e-6 * t  # autograd adds up terms whose rounding differs


@pytest.mark.parametrize("name", [name for name in SETTINGS if SETTINGS[name].shift_invariant])
def test_shift_of_the_logits_changes_nothing(name):
    s, t, targets = draw(name, 4, 6)
    module = SETTINGS[name].module
    assert_close(module(s + 100, t - 50, 3.0, targets), module(s, t, 3.0, targets), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SETTINGS)
def test_says_whether_it_sees_a_softmax(name):
    assert SETTINGS[name].module.compares_distributions == SETTINGS[name].shift_invariant


@pytest.mark.parametrize("name", ROWWISE)
def test_classes_masked_on_both_sides_drop_out(name):
    s, t, targets = draw(name, 4, 8)
    if targets is not None:
        targets = targets % 5
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    module = SETTINGS[name].module
    expected = gradients(module(s[:, :5], t[:, :5], temperature, targets), s, temperature)
    padded = [z.detach().clone() for z in (s, t)]
    for z in padded:
        z[:, 5:] = -math.inf
    padded[0].requires_grad_()
    for context in (mock.MagicMock(), fast_path_off()):
        with context:
            got = gradients(module(*padded, temperature, targets), padded[0], temperature)
        assert_close(got, expected)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("mask", [-1e4, -65504.0, -1e30, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("fast", [True, False])
def test_classes_masked_by_finite_numbers_drop_out(name, mask, fast):
    s, t, targets = draw(name, 4, 5)
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    padded = [torch.nn.functional.pad(z.detach(), (0, 3), value=mask) for z in (s, t)]
    padded[0].requires_grad_()
    module = SETTINGS[name].module
    with mock.MagicMock() if fast else fast_path_off():
        expected = gradients(module(s, t, temperature, targets), s, temperature)
        got = gradients(module(*padded, temperature, targets), padded[0], temperature)
    assert_close(got, (expected[0], torch.nn.functional.pad(expected[1], (0, 3)), *expected[2:]))


def test_a_class_masked_in_some_rows_only():
    """MSE divides by the classes of each row; DIST correlates a class over the rows that have it."""
    s, t = (torch.randn(4, 6, dtype=torch.float64) for _ in range(2))
    masked = torch.zeros(4, 6, dtype=torch.bool)
    masked[0, 4:] = masked[2, 1] = True
    padded = [z.masked_fill(masked, -math.inf) for z in (s, t)]
    rows = [(s[i][~masked[i]], t[i][~masked[i]]) for i in range(4)]
    expected = torch.stack([(a - b).square().mean() for a, b in rows]).mean()
    assert_close(losses.MSELogitsLoss(scale="none")(*padded, 1.0), expected)

    p, q = (z.softmax(-1) for z in padded)
    between = [1 - correlation(p[i][~masked[i]].numpy(), q[i][~masked[i]].numpy()) for i in range(4)]
    within = [1 - correlation(p[~masked[:, k], k].numpy(), q[~masked[:, k], k].numpy()) for k in range(6)]
    assert losses.DISTLoss()(*padded, 1.0).item() == pytest.approx(np.mean(between) + np.mean(within), rel=1e-9)


@pytest.mark.parametrize("name", ["DKDLoss", "NKDLoss"])
@pytest.mark.parametrize("fast", [True, False])
def test_a_target_that_is_masked_or_alone(name, fast):
    """Row 0 has no target, row 1 nothing but its target, row 2 both; the first two by the equation's limit."""
    s, t = (torch.randn(3, 5, dtype=torch.float64) for _ in range(2))
    targets = torch.tensor([1, 2, 3])
    for z in (s, t):
        z[0, 1] = -math.inf
        z[1, [0, 1, 3, 4]] = -math.inf
    s.requires_grad_()
    module: Any = copy.copy(SETTINGS[name].module)
    module.reduction = "none"
    rest = [0, 2, 3, 4]
    kl = torch.nn.functional.kl_div
    soft = [(z[0, rest] / 2.0).log_softmax(-1) for z in (s, t)]
    if name == "DKDLoss":  # both sides are sure that it is not the target: the first term is 0
        first = module.beta * kl(soft[0], soft[1], log_target=True, reduction="sum") * 4.0
    else:
        first = module.gamma * -(soft[1].exp() * soft[0]).sum() * 4.0
    with mock.MagicMock() if fast else fast_path_off():
        loss = module(s, t, 2.0, targets)
        (gradient,) = torch.autograd.grad(loss.sum(), s)
        (alone,) = torch.autograd.grad(module(s[2:], t[2:], 2.0, targets[2:]).sum(), s)
    (expected,) = torch.autograd.grad(first, s)
    assert loss[0].item() == pytest.approx(first.item(), rel=1e-9)
    assert loss[1].item() == 0.0
    assert_close(gradient[0], expected[0])
    assert gradient[1].eq(0).all()
    assert_close(gradient[2], alone[2])


@pytest.mark.parametrize(
    "name", ["ReverseKDLoss", "KDLoss", "JSDLoss", "SkewKLLoss", "SkewKLLoss, reverse", "AlphaBetaKDLoss", "ToDiLoss"]
)
@pytest.mark.parametrize("fast", [True, False])
def test_a_class_that_the_student_alone_masks(name, fast):
    """Forward KL and ToDi are infinite there; the others are finite, and no gradient is NaN."""
    s, t = (torch.randn(2, 5, dtype=torch.float64) for _ in range(2))
    s[0, 1] = -math.inf
    s.requires_grad_()
    with mock.MagicMock() if fast else fast_path_off():
        loss = SETTINGS[name].module(s, t, 2.0)
        (gradient,) = torch.autograd.grad(loss, s)
    assert loss.isfinite() == (name not in ("KDLoss", "ToDiLoss"))
    assert not gradient.isnan().any()


# ---- masks, reductions, layouts ----


@pytest.mark.parametrize("name", SETTINGS)
def test_ignored_positions_count_for_nothing(name):
    s, t, _ = draw(name, 5, 6)
    targets = torch.tensor([0, -100, 2, -100, 5])
    keep = targets >= 0
    module = SETTINGS[name].module
    assert_close(module(s, t, 2.0, targets), module(s[keep], t[keep], 2.0, targets[keep]))
    nothing = gradients(module(s, t, 2.0, torch.full((5,), -100)), s)
    assert nothing[0] == 0
    assert nothing[1].eq(0).all()


@pytest.mark.parametrize("name", SETTINGS)
def test_dense_predictions(name):
    s, t, _ = draw(name, 2, 6, 3, 4)
    targets = torch.randint(6, (2, 3, 4))
    targets[0, 0] = 255
    dense = copy.copy(SETTINGS[name].module)
    dense.class_dim, dense.ignore_index = 1, 255
    flat = copy.copy(SETTINGS[name].module)
    flat.ignore_index = 255
    rows = [z.movedim(1, -1).reshape(-1, 6) for z in (s, t)]
    assert_close(dense(s, t, 2.0, targets), flat(*rows, 2.0, targets.flatten()))


@pytest.mark.parametrize("name", SETTINGS)
def test_num_items_makes_accumulation_exact(name):
    """Micro-batches with unequal counts add up to the loss of the whole batch."""
    if name == "DISTLoss":
        pytest.skip("correlates over the batch: parts of a batch are another loss")
    s, t, _ = draw(name, 4, 3, 6)
    targets = torch.randint(6, (4, 3))
    targets[0, 1:] = targets[2, 0] = -100
    module = SETTINGS[name].module
    expected = gradients(module(s, t, 2.0, targets), s)
    for num_items in (9, torch.tensor(9)):
        parts = [module(s[i : i + 2], t[i : i + 2], 2.0, targets[i : i + 2], num_items) for i in (0, 2)]
        assert_close(gradients(torch.stack(parts).sum(), s), expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_padded_vocabulary_is_cut_and_said(name):
    s, t, targets = draw(name, 4, 6)
    wide = torch.cat([t, torch.randn(4, 2)], dim=-1)
    module = SETTINGS[name].module
    tokens = [None if x is None else x.unflatten(0, (2, 2)) for x in (s, wide, t, targets)]
    with pytest.warns(UserWarning, match="the teacher has 8 classes, the student 6: the last 2"):
        got = module(tokens[0], tokens[1], 2.0, tokens[3])
    assert_close(got, module(tokens[0], tokens[2], 2.0, tokens[3]))
    with pytest.raises(ValueError, match=r"class counts differ \(6 and 8\)"):  # of images: no padding, a mistake
        module(s, wide, 2.0, targets)


@pytest.mark.parametrize("name", SETTINGS)
def test_no_rows(name):
    s, t, targets = draw(name, 0, 6)
    loss, gradient = gradients(SETTINGS[name].module(s, t, 2.0, targets), s)
    assert loss == 0
    assert gradient.shape == (0, 6)


# ---- precision ----


@pytest.mark.parametrize("t", [0.5, 1.0, 4.0, 20.0, 100.0])
@pytest.mark.parametrize("name", SETTINGS)
def test_single_precision(name, t):
    """T² magnifies the rounding of a difference that shrinks with T²: float32 keeps four digits at 100."""
    s, z, targets = draw(name, 16, 200, dtype=torch.float32)
    module = SETTINGS[name].module
    loss, gradient = gradients(module(s, z, t, targets), s)
    wide = s.detach().double().requires_grad_()
    expected = gradients(module(wide, z.double(), t, targets), wide)
    assert_close(loss.double(), expected[0], rtol=1e-6 if t <= 4 else 1e-5 if t <= 20 else 3e-4, atol=0)
    assert (gradient - expected[1]).norm() <= (1e-6 if t == 4 else 3e-5) * expected[1].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SETTINGS)
def test_half_precision(name, dtype):
    s, t, targets = draw(name, 16, 300, dtype=dtype)
    module = SETTINGS[name].module
    loss, gradient = gradients(module(s, t, 4.0, targets), s)
    wide = s.detach().double().requires_grad_()
    expected = gradients(module(wide, t.double(), 4.0, targets), wide)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert_close(loss.double(), expected[0], rtol=1e-4, atol=0)
    rounding = (expected[1].to(dtype) - expected[1]).norm()  # what the dtype costs whoever computes
    terms = 2 if name in ("NKDLoss", "MultiTemperatureKDLoss") else 1  # each is rounded before they are added
    assert (gradient - expected[1]).norm() <= terms * max(2e-3 * expected[1].norm(), 1.01 * rounding)


@pytest.mark.parametrize("name", SETTINGS)
def test_float16_under_a_gradient_scaler(name):
    """The factor 2¹⁶ comes in backward: what is kept until then must not underflow."""
    s, t, targets = draw(name, 64, 300, dtype=torch.float16)
    module = SETTINGS[name].module
    (gradient,) = torch.autograd.grad(module(s, t, 1.0, targets) * 2**10, s)
    wide = s.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(module(wide, t.double(), 1.0, targets) * 2**10, wide)
    assert (gradient - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("t", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("name", SETTINGS)
def test_huge_logits(name, t):
    s, z, targets = draw(name, 5, 7, dtype=torch.float32, spread=1e4)
    temperature = torch.tensor(t, requires_grad=True)
    got = gradients(SETTINGS[name].module(s, z, temperature, targets), s, temperature)
    assert all(x.isfinite().all() for x in got)
    wide, t64 = s.detach().double().requires_grad_(), temperature.detach().double().requires_grad_()
    expected = gradients(SETTINGS[name].module(wide, z.double(), t64, targets), wide, t64)
    size = 1e8 * 1e-6 if name == "MSELogitsLoss" else 2e-4  # its T cancels out of values of 1e8
    assert_close(got, tuple(x.float() for x in expected), rtol=2e-4, atol=size)


@pytest.mark.parametrize("name", SETTINGS)
def test_autocast_changes_nothing(name):
    s, t, targets = draw(name, 4, 30, dtype=torch.float32)
    module = SETTINGS[name].module
    expected = gradients(module(s, t, 4.0, targets), s)
    for dtype, context in itertools.product((torch.bfloat16, torch.float16), (mock.MagicMock(), fast_path_off())):
        with torch.autocast("cpu", dtype=dtype), context:
            loss = module(s, t, 4.0, targets)
        assert_close(gradients(loss, s), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_compiles_without_graph_break(name):
    s, t, targets = draw(name, 4, 30, dtype=torch.float32)
    temperature = torch.tensor(3.0, requires_grad=True)
    torch._dynamo.reset()  # the losses share one forward, and with it the limit of its graphs
    compiled: Any = torch.compile(SETTINGS[name].module, backend="aot_eager", fullgraph=True)
    got = gradients(compiled(s, t, temperature, targets), s, temperature)
    expected = gradients(SETTINGS[name].module(s, t, temperature, targets), s, temperature)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


# ---- the module ----


@pytest.mark.parametrize("name", SETTINGS)
def test_is_its_function(name):
    module = SETTINGS[name].module
    s, t, targets = draw(name, 4, 6)
    options = {option: getattr(module, option) for option in module.options}
    assert_close(type(module).function(s, t, 2.0, targets=targets, **options), module(s, t, 2.0, targets))
    per_row = type(module).function(s, t, 2.0, targets=targets, reduction="none", **options)
    assert_close(module(s, t, 2.0, targets, reduction="none"), per_row)
    shared = ("scale", "class_dim", "ignore_index", "reduction")
    defaults: dict[str, Any] = {
        parameter.name: parameter.default
        for function in (row_loss.row_loss, type(module).function)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name in (*shared, *module.options)
    } | {"scale": SETTINGS[name].own_scale}
    assert set(defaults) == {*shared, *module.options}
    fresh = built(name)
    explicit = {option: defaults[option] for option in shared}
    assert_close(type(module).function(s, t, 2.0, targets=targets, **explicit, **options), module(s, t, 2.0, targets))
    values = {option: getattr(fresh, option) for option in defaults if defaults[option] is not inspect.Parameter.empty}
    assert values == {option: defaults[option] for option in values}
    assert type(module).function.__name__ in functional.__all__


@pytest.mark.parametrize("name", SETTINGS)
def test_a_mistyped_option_is_named(name):
    module: Any = SETTINGS[name].module
    s, t, targets = draw(name, 4, 6)
    own = {option: getattr(module, option) for option in module.options}
    with pytest.raises(TypeError, match="reductoin"):
        type(module).function(s, t, 2.0, targets=targets, **own, reductoin="sum")
    with pytest.raises(TypeError, match="reductoin"):
        built(name, reductoin="sum")


@pytest.mark.parametrize("name", SETTINGS)
def test_options_from_yaml(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--kd_loss", type=LogitLoss)
    kind = type(SETTINGS[name].module)
    own = {option: getattr(SETTINGS[name].module, option) for option in kind.options}
    given = {**own, "scale": "student", "class_dim": 1, "ignore_index": None, "reduction": "sum"}
    path = f"{kind.__module__}.{kind.__name__}"
    parsed = parser.parse_object({"kd_loss": {"class_path": path, "init_args": given}})
    built = parser.instantiate(parsed).kd_loss
    assert type(built) is kind
    assert {option: getattr(built, option) for option in given} == given
    for wrong in ({"reductoin": "sum"}, {"scale": "T²"}, {"class_dim": "last"}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            parser.parse_object({"kd_loss": {"class_path": path, "init_args": wrong}})


@pytest.mark.parametrize("name", SETTINGS)
def test_travels(name):
    module = SETTINGS[name].module
    s, t, targets = draw(name, 4, 6)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_close(twin(s, t, 2.0, targets), module(s, t, 2.0, targets))
    assert not module.state_dict()


@pytest.mark.parametrize("name", SETTINGS)
def test_repr_shows_what_was_set(name):
    module = built(name, class_dim=1, ignore_index=255, reduction="sum", scale="student")
    text = repr(module)
    assert text.startswith(f"{type(module).__name__}(")
    for shown in ("scale='student'", "class_dim=1", "ignore_index=255", "reduction='sum'"):
        assert shown in text


@pytest.mark.parametrize("name", SETTINGS)
def test_errors(name):
    setting = SETTINGS[name]
    with pytest.raises(ValueError, match="scale must be one of"):
        built(name, scale="T²")
    with pytest.raises(ValueError, match="reduction must be one of"):
        built(name, reduction="batchmean")
    s, t, targets = draw(name, 4, 6)
    with pytest.raises(ValueError, match="must be a positive, finite number"):
        setting.module(s, t, 0.0, targets)
    with pytest.raises(ValueError, match="same shape"):
        setting.module(s, t[:2], 2.0, targets)
    with pytest.raises(ValueError, match="num_items must be positive"):
        setting.module(s, t, 2.0, targets, num_items=0)
    with pytest.raises(ValueError, match="num_items"):
        built(name, reduction="sum")(s, t, 2.0, targets, num_items=4)
    fewer = setting.min_classes - 1
    if fewer:
        labels = torch.zeros(4, dtype=torch.long)
        with pytest.raises(ValueError, match="at least"):
            setting.module(torch.zeros(4, fewer), torch.zeros(4, fewer), 2.0, labels)
    if setting.needs_targets:
        with pytest.raises(ValueError, match="it needs targets that are class indices, got none"):
            setting.module(s, t, 2.0)
