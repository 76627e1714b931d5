from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_lightning import Distiller, FrozenTeacher, LayerTerm, functional
from kd_lightning.losses import HintLoss, KDLoss
from kd_lightning.teachers import TeacherCache
from kd_lightning.temperature import (
    CosineSchedule,
    LinearSchedule,
    LogitStdTemperature,
    Progress,
    Signals,
    Temperature,
    TemperaturePolicy,
)

INPUTS = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
TARGETS = torch.tensor([0, 1, 2, 3, 4])


class TwoTemperatures(TemperaturePolicy):
    def compute(self, signals: Signals) -> list[Temperature]:
        return [Temperature(t, t) for t in (torch.tensor([2.0]), torch.tensor([5.0]))]


class Centred(TemperaturePolicy):
    def compute(self, signals: Signals) -> Temperature:
        per_class = torch.linspace(1, 3, signals.student_logits.shape[-1]).unsqueeze(0)
        return Temperature(per_class, per_class)

    def transform(self, logits: Tensor) -> Tensor:
        return logits - logits.mean(-1, keepdim=True)


def hinton(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    return F.kl_div(F.log_softmax(student / t, -1), F.softmax(teacher / t, -1), reduction="batchmean") * t * t


def test_loss_is_the_weighted_sum_of_independent_terms(teacher: nn.Module) -> None:
    distiller = Distiller(teacher, temperature=4.0, kd_weight=0.7, task_weight=0.3)
    logits = torch.randn(5, 6, requires_grad=True)
    out = distiller(INPUTS, logits, TARGETS)
    kd, task = hinton(logits, teacher(INPUTS), 4.0), F.cross_entropy(logits, TARGETS)
    torch.testing.assert_close(out.kd_loss, kd)
    torch.testing.assert_close(out.task_loss, task)
    torch.testing.assert_close(out.loss, 0.7 * kd + 0.3 * task)
    expected = torch.autograd.grad(0.7 * kd + 0.3 * task, logits)[0]
    torch.testing.assert_close(torch.autograd.grad(out.loss, logits)[0], expected)
    assert torch.equal(out.teacher_logits, teacher(INPUTS))
    torch.testing.assert_close(out.effective_kd_weight, torch.tensor(0.7 * 16))


def test_schedules_drive_temperature_and_weights(teacher: nn.Module) -> None:
    distiller = Distiller(teacher, CosineSchedule(8, 2), kd_weight=LinearSchedule(0, 1), task_weight=lambda p: 0.5)
    out = distiller(INPUTS, torch.randn(5, 6), TARGETS, Progress(step=5, max_steps=10))
    assert out.kd_weight == 0.5
    assert out.task_weight == 0.5
    assert isinstance(out.temperature, Temperature)
    torch.testing.assert_close(out.temperature.student, torch.tensor([5.0]))


def test_several_temperatures_give_one_term_each(teacher: nn.Module) -> None:
    logits = torch.randn(5, 6)
    out = Distiller(teacher, TwoTemperatures(), task_weight=0)(INPUTS, logits)
    expected = hinton(logits, teacher(INPUTS), 2.0) + hinton(logits, teacher(INPUTS), 5.0)
    torch.testing.assert_close(out.kd_loss, expected)
    torch.testing.assert_close(out.effective_kd_weight, torch.tensor(0.9 * (4 + 25) / 2))


def test_transform_is_applied_to_what_the_loss_sees(teacher: nn.Module) -> None:
    logits = torch.randn(5, 6)
    distiller = Distiller(teacher, Centred(), task_weight=0)
    torch.testing.assert_close(distiller(INPUTS, logits).kd_loss, distiller(INPUTS, logits + 7.0).kd_loss)


def test_dense_layout_reaches_policy_and_losses() -> None:
    class Dense(TemperaturePolicy):
        def compute(self, signals: Signals) -> Temperature:
            assert signals.student_logits.shape == (2, 5, 7, 4)  # class dimension last
            t = signals.teacher_logits.amax(-1, keepdim=True).abs() + 1
            return Temperature(t, t)

    student, teacher = torch.randn(2, 4, 5, 7), torch.randn(2, 4, 5, 7)
    targets = torch.randint(0, 4, (2, 5, 7))
    targets[0, :3] = 255
    distiller = Distiller(None, Dense(), kd_loss=KDLoss(class_dim=1, ignore_index=255))
    out = distiller(None, student, targets, teacher_logits=teacher)
    t = teacher.amax(1, keepdim=True).abs() + 1
    kl = F.kl_div(F.log_softmax(student / t, 1), F.log_softmax(teacher / t, 1), reduction="none", log_target=True)
    expected = ((kl * t * t).sum(1) * (targets != 255)).sum() / (targets != 255).sum()
    torch.testing.assert_close(out.kd_loss, expected)
    torch.testing.assert_close(out.task_loss, F.cross_entropy(student, targets, ignore_index=255))


def test_tokens(teacher: nn.Module) -> None:
    student, teacher_logits = torch.randn(2, 7, 5), torch.randn(2, 7, 5)
    targets = torch.randint(0, 5, (2, 7))
    targets[:, 4:] = -100
    out = Distiller(None, 2.0)(None, student, targets, teacher_logits=teacher_logits)
    torch.testing.assert_close(
        out.kd_loss, hinton(student[:, :4].flatten(0, 1), teacher_logits[:, :4].flatten(0, 1), 2)
    )
    torch.testing.assert_close(out.task_loss, F.cross_entropy(student[:, :4].flatten(0, 1), targets[:, :4].flatten()))


def test_a_padded_vocabulary_of_the_teacher_is_cut() -> None:
    student, teacher_logits = torch.randn(2, 7, 5), torch.randn(2, 7, 8)
    tokens = torch.zeros(2, 7, dtype=torch.long)
    distiller = Distiller(None, LogitStdTemperature(), task_weight=0)
    with pytest.warns(UserWarning, match="the last 3 of the teacher are cut"):
        out = distiller(tokens, student, teacher_logits=teacher_logits)
    expected = distiller(tokens, student, teacher_logits=teacher_logits[..., :5])
    assert torch.equal(out.loss, expected.loss)
    assert out.teacher_logits.shape == (2, 7, 5)


def test_samples_without_label_are_distilled_on_request(teacher: nn.Module) -> None:
    unlabelled = torch.full((5,), -100)
    logits = torch.randn(5, 6, requires_grad=True)
    out = Distiller(teacher, 4.0, kd_loss=KDLoss(ignore_index=None))(INPUTS, logits, unlabelled)
    torch.testing.assert_close(out.kd_loss, hinton(logits, teacher(INPUTS), 4.0))
    assert out.task_loss == 0
    out.loss.backward()
    assert torch.isfinite(logits.grad if logits.grad is not None else torch.tensor(torch.nan)).all()


def test_teacher_is_out_of_the_module_tree_yet_moves_along(teacher: nn.Module) -> None:
    distiller = Distiller(teacher, 4.0)
    assert list(distiller.state_dict()) == ["temperature.multiplier"]
    assert not list(distiller.parameters())
    assert all(part is not teacher for part in distiller.modules())
    distiller.to(torch.bfloat16)
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    assert distiller.temperature.multiplier.dtype == torch.float32


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
def test_copies_compute_the_same(clone: Callable[[Distiller], Distiller], teacher: nn.Module) -> None:
    distiller = Distiller(teacher, CosineSchedule(8, 2))
    logits = torch.randn(5, 6)
    progress = Progress(step=1, max_steps=3)
    assert torch.equal(
        clone(distiller)(INPUTS, logits, TARGETS, progress).loss, distiller(INPUTS, logits, TARGETS, progress).loss
    )


def test_two_lines_in_a_bare_loop_lower_the_loss(teacher: nn.Module) -> None:
    student = nn.Linear(8, 6)
    distiller = Distiller(teacher, temperature=4.0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        loss = distiller(INPUTS, student(INPUTS), TARGETS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), 1e6])
