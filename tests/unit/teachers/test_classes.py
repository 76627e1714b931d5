"""A teacher whose classes are not the student's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_lightning import DistillationModule, Distiller, FrozenTeacher, TeacherCache, TeacherEnsemble
from kd_lightning.callbacks import DistillationCallback
from kd_lightning.teachers import FunctionTeacher, MappedClasses
from kd_lightning.temperature import ClassFrequencyTemperature
from tests.helpers import LearnedTemperature, make_data, make_loader, make_network

GROUPS: list[list[int]] = [[3, 4], [17], [0, 1, 9]]


def identity(x: Tensor) -> Tensor:
    return x


def merged(logits: Tensor, groups: list[list[int]], t: Tensor) -> Tensor:
    """Probabilities of the groups at T: sums over the named classes' softmax."""
    named = [number for group in groups for number in group]
    p = torch.zeros_like(logits).index_copy(1, torch.tensor(named), (logits[:, named] / t).softmax(1))
    return torch.stack([p[:, group].sum(1) for group in groups], 1)


@pytest.mark.parametrize("t", [1.0, 4.0])
def test_probabilities_add_at_the_teacher_s_temperature(t: float) -> None:
    logits = 3 * torch.randn(6, 20, dtype=torch.float64)
    student = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    teacher = MappedClasses(FunctionTeacher(identity), GROUPS)
    out = Distiller(teacher, temperature=t, task_weight=0.0, kd_weight=1.0)(logits, student)
    (gradient,) = torch.autograd.grad(out.loss, student)
    p, q = merged(logits, GROUPS, torch.tensor(t)), (student.detach() / t).softmax(1)
    torch.testing.assert_close(out.loss, t**2 * (p * (p.log() - q.log())).sum(1).mean())
    torch.testing.assert_close(gradient, t * (q - p) / 6)
    torch.testing.assert_close(out.teacher_logits.softmax(1), merged(logits, GROUPS, torch.tensor(1.0)))


def test_picked_classes_are_those_columns_before_the_softmax() -> None:
    logits, student = torch.randn(6, 20), torch.randn(6, 3, requires_grad=True)
    picks = [3, 17, 5]
    one = Distiller(MappedClasses(FunctionTeacher(identity), picks), task_weight=0.0)(logits, student)
    two = Distiller(None, task_weight=0.0)(None, student, teacher_logits=logits[:, picks])
    torch.testing.assert_close(one.loss, two.loss)
    torch.testing.assert_close(one.teacher_logits, logits[:, picks])


def test_the_gradient_of_a_learned_temperature() -> None:
    logits, student = torch.randn(6, 20, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    policy = LearnedTemperature()
    Distiller(MappedClasses(FunctionTeacher(identity), GROUPS), policy, task_weight=0.0, kd_weight=1.0)(
        logits, student
    ).loss.backward()
    raw = torch.zeros(1, requires_grad=True)
    t = 1 + 8 * torch.sigmoid(raw)
    p, q = merged(logits, GROUPS, t), (student / t).log_softmax(1)
    (t**2 * (p * (p.log() - q)).sum(1).mean()).backward()
    torch.testing.assert_close(policy.raw.grad, raw.grad)


def test_names_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    content: dict[str, Any] = {
        "teacher": ["tabby", "beagle", "siamese"],
        "student": {"dog": "beagle", "cat": ["tabby", "siamese"]},
    }
    path.write_text(json.dumps(content))
    assert MappedClasses(FunctionTeacher(identity), path).groups == [[1], [0, 2]]
    content["student"]["cat"] = ["taby"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"makes the class 'cat' of 'taby', .* Close to it: tabby\."):
        MappedClasses(FunctionTeacher(identity), path)


@pytest.fixture
def wide(teacher: nn.Module) -> nn.Module:
    """The trained teacher with four classes more than the student, in another order."""
    last = teacher[-1]  # pyright: ignore[reportIndexIssue]
    assert isinstance(last, nn.Linear)
    head = nn.Linear(last.in_features, 10)
    with torch.no_grad():
        head.weight[4:], head.bias[4:] = last.weight.flip(0), last.bias.flip(0)
    return nn.Sequential(*list(teacher.children())[:-1], head).requires_grad_(False).eval()


PICKS = [9, 8, 7, 6, 5, 4]


def fit(module: DistillationModule, trainer: Trainer, loader: Any) -> dict[str, float]:
    trainer.fit(module, loader, make_loader(32, seed=1))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_in_a_module_with_and_without_a_cache(
    wide: nn.Module,
    teacher: nn.Module,
    make_module: Callable[..., DistillationModule],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    expected = fit(make_module(teacher=teacher), make_trainer(), make_loader())
    mapped = MappedClasses(FrozenTeacher(wide), PICKS)
    assert fit(make_module(teacher=mapped), make_trainer(), make_loader()) == pytest.approx(expected, rel=1e-4)
    cache = TeacherCache(tmp_path / "teacher.cache", dtype="float32")
    cached = MappedClasses(FrozenTeacher(wide, cache=cache), PICKS)
    loader = DataLoader(cached.index(make_data()), 16)
    assert fit(make_module(teacher=cached), make_trainer(), loader) == pytest.approx(expected, rel=1e-4)
    other = MappedClasses(FrozenTeacher(wide), PICKS[::-1])
    assert other.fingerprint() != mapped.fingerprint() == cached.fingerprint()


def test_in_an_ensemble_with_a_teacher_of_the_student_s_classes(wide: nn.Module, teacher: nn.Module) -> None:
    inputs, targets = make_data(16).tensors
    student = make_network()(inputs)
    ensemble = TeacherEnsemble([MappedClasses(wide, PICKS), teacher])
    one = Distiller(ensemble, temperature=3.0)(inputs, student, targets).loss
    torch.testing.assert_close(one, Distiller(teacher, temperature=3.0)(inputs, student, targets).loss)


def test_in_a_callback(wide: nn.Module, make_trainer: Callable[..., Trainer]) -> None:
    from lightning.pytorch import LightningModule

    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_network(num_classes=2)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[0]).logsumexp(1).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    callback = DistillationCallback(
        MappedClasses(wide, [[4, 5, 6], [7, 8, 9]]), student_layer="net", targets=lambda batch: batch[1] // 3
    )
    trainer = make_trainer(callbacks=[callback])
    trainer.fit(Plain(), make_loader())
    assert 0 < float(trainer.callback_metrics["train_kd_loss"]) < 10


def test_a_temperature_for_each_class() -> None:
    logits, student = torch.randn(6, 20), torch.randn(6, 3)
    policy = ClassFrequencyTemperature(class_counts=[100, 10, 1])
    out = Distiller(MappedClasses(FunctionTeacher(identity), GROUPS), policy, task_weight=0.0)(logits, student)
    t = out.temperatures[0].teacher
    assert t.shape == (1, 3)
    z = torch.stack([(logits[:, group] / t[:, [c]]).logsumexp(1) * t[0, c] for c, group in enumerate(GROUPS)], 1)
    other = Distiller(None, policy, task_weight=0.0)(None, student, teacher_logits=z)
    torch.testing.assert_close(out.loss, other.loss)
