from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from kd_lightning.metrics import ClassificationMetrics, TopKAccuracy


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


def test_nothing_that_counts_is_zero() -> None:
    metric = TopKAccuracy()
    metric.update(torch.randn(3, 4), torch.full((3,), -100))
    assert metric.compute() == 0


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