def test_bad_temperature_at_construction(temperature: float, teacher: nn.Module) -> None:
    with pytest.raises(ValueError, match="temperature must be a positive, finite number"):
        Distiller(teacher, temperature)


@pytest.mark.parametrize("temperature", ["4", None, True, torch.ones(2), CosineSchedule])
def test_wrong_kind_of_temperature(temperature: object, teacher: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"a schedule .* or a TemperaturePolicy, got"):
        Distiller(teacher, temperature)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_bad_weights(weight: float, teacher: nn.Module) -> None:
    with pytest.raises(ValueError, match="must be a finite number, not negative"):
        Distiller(teacher, kd_weight=weight)
    with pytest.raises(ValueError, match="kd_weight must be finite and not negative"):
        Distiller(teacher, kd_weight=lambda p: weight)(INPUTS, torch.zeros(5, 6), TARGETS)


def test_class_counts_that_differ(teacher: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"same shape, got \(5, 4\) and \(5, 6\)"):
        Distiller(teacher, 4.0)(INPUTS, torch.zeros(5, 4), TARGETS % 4)


def test_no_targets_needs_no_task_weight(teacher: nn.Module) -> None:
    logits = torch.zeros(5, 6)
    with pytest.raises(ValueError, match=r"task_weight is 0\.1 but the batch has no targets"):
        Distiller(teacher, 4.0)(INPUTS, logits)
    out = Distiller(teacher, 4.0, task_weight=0)(INPUTS, logits)
    assert out.loss == 0.9 * out.kd_loss


