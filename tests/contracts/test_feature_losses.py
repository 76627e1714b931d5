"""The contract of losses between features: an exported class without a setting here fails."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.testing import assert_close

from kd_lightning import functional, losses
from kd_lightning.functional import Temperature
from kd_lightning.losses import FeatureLoss, SoftFeatureLoss

Array = Any


# ---- independent formulas: numpy in float64, as the publications write them, sample by sample ----


def softmax(z: Array, t: float) -> Array:
    power = np.exp((z - z.max()) / t)
    return power / power.sum()


def kl(p: Array, q: Array) -> float:
    return float((p * np.log(p / q)).sum())


def soft(rows_s: list[Array], rows_t: list[Array], t_s: float, t_t: float) -> float:
    pairs = zip(rows_s, rows_t, strict=True)
    return float(np.mean([t_s * t_t * kl(softmax(b, t_t), softmax(a, t_s)) for a, b in pairs]))


def cosine(a: Array, b: Array) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def channels(x: Array) -> list[Array]:
    return [image[c].ravel() for image in x for c in range(x.shape[1])]


def attention(x: Array, power: float) -> list[Array]:
    return [np.mean([np.abs(channel.ravel()) ** power for channel in image], axis=0) for image in x]


def others(x: Array) -> list[Array]:
    return [np.array([cosine(x[i], x[j]) for j in range(len(x)) if j != i]) for i in range(len(x))]


def to_images(x: Array, views: int) -> list[Array]:
    n = len(x) // views
    return [np.array([cosine(x[i], x[j]) for j in range(n)]) for i in range(n, len(x))]


def hint(s: Array, t: Array, *_: float) -> float:
    return float(sum((a - b) ** 2 for a, b in zip(s.ravel(), t.ravel(), strict=True)) / s.size)


def attention_transfer(s: Array, t: Array, *_: float) -> float:
    pairs = zip(attention(s, 3.0), attention(t, 3.0), strict=True)
    parts = [(a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2 for a, b in pairs]
    return float(np.mean(parts))


def similarity_preserving(s: Array, t: Array, *_: float) -> float:
    def gram(x: Array) -> Array:
        g = np.array([[(a * b).sum() for b in x] for a in x])
        return g / np.sqrt((g**2).sum(axis=1, keepdims=True))

    return float(np.sum((gram(s) - gram(t)) ** 2) / len(s) ** 2)


def huber(z: float) -> float:
    return 0.5 * z * z if abs(z) <= 1 else abs(z) - 0.5


def relational(s: Array, t: Array, *_: float) -> float:
    n = len(s)

    def distances(x: Array) -> Array:
        d = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in x] for a in x])
        return d / d[d > 0].mean()

    def angle(x: Array, i: int, j: int, k: int) -> float:
        return 0.0 if i in (j, k) else cosine(x[j] - x[i], x[k] - x[i])

    d_s, d_t = distances(s), distances(t)
    of_pairs = sum(huber(d_s[i, j] - d_t[i, j]) for i, j in itertools.product(range(n), repeat=2)) / n**2
    triples = itertools.product(range(n), repeat=3)
    of_triples = sum(huber(angle(s, i, j, k) - angle(t, i, j, k)) for i, j, k in triples) / n**3
    return 0.7 * of_pairs + 3.0 * of_triples


def info_nce(s: Array, t: Array, t_s: float, t_t: float) -> float:
    rows = [np.array([cosine(a, b) for b in t]) for a in s]
    return float(-np.mean([np.log(softmax(row, t_s)[i]) for i, row in enumerate(rows)]))


@dataclass(frozen=True)
class Setting:
    """The construction of a loss, and its independent formula."""

    module: FeatureLoss
    function: str
    reference: Callable[..., float]
    """(s, t, T_s, T_t) → value."""
    teacher_shape: tuple[int, ...] = (6, 4, 3, 2)
    """Other than the student's (6, 4, 3, 2) as far as the loss allows."""
    vanishes: bool = True
    """Identical features cost exactly nothing."""
    one_is_free: bool = True
    """A batch of one costs exactly nothing."""
    vectors: bool = True


