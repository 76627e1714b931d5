from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from kd_lightning.losses import BernoulliKDLoss
from kd_lightning.metrics import (
    CalibrationError,
    ClassificationMetrics,
    TopKAccuracy,
    agreement,
    task_loss_among,
    task_of,
)


@pytest.mark.parametrize("top_k", [1, 5])
@pytest.mark.parametrize("shape", [(32,), (4, 7), (2, 3, 5)])
def test_accuracy_equals_torchmetrics(top_k: int, shape: tuple[int, ...]) -> None:
    logits, targets = torch.randn(*shape, 9), torch.randint(0, 9, shape)
    targets.view(-1)[::4] = -100
    metric = TopKAccuracy(top_k)
    for part in range(2):  # in two batches
        metric.update(logits[part::2], targets[part::2])
    expected = multiclass_accuracy(
        logits.reshape(-1, 9), targets.flatten(), 9, average="micro", top_k=top_k, ignore_index=-100
    )
    torch.testing.assert_close(metric.compute(), expected)


def test_nothing_that_counts_is_no_number() -> None:
    for metric in (TopKAccuracy(), CalibrationError()):
        metric.update(torch.randn(3, 4), torch.full((3,), -100))
        assert metric.compute().isnan()


@pytest.mark.parametrize("shape", [(64,), (4, 7)])
def test_calibration_error_equals_torchmetrics(shape: tuple[int, ...]) -> None:
    logits, targets = 3 * torch.randn(*shape, 9), torch.randint(0, 9, shape)
    targets.view(-1)[::4] = -100
    metric = CalibrationError()
    for part in range(2):
        metric.update(logits[part::2], targets[part::2])
    expected = multiclass_calibration_error(
        logits.reshape(-1, 9).softmax(-1), targets.flatten(), 9, n_bins=15, ignore_index=-100
    )
    torch.testing.assert_close(metric.compute(), expected)
    assert metric.total.shape == (15,)  # bins, however many samples


@pytest.mark.parametrize(
    ("loss", "logits", "targets", "task"),
    [
        (None, torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), "classes"),
        (None, torch.zeros(4, 3), torch.full((4, 3), 1 / 3), "classes"),
        (None, torch.zeros(2, 3), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), "labels"),
        (None, torch.zeros(2, 3), torch.tensor([[1, 1, 0], [0, 0, 1]]), "labels"),
        (None, torch.zeros(2, 3), torch.tensor([[0.3, 1.7, -2.0], [1.0, 0.0, 3.0]]), None),
        (None, torch.zeros(4, 1), torch.tensor([0.0, 1.0, 1.0, 0.0]), "labels"),
        (None, torch.zeros(4, 1), torch.tensor([0, 1, 1, 0]), "labels"),
        (None, torch.zeros(4, 1), torch.tensor([[0.5], [2.0], [3.0], [1.0]]), None),
        (None, torch.zeros(4, 3), torch.zeros(4), None),
        (nn.BCEWithLogitsLoss(), torch.zeros(2, 3), torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), "labels"),
        (nn.CrossEntropyLoss(), torch.zeros(2, 3), torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), "classes"),
        (nn.MSELoss(), torch.zeros(2, 3), torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), None),
        (nn.MSELoss(), torch.zeros(2, 1), torch.tensor([[1.0], [0.0]]), None),
    ],
)
def test_task(loss: nn.Module | None, logits: Tensor, targets: Tensor, task: str | None) -> None:
    assert task_of(loss, logits, targets) == task


def test_labels() -> None:
    """Six labels, one of them without a value: four right, and four on which student and teacher agree."""
    logits = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 1.0, 4.0]])
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, -100.0]])
    teacher = torch.tensor([[1.0, -2.0, -0.5], [-1.0, 3.0, -4.0]])
    metrics = ClassificationMetrics(3, -100, with_teacher=True, evaluation=True, task="labels")
    metrics.observe(logits, targets, teacher)
    values = {name: metric.compute().item() for name, metric in metrics.items()}  # pyright: ignore
    assert set(values) == {"acc", "calibration_error", "agreement", "teacher_acc"}
    assert values["acc"] == pytest.approx(4 / 5)
    assert values["agreement"] == pytest.approx(4 / 5)
    assert values["teacher_acc"] == pytest.approx(1.0)
    assert agreement(logits, teacher, (logits > 0).float()) == (4, 6)
    assert agreement(logits, teacher, targets, nn.BCEWithLogitsLoss()) == (4, 5)
    assert agreement(logits, teacher, torch.tensor([[0.3, 2.0, 1.0], [0.1, 5.0, -1.0]])) is None
    assert agreement(logits[:, :1], -logits[:, :1]) == (0, 2)
    assert agreement(logits, teacher, torch.tensor([0, -100])) == (1, 1)
    assert agreement(logits, teacher, torch.tensor([False, True])) == (0, 1)


def test_labels_of_which_each_row_has_one_are_told_by_the_loss() -> None:
    logits, teacher = torch.tensor([[2.0, 1.0, 0.5]]), torch.tensor([[3.0, -1.0, -0.5]])
    targets = torch.tensor([[1.0, 0.0, 0.0]])
    assert agreement(logits, teacher, targets) == (1, 1)
    assert agreement(logits, teacher, targets, nn.BCEWithLogitsLoss()) == (1, 3)
    assert agreement(logits, teacher, targets, BernoulliKDLoss()) == (1, 3)
    losses = [nn.Linear(1, 1), nn.BCEWithLogitsLoss(), BernoulliKDLoss()]
    assert task_loss_among(losses) is losses[1]
    assert task_loss_among([*losses, nn.MSELoss()]) is None


def test_collection() -> None:
    logits, teacher, targets = torch.randn(40, 8), torch.randn(40, 8), torch.randint(0, 8, (40,))
    metrics = ClassificationMetrics(8, ignore_index=-100, with_teacher=True, evaluation=True)
    metrics.observe(logits, targets, teacher)
    values = {name: metric.compute() for name, metric in metrics.items()}  # pyright: ignore
    assert set(values) == {"acc", "acc_top5", "calibration_error", "agreement", "teacher_acc"}
    expected = multiclass_calibration_error(logits.softmax(-1), targets, 8, n_bins=15)
    torch.testing.assert_close(values["calibration_error"], expected)
    torch.testing.assert_close(values["agreement"], (logits.argmax(-1) == teacher.argmax(-1)).float().mean())
    torch.testing.assert_close(values["teacher_acc"], (teacher.argmax(-1) == targets).float().mean())


def test_soft_targets_count_by_their_largest() -> None:
    metrics = ClassificationMetrics(4, ignore_index=-100, with_teacher=False, evaluation=False)
    metrics.observe(torch.eye(4), torch.eye(4).flip(0) * 0.7 + 0.1)
    assert metrics["acc"].compute() == 0  # pyright: ignore
    assert "acc_top5" not in metrics
