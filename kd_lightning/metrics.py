"""Metrics of the student, and of its agreement with the teacher: built when the class count is known."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from kd_lightning.losses import BernoulliKDLoss

__all__ = [
    "CalibrationError",
    "ClassificationMetrics",
    "Perplexity",
    "Task",
    "TopKAccuracy",
    "agreement",
    "task_loss_among",
    "task_of",
]

Task = Literal["classes", "labels"]
"""One class of several in each position, or an independent yes or no in each."""

_TASKS: list[tuple[tuple[type[nn.Module], ...], Task | None]] = [
    ((nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss), "classes"),
    ((nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss, BernoulliKDLoss), "labels"),
    ((nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss), None),
]


def task_of(task_loss: object, logits: Tensor, targets: Tensor) -> Task | None:
    """Return what the logits and targets of a batch describe, or None where there is no accuracy, as in regression.

    Targets of the logits' shape are class probabilities for ``CrossEntropyLoss``, labels for ``BCEWithLogitsLoss``, and
    values for ``MSELoss`` and its kin. For any other loss the values decide: rows that sum to 1 are class
    probabilities, other zeros and ones are labels. Looking at values waits for the device, once for each data loader.
    Logits are ``(…, C)``, targets ``(…)`` or ``(…, C)``.

    Example:
        >>> task_of(nn.CrossEntropyLoss(), torch.zeros(2, 3), torch.tensor([0, 2]))
        'classes'
        >>> task_of(nn.BCEWithLogitsLoss(), torch.zeros(2, 3), torch.ones(2, 3))
        'labels'
        >>> task_of(nn.MSELoss(), torch.zeros(2, 1), torch.rand(2, 1)) is None
        True
    """
    num_classes = logits.shape[-1]
    whole = targets.shape == logits.shape or (num_classes == 1 and targets.shape == logits.shape[:-1])
    if num_classes > 1 and targets.shape == logits.shape[:-1] and not targets.is_floating_point():
        return "classes"
    if not whole:
        return None
    for kinds, task in _TASKS:
        if isinstance(task_loss, kinds):
            return "labels" if task == "classes" and num_classes == 1 else task
    values = targets.detach().float()
    if num_classes > 1 and bool((values >= 0).all() and torch.allclose(values.sum(-1), values.new_ones(()), atol=1e-3)):
        return "classes"
    return "labels" if bool(((values == 0) | (values == 1)).all()) else None


def task_loss_among(modules: Iterable[nn.Module]) -> nn.Module | None:
    """Return the loss among modules that tells the task; None where there is none, or where two disagree."""
    known = [(module, task) for module in modules for kinds, task in _TASKS if isinstance(module, kinds)]
    return known[0][0] if len({task for _, task in known}) == 1 else None


def as_two_classes(logits: Tensor) -> Tensor:
    """Return logits ``(…, C, 2)`` of no and yes for each of the labels of logits ``(…, C)``: (0, z)."""
    return torch.stack((torch.zeros_like(logits), logits), dim=-1)


def agreement(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor | None = None,
    task_loss: nn.Module | None = None,
    ignore_index: int | None = -100,
) -> tuple[Tensor, Tensor] | None:
    """Return how many predictions of student and teacher are the same, and of how many; None where there are none.

    A prediction is the largest class, or for a single logit, and for targets that are labels, the sign of each logit.
    In regression there are none. Logits are ``(…, C)``, the teacher's empty where it gave none; the targets may be a
    boolean mask of the positions that count.

    Example:
        >>> agreement(torch.tensor([[2.0], [-1.0]]), torch.tensor([[3.0], [1.0]]))
        (tensor(1), tensor(2))
    """
    task: Task | None = "labels" if student.shape[-1] == 1 else "classes"
    if not len(teacher):
        return None
    mask = targets if targets is not None and targets.dtype == torch.bool else None
    if targets is not None and mask is None:
        task = task_of(task_loss, student, targets)
    if task is None:
        return None
    labels = task == "labels"
    same = (student > 0) == (teacher > 0) if labels else student.argmax(-1) == teacher.argmax(-1)
    if mask is not None:
        valid = mask.unsqueeze(-1).expand_as(same) if labels else mask
    elif targets is None or targets.numel() != same.numel():
        valid = torch.ones_like(same)
    else:
        valid = _counted(targets.reshape(same.shape), ignore_index)
    return (same & valid).sum(), valid.sum()


def _counted(targets: Tensor, ignore_index: int | None) -> Tensor:
    return torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index


class TopKAccuracy(Metric):
    r"""Share of positions whose target is among the k largest logits.

    Unlike torchmetrics' own it leaves ignored positions out without a host sync, so that it can run in every training
    step. NaN without a valid position. Shapes: ``logits (…, C)``, ``targets (…)``; ``ignore_index=None`` counts all.

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
        if self.top_k == 1:
            hit = logits.argmax(-1) == targets
        else:
            hit = (logits.topk(self.top_k, dim=-1).indices == targets.unsqueeze(-1)).any(-1)
        valid = _counted(targets, self.ignore_index)
        # not in place: after a `validate` these are inference tensors, which a `fit` must not write to
        self.correct = self.correct + (hit & valid).sum()
        self.total = self.total + valid.sum()

    @override
    def compute(self) -> Tensor:
        return self.correct / self.total


