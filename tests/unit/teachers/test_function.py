"""Any callable as a teacher, and the temperature at which its outputs were made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_lightning import DistillationModule, Distiller, FrozenTeacher, TeacherCache, TeacherEnsemble
from kd_lightning.callbacks import DistillationCallback
from kd_lightning.teachers import FunctionTeacher
from kd_lightning.teachers.made_at import Output
from tests.helpers import make_data, make_loader, make_network


def made_at(logits: Tensor, output: Output, temperature: float) -> Tensor:
    """Return the answer of a server that softens by ``temperature``."""
    scaled = logits / temperature
    return {"logits": scaled, "log_probs": scaled.log_softmax(-1), "probs": scaled.softmax(-1)}[output]


@pytest.mark.parametrize("output", ["logits", "log_probs", "probs"])
@pytest.mark.parametrize("t0", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("t", [1.0, 4.0])
def test_values_and_gradients(output: Output, t0: float, t: float) -> None:
    student = (2 * torch.randn(7, 5, dtype=torch.float64)).requires_grad_()
    logits = 2 * torch.randn(7, 5, dtype=torch.float64)
    teacher = FunctionTeacher(lambda x: made_at(x, output, t0), output, t0)

    loss = Distiller(teacher, temperature=t, task_weight=0.0, kd_weight=1.0)(logits, student).loss
    (gradient,) = torch.autograd.grad(loss, student)

    p, q = (logits / t).softmax(1), (student.detach() / t).softmax(1)  # the teacher at the Distiller's temperature
    torch.testing.assert_close(loss, t**2 * (p * (p.log() - q.log())).sum(1).mean())
    torch.testing.assert_close(gradient, t * (q - p) / 7)


def test_a_probability_of_zero_stays_zero() -> None:
    student = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    teacher = FunctionTeacher(lambda x: x, output="probs", temperature=2.0)
    probs = torch.tensor([[0.75, 0.25, 0.0]], dtype=torch.float64)
    loss = Distiller(teacher, temperature=4.0, task_weight=0.0, kd_weight=1.0)(probs, student).loss
    (gradient,) = torch.autograd.grad(loss, student)
    p, q = probs.sqrt() / probs.sqrt().sum(), (student.detach() / 4).softmax(1)  # p ** (2 / 4)
    torch.testing.assert_close(loss, 16 * torch.special.xlogy(p, p / q).sum())
    torch.testing.assert_close(gradient, 4 * (q - p))


@pytest.mark.parametrize("output", ["log_probs", "probs"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_probabilities_are_accepted(output: Output, dtype: torch.dtype) -> None:
    logits = torch.randn(64, 1000)
    teacher = FunctionTeacher(lambda x: made_at(x, output, 2.0).to(dtype), output, 2.0)
    assert teacher.logits(logits).dtype == torch.float32


def test_numpy_outputs_mappings_and_no_gradient() -> None:
    def fn(x: Tensor, scale: float) -> Any:
        return x.detach().numpy() * scale

    logits = FunctionTeacher(fn).logits({"x": torch.ones(2, 3, requires_grad=True), "scale": 2.0})
    assert torch.equal(logits, torch.full((2, 3), 2.0))
    assert isinstance(FunctionTeacher(fn)({"x": torch.ones(1), "scale": 1.0}), np.ndarray)
    weight = torch.ones(3, requires_grad=True)
    assert not FunctionTeacher(lambda x: x * weight).logits(torch.ones(2, 3)).requires_grad


def test_fingerprint_is_the_declared_name_and_how_outputs_were_made() -> None:
    def fingerprint(**options: Any) -> str:
        options.setdefault("name", "v1")
        return FunctionTeacher(lambda x: x, **options).fingerprint()

    others = [fingerprint(name="v2"), fingerprint(output="probs"), fingerprint(temperature=2.0)]
    assert fingerprint() == fingerprint()
    assert len({fingerprint(), *others}) == 4


@pytest.fixture
def served(teacher: nn.Module) -> FunctionTeacher:
    """The trained teacher behind an interface that gives log-probabilities at temperature 2."""
    network = teacher.eval()
    return FunctionTeacher(lambda x: (network(x) / 2).log_softmax(-1), "log_probs", 2.0, name="served v1")


def losses_of(module: DistillationModule, trainer: Trainer, loader: Any) -> dict[str, float]:
    trainer.fit(module, loader, make_loader(32, seed=1))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_in_a_module_it_is_the_network(
    served: FunctionTeacher,
    teacher: nn.Module,
    make_module: Callable[..., DistillationModule],
    make_trainer: Callable[..., Trainer],
) -> None:
    one = losses_of(make_module(teacher=served), make_trainer(), make_loader())
    two = losses_of(make_module(teacher=teacher), make_trainer(), make_loader())
    assert one == pytest.approx(two, rel=1e-4)


def test_in_an_ensemble(served: FunctionTeacher, teacher: nn.Module) -> None:
    inputs, targets = make_data(16).tensors
    student = make_network()(inputs)
    one = Distiller(TeacherEnsemble([served, teacher]), temperature=3.0)(inputs, student, targets).loss
    two = Distiller(FrozenTeacher(teacher), temperature=3.0)(inputs, student, targets).loss
    torch.testing.assert_close(one, two)


def test_with_a_cache(
    served: FunctionTeacher,
    make_module: Callable[..., DistillationModule],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    calls: list[int] = []

    def counted(x: Tensor) -> Tensor:
        calls.append(len(x))
        return served.fn(x)

    def fit() -> dict[str, float]:
        cache = TeacherCache(tmp_path / "teacher.cache", dtype="float32")
        teacher = FunctionTeacher(counted, "log_probs", 2.0, name="served v1", cache=cache)
        loader = DataLoader(teacher.index(make_data()), batch_size=16)
        trainer = make_trainer(max_epochs=2)
        trainer.fit(make_module(teacher=teacher), loader)
        return {name: float(value) for name, value in trainer.callback_metrics.items()}

    cold, first = fit(), len(calls)
    assert first == 5  # four batches, and one compared with what is stored
    assert fit() == cold
    assert len(calls) == first + 1
    with pytest.raises(ValueError, match="teacher"):
        FunctionTeacher(counted, name="v2", cache=TeacherCache(tmp_path / "teacher.cache", dtype="float32")).index(
            make_data()
        )


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_in_a_callback(served: FunctionTeacher, teacher: nn.Module, make_trainer: Callable[..., Trainer]) -> None:
    def fit(of: Any) -> float:
        torch.manual_seed(3)
        trainer = make_trainer(callbacks=[DistillationCallback(of)])
        trainer.fit(Plain(), make_loader())
        return float(trainer.callback_metrics["train_kd_loss"])

    assert fit(served) == pytest.approx(fit(teacher), rel=1e-4)
