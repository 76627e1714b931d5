"""A cache of the k largest log-probabilities of each token."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule, Distiller, FrozenTeacher
from kd_lightning.functional import Sparse, kd_loss
from kd_lightning.models import CausalTransformer
from kd_lightning.teachers import FunctionTeacher, TeacherCache, TeacherEnsemble
from tests.helpers import assert_same

VOCABULARY, LENGTH, COUNT = 1200, 5, 12
pytestmark = pytest.mark.filterwarnings("ignore:top_k=")


def cache_of(path: Path, **options: Any) -> TeacherCache:
    cache = TeacherCache(path / "teacher.cache", **options)
    cache.index(TensorDataset(torch.arange(COUNT)), "teacher")
    return cache


def logits_of(classes: int = VOCABULARY) -> Tensor:
    return torch.randn(COUNT, LENGTH, classes) * 4


@pytest.mark.parametrize(("classes", "numbers", "dtype"), [(VOCABULARY, 2, torch.uint16), (70_000, 4, torch.uint32)])
def test_a_token_takes_few_bytes(tmp_path: Path, classes: int, numbers: int, dtype: torch.dtype) -> None:
    cache, logits = cache_of(tmp_path, top_k=16), logits_of(classes)
    found = cache.logits(torch.arange(COUNT), lambda: logits)
    assert cache.path.stat().st_size == 4096 + COUNT * (LENGTH * (17 * 2 + 16 * numbers) + 5)
    assert found.indices.dtype == dtype
    assert (found.tail, found.temperature) == ("bucket", 1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_targets_are_the_top_k_rounded(tmp_path: Path, dtype: Any) -> None:
    cache, logits = cache_of(tmp_path, top_k=20, dtype=dtype), logits_of()
    cold = cache.logits(torch.arange(COUNT), lambda: logits)
    warm = cache.logits(torch.tensor([3]), lambda: logits[3:4])  # one row of an odd number of bytes
    assert torch.equal(warm.log_probs, cold.log_probs[3:4])
    exact = Sparse.top_k(logits, 20)
    assert torch.equal(cold.indices.long(), exact.indices)
    precision = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-6}[dtype]
    torch.testing.assert_close(cold.log_probs, exact.log_probs, rtol=precision, atol=precision)
    total = torch.cat([cold.log_probs, cold.log_rest], -1).logsumexp(-1)
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-5)


@pytest.mark.parametrize("t", [1.0, 2.0, 4.0])
def test_the_loss_is_that_of_the_rest_as_one_class(tmp_path: Path, t: float) -> None:
    logits = logits_of()
    cache = cache_of(tmp_path, top_k=30, dtype="float32", temperature=t)
    target = cache.logits(torch.arange(COUNT), lambda: logits)
    student = torch.randn_like(logits).requires_grad_()
    exact = Sparse.top_k(logits, 30, t)
    found, expected = (torch.autograd.grad(kd_loss(student, x, t), student)[0] for x in (target, exact))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)
    with pytest.raises(ValueError, match=f"made at the teacher's temperature {t:g}"):
        kd_loss(student, target, t + 1)


def test_a_cache_is_of_one_temperature(tmp_path: Path) -> None:
    logits = logits_of()
    cache_of(tmp_path, top_k=8, temperature=2.0).logits(torch.arange(COUNT), lambda: logits)
    with pytest.raises(ValueError, match="top_k '8 at T = 2' in the file, 8 now"):
        cache_of(tmp_path, top_k=8)
    with pytest.raises(ValueError, match=r"temperature is that of the top_k of tokens.*got 2.0 with top_k=None"):
        TeacherCache(tmp_path, temperature=2.0)
    with pytest.raises(ValueError, match="positive and finite, got 0"):
        TeacherCache(tmp_path, top_k=3, temperature=0)
    (tmp_path / "other").mkdir()
    cache = cache_of(tmp_path / "other", top_k=8, temperature=2.0)
    with pytest.raises(ValueError, match="temperature=2 is for the top_k of tokens"):
        cache.logits(torch.arange(COUNT), lambda: logits[:, 0])


def test_another_batch_than_the_stored_is_found(tmp_path: Path) -> None:
    logits = logits_of()
    cache_of(tmp_path, top_k=8).logits(torch.arange(COUNT), lambda: logits)
    cache_of(tmp_path, top_k=8).logits(torch.arange(4), lambda: logits[:4] + 0.01 * torch.randn(4, LENGTH, VOCABULARY))
    changed = logits[:4].clone()
    changed[2] = torch.randn(LENGTH, VOCABULARY) * 4
    with pytest.raises(ValueError, match="row 2 is"):
        cache_of(tmp_path, top_k=8).logits(torch.arange(4), lambda: changed)


def test_logits_that_cannot_be_stored(tmp_path: Path) -> None:
    broken = logits_of()
    broken[1, 2, 3] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        cache_of(tmp_path, top_k=8).logits(torch.arange(COUNT), lambda: broken)
    with pytest.raises(ValueError, match="at least 1000 classes"):
        cache_of(tmp_path, top_k=8).logits(torch.arange(COUNT), lambda: broken[..., :999])
    with pytest.raises(ValueError, match=r"\(N, C\) or \(B, L, V\)"):
        cache_of(tmp_path, top_k=8).logits(torch.arange(COUNT), lambda: broken[:, None])
    with pytest.raises(TypeError, match="keeps logits, got Sparse"):
        cache_of(tmp_path).logits(torch.arange(COUNT), lambda: Sparse.top_k(logits_of(), 3))  # pyright: ignore


def test_the_warning_says_how_wrong_the_gradient_is(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"top_k=8 of 1200 classes: .* 0\.\d+ at T = 2\."):
        cache_of(tmp_path, top_k=8, temperature=2.0).logits(torch.arange(COUNT), lambda: logits_of())


def model(seed: int) -> CausalTransformer:
    torch.manual_seed(seed)
    network = CausalTransformer(VOCABULARY, dim=8, depth=1, heads=2, max_length=LENGTH)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # stands for training
    return network


def fit(trainer: Trainer, teacher: Any) -> tuple[DistillationModule, dict[str, float]]:
    module = DistillationModule(model(1), teacher, 2.0, shift_labels=True)
    tokens = torch.randint(VOCABULARY, (COUNT, LENGTH), generator=torch.Generator().manual_seed(0))
    data: Any = [{"input_ids": row, "labels": row} for row in tokens]
    train = teacher.index(data) if teacher.caches else data
    trainer.fit(module, DataLoader(train, batch_size=4), DataLoader(data, batch_size=4))
    return module, {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_training_from_the_cache(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    """A cold and a warm cache give the same bits; validation runs the teacher, and so measures all."""

    def cached() -> FrozenTeacher:
        return FrozenTeacher(model(2), cache=TeacherCache(tmp_path / "teacher.cache", top_k=64, temperature=2.0))

    cold, values = fit(make_trainer(), cached())
    warm, again = fit(make_trainer(), cached())
    assert_same(dict(cold.student.state_dict()), dict(warm.student.state_dict()))
    assert values == again
    assert "val_agreement" in values
    assert not {"train_agreement", "train_teacher_acc", "entropy_teacher"} & values.keys()

    network = model(2).eval()
    run, plain = fit(make_trainer(), FunctionTeacher(lambda **x: Sparse.top_k(network(**x), 64, 2.0)))
    assert values["train_kd_loss"] == pytest.approx(plain["train_kd_loss"], rel=1e-3)
    for name, value in run.student.state_dict().items():
        torch.testing.assert_close(cold.student.state_dict()[name], value, rtol=1e-2, atol=2e-3)


def test_an_ensemble_of_such_caches_is_refused(tmp_path: Path) -> None:
    teachers = [FrozenTeacher(model(n), cache=TeacherCache(tmp_path / f"{n}.cache", top_k=8)) for n in (1, 2)]
    ensemble, tokens = TeacherEnsemble(teachers), torch.zeros(2, LENGTH, dtype=torch.long)
    data = ensemble.index([{"input_ids": row} for row in tokens])
    batch, index = next(iter(DataLoader(data, batch_size=2, collate_fn=data.collate)))
    with pytest.raises(TypeError, match="mixes the logits of all classes, got Sparse"):
        Distiller(ensemble, 1.0, task_weight=0.0)(batch, torch.zeros(2, LENGTH, VOCABULARY), index=index)


# ---- targets that the teacher gives ------------------------------------------------------------------------------


def given(path: Path, function: Callable[..., Any], **options: Any) -> FunctionTeacher:
    options = {"dtype": "float32", "top_k": 5} | options
    return FunctionTeacher(function, name="few", cache=TeacherCache(path / "given.cache", **options))


@pytest.mark.parametrize("tail", ["bucket", "uniform", "renormalize", "drop"])
@pytest.mark.parametrize("shape", [(COUNT, LENGTH, 13), (COUNT, 13)])
def test_given_targets_come_back_as_they_are(tmp_path: Path, tail: Any, shape: tuple[int, ...]) -> None:
    """This holds for tokens and images, few classes and many, at a temperature of their own."""
    logits = torch.randn(shape) * 2
    exact = Sparse.top_k(logits, 5, 2.0, tail)
    numbers = exact.indices + 70_000  # more than two bytes hold
    calls = []

    def function(rows: Tensor) -> Sparse:
        calls.append(len(rows))
        return Sparse(numbers[rows], exact.log_probs[rows], 2.0, tail)

    data = [torch.tensor(row) for row in range(COUNT)]
    batch, found = torch.empty(0), None
    for run in range(2):
        teacher = given(tmp_path, function, temperature=2.0)
        loader = DataLoader(teacher.index(data), batch_size=4)  # pyright: ignore[reportArgumentType]
        for batch, index in loader:
            found = teacher.logits(batch, index)
            assert torch.equal(found.indices.long(), numbers[batch])
            torch.testing.assert_close(found.log_probs, exact.log_probs[batch])
            assert (found.tail, found.temperature) == (tail, 2.0)
        assert calls == [4, 4, 4] if run == 0 else [4, 4, 4, 4]  # the last to compare
    student = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert found is not None
    few = Sparse(found.indices.long() - 70_000, found.log_probs, 2.0, tail)
    losses = [kd_loss(student[batch], each, 2.0) for each in (few, Sparse.top_k(logits[batch], 5, 2.0, tail))]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-7)
    for loss in torch.autograd.grad(losses[0] - losses[1], student):
        assert loss.abs().max() < 1e-6


def test_given_targets_with_padding(tmp_path: Path) -> None:
    """Entries that name no class, and positions that name none, are stored too."""
    log_probs = torch.tensor([[[0.5, 0.25], [1.0, 0.0]], [[0.0, 0.0], [0.9, 0.1]]]).log()
    target = Sparse(torch.tensor([[[3, 1], [2, 0]], [[0, 0], [1, 2]]]), log_probs)
    teacher = given(tmp_path, lambda rows: Sparse(target.indices[rows], target.log_probs[rows]), top_k=2)
    teacher.index([0, 1])
    for _ in range(2):
        found: Any = teacher.logits(torch.arange(2), torch.arange(2))
        torch.testing.assert_close(found.log_probs, log_probs)


def test_other_targets_than_the_stored_are_found(tmp_path: Path) -> None:
    target = Sparse.top_k(torch.randn(COUNT, LENGTH, 13), 5)
    for indices in (target.indices, target.indices, target.indices.roll(1, 1)):
        cache = TeacherCache(tmp_path / "given.cache", "float32", top_k=5)
        cache.index(TensorDataset(torch.arange(COUNT)), "few")
        if indices is target.indices:
            cache.logits(torch.arange(COUNT), lambda: target)
        else:
            with pytest.raises(ValueError, match=r"does not have what the teacher says of this batch: row \d+ is"):
                cache.logits(torch.arange(COUNT), lambda: Sparse(target.indices.roll(1, 1), target.log_probs))


def test_given_targets_train_from_the_cache(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    network = model(2).eval()

    def cached() -> FunctionTeacher:
        return given(tmp_path, lambda **x: Sparse.top_k(network(**x), 64, 2.0), top_k=64, temperature=2.0)

    cold, _ = fit(make_trainer(), cached())
    warm, _ = fit(make_trainer(), cached())
    assert_same(dict(cold.student.state_dict()), dict(warm.student.state_dict()))
    plain, _ = fit(make_trainer(), FunctionTeacher(lambda **x: Sparse.top_k(network(**x), 64, 2.0)))
    for name, value in plain.student.state_dict().items():
        torch.testing.assert_close(cold.student.state_dict()[name], value, rtol=1e-2, atol=2e-3)  # of Adam