SETTINGS: dict[str, Setting] = {
    "HintLoss": Setting(losses.HintLoss(), "hint_loss", hint, one_is_free=False),
    "AttentionTransferLoss": Setting(
        losses.AttentionTransferLoss(power=3.0),
        "attention_transfer_loss",
        attention_transfer,
        (6, 5, 3, 2),
        one_is_free=False,
        vectors=False,
    ),
    "SimilarityPreservingLoss": Setting(
        losses.SimilarityPreservingLoss(), "similarity_preserving_loss", similarity_preserving, (6, 7)
    ),
    "RelationalLoss": Setting(
        losses.RelationalLoss(distance_weight=0.7, angle_weight=3.0), "relational_loss", relational, (6, 7)
    ),
    "ChannelWiseKDLoss": Setting(
        losses.ChannelWiseKDLoss(),
        "channel_wise_kd_loss",
        lambda s, t, t_s, t_t: soft(channels(s), channels(t), t_s, t_t),
        one_is_free=False,
        vectors=False,
    ),
    "AttentionKDLoss": Setting(
        losses.AttentionKDLoss(power=3.0),
        "attention_kd_loss",
        lambda s, t, t_s, t_t: soft(attention(s, 3.0), attention(t, 3.0), t_s, t_t),
        (6, 5, 3, 2),
        one_is_free=False,
        vectors=False,
    ),
    "SimilarityKDLoss": Setting(
        losses.SimilarityKDLoss(),
        "similarity_kd_loss",
        lambda s, t, t_s, t_t: soft(others(s), others(t), t_s, t_t),
        (6, 7),
    ),
    "InfoNCELoss": Setting(losses.InfoNCELoss(), "info_nce_loss", info_nce, vanishes=False),
}
SOFT = [name for name, setting in SETTINGS.items() if isinstance(setting.module, SoftFeatureLoss)]
T = Temperature(torch.tensor(0.8, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64))


def test_every_exported_loss_has_a_setting():
    exported = {name for name in losses.__all__ if issubclass(getattr(losses, name), FeatureLoss)}
    assert set(SETTINGS) == exported - {"FeatureLoss", "SoftFeatureLoss"}


def draw(name: str, dtype: torch.dtype = torch.float64, batch: int = 6) -> tuple[Tensor, Tensor]:
    shapes = (6, 4, 3, 2), SETTINGS[name].teacher_shape
    s, t = (torch.randn(batch, *shape[1:], dtype=torch.float64).to(dtype) for shape in shapes)
    return s.requires_grad_(), t


def loss_of(name: str, s: Tensor, t: Tensor, temperature: Any = T, module: FeatureLoss | None = None) -> Tensor:
    module = SETTINGS[name].module if module is None else module
    return module(s, t, temperature) if name in SOFT else module(s, t)


def numerical_gradient(name: str, s: Tensor, t: Tensor) -> Array:
    """Return the gradient of the independent formula, by central differences."""
    point, taught = s.detach().numpy().copy(), t.detach().numpy()
    gradient = np.zeros_like(point)
    for index in np.ndindex(point.shape):
        values = []
        for step in (1e-5, -1e-5):
            moved = point.copy()
            moved[index] += step
            values.append(SETTINGS[name].reference(moved, taught, 0.8, 1.3))
        gradient[index] = (values[0] - values[1]) / 2e-5
    return gradient


