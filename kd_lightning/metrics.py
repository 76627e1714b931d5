"""How good the student is, and how close to its teacher: torchmetrics, built when the class count is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassCalibrationError
from typing_extensions import override

__all__ = ["ClassificationMetrics", "Perplexity", "TopKAccuracy"]


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
        # not in place: after a `validate` these are inference tensors, which a `fit` must not write to
        self.correct = self.correct + (hit & valid).sum()
        self.total = self.total + valid.sum()

    @override
    def compute(self) -> Tensor:
        return self.correct / self.total.clamp(min=1)


class Perplexity(Metric):
    r"""Perplexity :math:`\exp\big(-\tfrac1n \sum_i \log \mathrm{softmax}(s_i)_{y_i}\big)` over the valid positions.

    Sum and count are what is kept and added over ranks: batches of any size, and ranks, give what one batch would. The
    logits are widened a few rows at a time, and the sum is compensated (Kahan), so that float32 will do for any number
    of tokens. NaN without a valid position.

    Args:
        ignore_index: Target value of the positions that do not count; None counts all.

    Shapes: ``logits (…, V)``, ``targets (…)``.

    Example:
        >>> perplexity = Perplexity()
        >>> perplexity(torch.zeros(2, 3, 50), torch.tensor([[4, 2, -100], [7, -100, -100]]))
        tensor(50.0000)
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    total: Tensor
    rest: Tensor
    count: Tensor

    def __init__(self, ignore_index: int | None = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        for name in ("total", "rest"):
            self.add_state(name, torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @override
    def update(self, logits: Tensor, targets: Tensor) -> None:
        rows = max(_CHUNK // logits.shape[-1], 1)
        for s, y in zip(logits.flatten(0, -2).split(rows), targets.flatten().split(rows), strict=True):
            valid = torch.ones_like(y, dtype=torch.bool) if self.ignore_index is None else y != self.ignore_index
            s = s.float()
            surprise = s.logsumexp(-1) - s.gather(-1, torch.where(valid, y, 0).unsqueeze(-1)).squeeze(-1)
            term = torch.where(valid, surprise, 0.0).sum() + self.rest
            total = self.total + term
            self.total, self.rest = total, term - (total - self.total)
            self.count = self.count + valid.sum()

    @override
    def compute(self) -> Tensor:
        return ((self.total + self.rest) / self.count).exp()


_CHUNK = 2**24
"""Logits that :class:`Perplexity` widens at a time: 64 MB."""


class ClassificationMetrics(nn.ModuleDict):
    """The metrics of one data loader.

    ``acc``; ``acc_top5`` with more than five classes; ``calibration_error`` (expected calibration error, 15 bins), in
    evaluation only, as it keeps every confidence; and with a teacher ``agreement`` (how often student and teacher
    predict the same class) and ``teacher_acc``.

    For tokens ``perplexity`` and ``teacher_perplexity`` take the place of the calibration error, which would keep a
    number for every token; and the two, like ``acc_top5``, are for evaluation, as each is a pass over a vocabulary.

    Args:
        num_classes: Width of the logits.
        ignore_index: Target value of the positions that do not count, in any of them.
        with_teacher: Whether teacher logits will come.
        evaluation: Whether to measure what is for evaluation only.
        tokens: Whether the logits are a language model's.
    """

    def __init__(
        self, num_classes: int, ignore_index: int, with_teacher: bool, evaluation: bool, tokens: bool = False
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self["acc"] = TopKAccuracy(1, ignore_index)
        if num_classes > 5 and (evaluation or not tokens):
            self["acc_top5"] = TopKAccuracy(5, ignore_index)
        if evaluation and tokens:
            self["perplexity"] = Perplexity(ignore_index)
            if with_teacher:
                self["teacher_perplexity"] = Perplexity(ignore_index)
        if evaluation and not tokens:
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
            elif name in ("teacher_acc", "teacher_perplexity"):
                if teacher_logits is not None:
                    metric.update(teacher_logits, targets)
            elif name == "agreement":
                if teacher_logits is not None:
                    predicted = teacher_logits.argmax(-1)
                    metric.update(logits, torch.where(targets == self.ignore_index, targets, predicted))
            else:
                metric.update(logits, targets)
