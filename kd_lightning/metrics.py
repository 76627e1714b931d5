"""How good the student is, and how close to its teacher: torchmetrics, built when the class count is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassCalibrationError
from typing_extensions import override

__all__ = ["ClassificationMetrics", "TopKAccuracy"]


class TopKAccuracy(Metric):
    r"""Share of positions whose target is among the k largest logits.

    Unlike torchmetrics' own it leaves ignored positions out without a host-device synchronisation, so that it can run
    in every training step.

    Args:
        top_k: How many classes are looked at.
        ignore_index: Target value of the positions that do not count; None counts all.

    Shapes: ``logits (…, C)``, ``targets (…)``.

    Example:
        >>> accuracy = TopKAccuracy()
        >>> accuracy(torch.tensor([[2.0, 1.0], [2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1, -100]))
        tensor(0.5000)
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, top_k: int = 1, ignore_index: int | None = -100) -> None:
        super().__init__()
        self.top_k = top_k
        self.ignore_index = ignore_index
        self.add_state("correct", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @override
    def update(self, logits: Tensor, targets: Tensor) -> None:
        best = logits.argmax(-1, keepdim=True) if self.top_k == 1 else logits.topk(self.top_k, dim=-1).indices
        hit = (best == targets.unsqueeze(-1)).any(-1)
        valid = torch.ones_like(hit) if self.ignore_index is None else targets != self.ignore_index
        self.correct += (hit & valid).sum()
        self.total += valid.sum()

    @override
    def compute(self) -> Tensor:
        return self.correct / self.total.clamp(min=1)


class ClassificationMetrics(nn.ModuleDict):
    """The metrics of one data loader.

    ``acc``; ``acc_top5`` with more than five classes; ``calibration_error`` (expected calibration error, 15 bins), in
    evaluation only, as it keeps every confidence; and with a teacher ``agreement`` (how often student and teacher
    predict the same class) and ``teacher_acc``.

    Args:
        num_classes: Width of the logits.
        ignore_index: Target value of the positions that do not count, in any of them.
        with_teacher: Whether teacher logits will come.
        calibration: Whether to measure the calibration error.
    """

    def __init__(self, num_classes: int, ignore_index: int, with_teacher: bool, calibration: bool) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self["acc"] = TopKAccuracy(1, ignore_index)
        if num_classes > 5:
            self["acc_top5"] = TopKAccuracy(5, ignore_index)
        if calibration:
            self["calibration_error"] = MulticlassCalibrationError(
                num_classes, n_bins=15, ignore_index=ignore_index, validate_args=False
            )
        if with_teacher:
            self["agreement"] = TopKAccuracy(1, ignore_index)
            self["teacher_acc"] = TopKAccuracy(1, ignore_index)

    def observe(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            logits: ``(…, C)``, class dimension last.
            targets: ``(…)`` class indices, or ``(…, C)`` class probabilities, whose largest counts.
            teacher_logits: As ``logits``.
        """
        logits = logits.detach()
        if targets.is_floating_point() and targets.shape == logits.shape:
            targets = targets.argmax(-1)
        for name, metric in self.items():
            assert isinstance(metric, Metric)
            if name == "calibration_error":
                metric.update(logits.float().softmax(-1).reshape(-1, logits.shape[-1]), targets.reshape(-1))
            elif name == "teacher_acc":
                if teacher_logits is not None:
                    metric.update(teacher_logits, targets)
            elif name == "agreement":
                if teacher_logits is not None:
                    predicted = teacher_logits.argmax(-1)
                    metric.update(logits, torch.where(targets == self.ignore_index, targets, predicted))
            else:
                metric.update(logits, targets)