@pytest.mark.parametrize("name", SETTINGS)
def test_value_and_gradient_by_the_independent_formula(name):
    s, t = draw(name)
    loss = loss_of(name, s, t)
    assert loss.item() == pytest.approx(SETTINGS[name].reference(s.detach().numpy(), t.numpy(), 0.8, 1.3), rel=1e-9)
    (gradient,) = torch.autograd.grad(loss, s)
    np.testing.assert_allclose(gradient.numpy(), numerical_gradient(name, s, t), rtol=1e-5, atol=1e-8)
    assert gradient.abs().sum() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_gradcheck(name):
    s, t = draw(name, batch=4)
    temperatures = [T.student.clone().requires_grad_(), T.teacher.clone().requires_grad_()]

    def loss(s: Tensor, t: Tensor, t_s: Tensor, t_t: Tensor) -> Tensor:
        return loss_of(name, s, t, Temperature(t_s, t_t))

    assert torch.autograd.gradcheck(loss, (s, t.requires_grad_(), *temperatures), nondet_tol=1e-12)
    t.requires_grad_(False)  # the fast path
    assert torch.autograd.gradcheck(loss, (s, t, *temperatures), nondet_tol=1e-12)


def test_views_by_the_independent_formula():
    s, t = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    expected = soft(to_images(s.numpy(), 3), to_images(t.numpy(), 3), 0.5, 0.5)
    assert losses.SimilarityKDLoss(views=3)(s, t, 0.5).item() == pytest.approx(expected, rel=1e-10)
    with pytest.raises(ValueError, match="a batch of 9 is not made of 2 views"):
        losses.SimilarityKDLoss(views=2)(s, t, 0.5)


@pytest.mark.parametrize("name", ["HintLoss", "SimilarityPreservingLoss", "RelationalLoss", "SimilarityKDLoss"])
def test_vectors(name):
    s, t = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    expected = SETTINGS[name].reference(s.numpy(), t.numpy(), 0.8, 1.3)
    assert loss_of(name, s, t).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", [name for name in SETTINGS if not SETTINGS[name].vectors])
def test_tokens_and_volumes_are_maps(name):
    """Tokens have their channels last; a volume has three dimensions of positions."""
    s, t = torch.randn(3, 4, 2, 3, dtype=torch.float64), torch.randn(3, 4, 2, 3, dtype=torch.float64)
    tokens = loss_of(name, s.flatten(2).mT, t.flatten(2).mT)
    assert_close(tokens, loss_of(name, s, t))
    assert_close(loss_of(name, s.unsqueeze(2), t.unsqueeze(2)), tokens)
    with pytest.raises(ValueError, match="features must be maps"):
        loss_of(name, s.flatten(1), t.flatten(1))
    with pytest.raises(ValueError, match="have only one"):
        loss_of(name, s[..., :1, :1], t[..., :1, :1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in SETTINGS if SETTINGS[name].vanishes])
def test_identical_features_have_no_loss_and_no_gradient(name, dtype):
    s = (3 * torch.randn(6, 4, 3, 2)).to(dtype).requires_grad_()
    loss = loss_of(name, s, s.detach().clone(), 0.5)
    (gradient,) = torch.autograd.grad(loss, s)
    assert loss == 0
    assert gradient.eq(0).all()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_small_batch(name):
    for batch in (1, 2):
        s, t = draw(name, batch=batch)
        loss = loss_of(name, s, t)
        (gradient,) = torch.autograd.grad(loss, s)  # there is a graph: DDP expects every gradient
        assert loss.isfinite()
        assert gradient.isfinite().all()
        if SETTINGS[name].one_is_free and batch == 1:
            assert loss == 0
            assert gradient.abs().max() < 1e-15


@pytest.mark.parametrize("name", SETTINGS)
def test_dead_features(name):
    """A layer behind a ReLU that lets nothing through."""
    s, t = draw(name, torch.float32)
    for dead in (torch.zeros_like(s), torch.cat([torch.zeros_like(s[:2]), s[2:].detach()])):
        dead = dead.detach().requires_grad_()
        loss = loss_of(name, dead, t)
        (gradient,) = torch.autograd.grad(loss, dead)
        assert loss.isfinite()
        assert gradient.abs().max() < 1e3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SETTINGS)