def test_no_teacher() -> None:
    with pytest.raises(ValueError, match="has no teacher"):
        Distiller(None)(INPUTS, torch.zeros(5, 6), TARGETS)


def test_a_schedule_without_an_end(teacher: nn.Module) -> None:
    with pytest.raises(ValueError, match="neither max_steps nor max_epochs"):
        Distiller(teacher, CosineSchedule(8, 2))(INPUTS, torch.zeros(5, 6), TARGETS)


def test_a_task_loss_that_is_there_already(teacher: nn.Module) -> None:
    logits = torch.randn(5, 6)
    distiller = Distiller(teacher, kd_weight=0.5, task_weight=2.0)
    own = logits.square().mean()
    for targets in (TARGETS, None):
        out = distiller(INPUTS, logits, targets, task_loss=own)
        assert out.task_loss is own
        torch.testing.assert_close(out.loss, 0.5 * out.kd_loss + 2.0 * own)


def test_layers_and_a_cache_do_not_go_together(teacher: nn.Module, tmp_path: Path) -> None:
    frozen = FrozenTeacher(teacher, cache=TeacherCache(tmp_path / "cache.kdl"))
    with pytest.raises(ValueError, match="a cache keeps its logits only"):
        Distiller(frozen, layers=[LayerTerm("0", "0", HintLoss())])


class TestSequencesWithoutLabels:
    """Without labels nothing may tell (B, C, L) from (B, L, C)."""

    LOGITS = torch.randn(2, 5, 7, requires_grad=True)

    def distil(self, inputs: Any, **options: Any) -> float:
        distiller = Distiller(None, 2.0, KDLoss(**options), task_weight=0.0)
        return distiller(inputs, self.LOGITS, teacher_logits=self.LOGITS.detach().flip(0)).loss.item()

    def test_inputs_that_do_not_tell(self) -> None:
        with pytest.raises(ValueError, match=r"\(2, 5, 7\) without labels fit .* class_dim=1 or class_dim=2"):
            self.distil(torch.randn(2, 3, 7))

    def test_what_tells(self) -> None:
        student, teacher = self.LOGITS.detach(), self.LOGITS.detach().flip(0)
        last = 0.9 * functional.kd_loss(student, teacher, 2.0).item()
        tokens, frames = torch.zeros(2, 5, dtype=torch.long), torch.randn(2, 5, 16)
        for inputs in (tokens, frames, {"input_ids": tokens}, (frames, torch.randn(2, 3))):
            assert self.distil(inputs) == pytest.approx(last)
        assert self.distil(torch.randn(2, 3, 7), class_dim=2) == pytest.approx(last)
        first = 0.9 * functional.kd_loss(student, teacher, 2.0, class_dim=1).item()
        assert self.distil(torch.randn(2, 3, 7), class_dim=1) == pytest.approx(first)