class CalibrationError(Metric):
    r"""Expected calibration error :math:`\sum_b |c_b - a_b| / n` over bins of the confidence (Guo et al. 2017).

    :math:`c_b` sums the confidences (largest softmax probabilities) in bin :math:`b`, :math:`a_b` counts its correct
    predictions, :math:`n` counts all. The sums are kept, where torchmetrics keeps every confidence, so that memory does
    not grow with the data. NaN without a valid position. Shapes: ``logits (…, C)``, ``targets (…)``.

    Example:
        >>> error = CalibrationError()
        >>> error(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))  # half sure, half right
        tensor(0.)
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    confidence: Tensor
    correct: Tensor
    total: Tensor

    def __init__(self, bins: int = 15, ignore_index: int | None = -100) -> None:
        super().__init__()
        self.bins = bins
        self.ignore_index = ignore_index
        for name in ("confidence", "correct", "total"):
            self.add_state(name, torch.zeros(bins, dtype=torch.float32), dist_reduce_fx="sum")

    @override
    def update(self, logits: Tensor, targets: Tensor) -> None:
        best = logits.float().softmax(-1).flatten(0, -2).max(-1)
        confidence, targets = best.values, targets.flatten()
        valid = _counted(targets, self.ignore_index)
        bins = torch.linspace(0, 1, self.bins + 1, device=confidence.device)
        index = (torch.bucketize(confidence, bins, right=True) - 1).clamp(0, self.bins - 1)
        for name, values in (
            ("confidence", confidence),
            ("correct", best.indices == targets),
            ("total", torch.ones_like(confidence)),
        ):
            values = torch.where(valid, values.float(), 0.0)
            setattr(self, name, getattr(self, name).index_add(0, index, values))

    @override
    def compute(self) -> Tensor:
        return (self.confidence - self.correct).abs().sum() / self.total.sum()


class Perplexity(Metric):
    r"""Perplexity :math:`\exp\big(-\tfrac1n \sum_i \log \mathrm{softmax}(s_i)_{y_i}\big)` over the valid positions.

    Sum and count are what is kept and added over ranks: batches of any size, and ranks, give what one batch would. The
    logits are widened a few rows at a time, and the sum is compensated (Kahan), so that float32 will do for any number
    of tokens. NaN without a valid position. Shapes: ``logits (…, V)``, ``targets (…)``.

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
            valid = _counted(y, self.ignore_index)
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
    evaluation only; and with a teacher ``agreement`` (how often student and teacher
    predict the same class) and ``teacher_acc``.

    For tokens ``perplexity`` and ``teacher_perplexity`` take the place of the calibration error; and the two, like
    ``acc_top5``, are for evaluation, as each is a pass over a vocabulary. For labels (multi-label or binary tasks) each
    label is a position with two classes, no and yes.
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int,
        with_teacher: bool,
        evaluation: bool,
        tokens: bool = False,
        task: Task = "classes",
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.task: Task = task
        num_classes, tokens = (num_classes, tokens) if task == "classes" else (2, False)
        self["acc"] = TopKAccuracy(1, ignore_index)
        if num_classes > 5 and (evaluation or not tokens):
            self["acc_top5"] = TopKAccuracy(5, ignore_index)
        if evaluation and tokens:
            self["perplexity"] = Perplexity(ignore_index)
            if with_teacher:
                self["teacher_perplexity"] = Perplexity(ignore_index)
        if evaluation and not tokens:
            self["calibration_error"] = CalibrationError(ignore_index=ignore_index)
        if with_teacher:
            self["agreement"] = TopKAccuracy(1, ignore_index)
            self["teacher_acc"] = TopKAccuracy(1, ignore_index)

    def observe(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            logits: ``(…, C)``, class dimension last.
            targets: ``(…)`` class indices, or ``(…, C)`` class probabilities, whose largest counts; for labels 0 or 1
                in the logits' shape.
            teacher_logits: As ``logits``.
        """
        logits = logits.detach()
        if self.task == "labels":
            targets = targets.reshape(logits.shape)
            targets = torch.where(targets == self.ignore_index, self.ignore_index, (targets > 0.5).long())
            logits = as_two_classes(logits)
            teacher_logits = None if teacher_logits is None else as_two_classes(teacher_logits)
        elif targets.shape == logits.shape:
            targets = targets.argmax(-1)
        for name, metric in self._named():
            if name in ("teacher_acc", "teacher_perplexity"):
                if teacher_logits is not None:
                    metric.update(teacher_logits, targets)
            elif name == "agreement":
                if teacher_logits is not None:
                    predicted = teacher_logits.argmax(-1)
                    metric.update(logits, torch.where(targets == self.ignore_index, targets, predicted))
            else:
                metric.update(logits, targets)

    def sums(self) -> dict[str, dict[str, Tensor]]:
        """Return the state of each metric, for a checkpoint within an epoch."""
        return {
            name: {state: getattr(metric, state) for state in metric.metric_state} for name, metric in self._named()
        }

    def restore(self, sums: dict[str, dict[str, Tensor]]) -> None:
        """Go on from what :meth:`sums` returned; metrics that either side lacks are left as they are."""
        for name, metric in self._named():
            for state, value in sums.get(name, {}).items():
                setattr(metric, state, value.to(metric.device))

    def reset(self) -> None:
        """Forget all batches."""
        for _, metric in self._named():
            metric.reset()

    def _named(self) -> list[tuple[str, Metric]]:
        return [(name, metric) for name, metric in self.items() if isinstance(metric, Metric)]