def test_half_precision_and_autocast(name, dtype):
    s, t = draw(name, dtype)
    wide = s.detach().double().requires_grad_()
    expected = torch.autograd.grad(value := loss_of(name, wide, t.double()), wide)[0]
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            loss = loss_of(name, s, t)
        (gradient,) = torch.autograd.grad(loss, s)
        assert loss.dtype == torch.float32
        assert gradient.dtype == dtype
        assert_close(loss.double(), value.detach(), rtol=1e-5, atol=1e-7)
        rounding = (expected.to(dtype) - expected).norm()
        assert (gradient - expected).norm() <= 2 * rounding + 1e-5 * expected.norm()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_half_precision_teacher(name):
    s, t = draw(name, torch.float32)
    assert_close(loss_of(name, s, t.bfloat16()), loss_of(name, s, t.bfloat16().float()))


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_compiles_without_graph_break(name):
    s, t = draw(name, torch.float32)
    torch._dynamo.reset()
    compiled: Any = torch.compile(SETTINGS[name].module, backend="aot_eager", fullgraph=True)
    temperature = torch.tensor(0.9)
    got, expected = (loss_of(name, s, t, temperature, module) for module in (compiled, SETTINGS[name].module))
    assert_close(got, expected)
    assert_close(torch.autograd.grad(got, s), torch.autograd.grad(expected, s), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SOFT)
def test_temperature_of_each_row(name):
    s, t = draw(name)
    module = SETTINGS[name].module
    assert isinstance(module, SoftFeatureLoss)
    rows, _ = module.logits(s, t)
    per_row = torch.full((len(rows), 1), 0.7, dtype=torch.float64)
    assert_close(module(s, t, per_row), module(s, t, 0.7))
    with pytest.raises(ValueError, match="temperature"):
        module(s, t, 0.0)


@pytest.mark.parametrize("name", SETTINGS)
def test_is_its_function(name):
    setting = SETTINGS[name]
    assert setting.function in functional.__all__
    function = getattr(functional, setting.function)
    options = {
        key: getattr(setting.module, key)
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.kind == parameter.KEYWORD_ONLY and key != "mask"  # of the batch, no option
    }
    s, t = draw(name)
    assert_close(loss_of(name, s, t), function(s, t, *([T] if name in SOFT else []), **options))
    defaults = {key: inspect.signature(function).parameters[key].default for key in options}
    assert {key: getattr(type(setting.module)(), key) for key in options} == defaults


@pytest.mark.parametrize("name", SETTINGS)
def test_travels(name):
    module = SETTINGS[name].module
    s, t = draw(name)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_close(loss_of(name, s, t, module=twin), loss_of(name, s, t))
        assert repr(twin) == repr(module)
    assert not module.state_dict()


@pytest.mark.parametrize("name", SETTINGS)
def test_features_that_do_not_belong_together(name):
    s, t = draw(name)
    with pytest.raises(ValueError, match=r"same shape|same batch"):
        loss_of(name, s, t[:3])
    if SETTINGS[name].module.compares != "samples":
        with pytest.raises(ValueError, match="A LayerTerm joins them"):
            loss_of(name, s, t[..., :1] if t.shape[-1] > 1 else t)


def test_options_are_checked():
    with pytest.raises(ValueError, match="power must be 1 or more"):
        losses.AttentionKDLoss(power=0.5)
    with pytest.raises(ValueError, match="power must be 1 or more"):
        losses.AttentionTransferLoss(power=0.5)
    with pytest.raises(ValueError, match="views must be 1 or more"):
        losses.SimilarityKDLoss(views=0)
    with pytest.raises(ValueError, match="angle_weight must be finite and not negative"):
        losses.RelationalLoss(angle_weight=-1.0)
    with pytest.raises(ValueError, match="scale must be one of"):
        losses.ChannelWiseKDLoss(scale="T²")  # pyright: ignore[reportArgumentType]
