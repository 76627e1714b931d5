"""The measurements of a preflight, taken of a few batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import move_data_to_device
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils._pytree import tree_leaves

from kd_lightning.functional.rows import without_padding
from kd_lightning.metrics import CalibrationError, Task, TopKAccuracy, as_two_classes, task_of
from kd_lightning.modules import DistillationModule
from kd_lightning.modules.supervised import SupervisedModule
from kd_lightning.preflight.report import Line
from kd_lightning.progress import Progress
from kd_lightning.teachers.indexed import split_index
from kd_lightning.temperature.base import mean_temperature
from kd_lightning.temperature.signals import take_extra

_ROWS = 2048  # positions of a batch whose logits are kept
_REFUSALS = (ValueError, TypeError, RuntimeError, LookupError, OSError)


@dataclass
class Batch:
    """A batch as a step gets it, and what both networks say of it.

    ``student`` and ``teacher`` are logits with the class dimension last; ``rows`` are those of at most 2,048 positions
    that count, with two classes for each label of a multi-label task.
    """

    batch: Any
    inputs: Any
    targets: Tensor | None
    task: Task | None = None
    student: Tensor | None = None
    teacher: Tensor | None = None
    student_rows: Tensor | None = None
    teacher_rows: Tensor | None = None
    labels: Tensor | None = None


@dataclass(frozen=True)
class Score:
    """The teacher's accuracy and calibration error over so many positions."""

    accuracy: float
    calibration_error: float
    count: int


@dataclass(frozen=True)
class Step:
    """The temperatures and weights at one point of the run, and the norms of both gradients at the student's logits."""

    temperature: float
    kd_weight: float
    task_weight: float
    effective_kd_weight: float
    loss: float
    kd_gradient: float
    task_gradient: float


@dataclass
class Facts:
    """All measurements; what comes after a problem is missing."""

    module: DistillationModule
    train: list[Batch] = field(default_factory=list)
    evaluation: list[Batch] = field(default_factory=list)
    evaluated_on: str = "training"
    steps: list[Step] = field(default_factory=list)
    score: Score | None = None
    renormalised: dict[str, Score] = field(default_factory=dict)
    problems: list[Line] = field(default_factory=list)

    def attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """Return what the call returns; None, and a line on the error, where it raises."""
        try:
            return call()
        except _REFUSALS as error:
            self.problems.append(Line(name, "wrong", " ".join(str(error).split())))
            return None

    def rows(self, whose: str) -> Tensor:
        """Return the kept rows of ``"student"`` or ``"teacher"`` over the training batches, ``(N, C)``; none: empty."""
        found = [rows for batch in self.train if (rows := getattr(batch, f"{whose}_rows")) is not None]
        return torch.cat(found) if found else torch.empty(0, 0)


def set_up(datamodule: LightningDataModule) -> LightningDataModule:
    """Return the data module, set up for a fit."""
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def batches_of(module: SupervisedModule, data: Any, loaders: Any, count: int | None) -> Iterator[Batch]:
    """Yield the first batches of the loaders after all of the batch hooks, on the module's device.

    Args:
        module: Splits the batches.
        data: The data module, whose hooks come first, or the loader itself.
        loaders: A loader, several, or batches.
        count: How many; None takes all.
    """
    several = isinstance(loaders, (list, tuple)) and loaders and hasattr(loaders[0], "dataset")
    for batch in itertools.islice(loaders[0] if several else loaders, count):
        batch = _hooked(module, data, split_index(batch)[0])
        inputs, targets = module.inputs_and_targets(batch)
        yield Batch(batch, inputs, targets)


def _hooked(module: SupervisedModule, data: Any, batch: Any) -> Any:
    """Return the batch on the module's device, after the batch hooks of the data module, else of the module."""

    def hook(name: str) -> Callable[..., Any]:
        ours = isinstance(data, LightningDataModule) and is_overridden(name, data, LightningDataModule)
        return getattr(data if ours else module, name)

    batch = move_data_to_device(hook("on_before_batch_transfer")(batch, 0), module.device)
    return hook("on_after_batch_transfer")(batch, 0)


def teacher_logits(module: DistillationModule, batch: Batch, inputs: Any) -> Any:
    """Return what the teacher gives for these inputs of the batch, without its cache."""
    teacher = module.teacher
    given = batch.batch if teacher.reads_batch else inputs
    return module.distiller.teacher_logits(given, teacher.rows(batch.batch), module.extract_logits)


def look_at(facts: Facts, batch: Batch) -> None:
    """Run both networks on a batch, and keep rows of their logits where they can be compared."""
    module = facts.module
    class_dim = module.class_dim
    student = facts.attempt("student", lambda: module(batch.inputs))
    given = facts.attempt("teacher", lambda: teacher_logits(module, batch, batch.inputs))
    if student is None or given is None:
        return
    if not -student.dim() <= class_dim < student.dim():
        text = f"class_dim={class_dim} is no dimension of the student's logits {tuple(student.shape)}"
        facts.problems.append(Line("layout", "wrong", text))
        return
    ours = batch.student = student.detach().movedim(class_dim, -1)
    members = module.teacher.members(given)
    tensors = [member for member in members if isinstance(member, Tensor)]
    if len(tensors) == 1 and len(members) == 1:
        batch.teacher = tensors[0].movedim(class_dim, -1) if tensors[0].dim() == student.dim() else tensors[0]
    elif tensors:
        common = facts.attempt("teacher", partial(module.distiller.consensus, batch.inputs, given, batch.targets))
        batch.teacher = None if common is None else common.movedim(class_dim, -1)
    if batch.teacher is not None:
        batch.teacher = without_padding(ours, batch.teacher)
    _keep_rows(facts, batch)


def _keep_rows(facts: Facts, batch: Batch) -> None:
    student, teacher, targets = batch.student, batch.teacher, batch.targets
    assert student is not None
    module = facts.module
    if targets is not None:
        if targets.dim() == student.dim():
            targets = targets.movedim(module.class_dim, -1)
        batch.task = task_of(module._task_loss, student, targets)
    if batch.task == "labels" and targets is not None:
        labels = targets.reshape(student.shape)
        labels = torch.where(labels == module.ignore_index, module.ignore_index, (labels > 0.5).long()).flatten()
        student, teacher = as_two_classes(student), None if teacher is None else as_two_classes(teacher)
    elif batch.task == "classes" and targets is not None:
        labels = (targets.argmax(-1) if targets.shape == student.shape else targets).flatten()
    else:
        labels = None
    student = student.flatten(0, -2).float()
    valid = torch.ones(len(student), dtype=torch.bool, device=student.device)
    if labels is not None:
        valid &= labels != module.ignore_index
    chosen = valid.nonzero().squeeze(-1)
    chosen = chosen[:: max(len(chosen) // _ROWS, 1)][:_ROWS]
    batch.student_rows = student[chosen]
    batch.labels = None if labels is None else labels[chosen]
    if teacher is not None and teacher.shape[-1] == student.shape[-1] and teacher.numel() == student.numel():
        batch.teacher_rows = teacher.flatten(0, -2).float()[chosen]


def _scored(batches: list[Batch]) -> Score | None:
    """Return the scores of the teacher's rows; None without a label."""
    accuracy, error = TopKAccuracy(1, None), CalibrationError(ignore_index=None)
    for batch in batches:
        if batch.teacher_rows is not None and batch.labels is not None and len(batch.labels):
            accuracy.to(batch.labels.device).update(batch.teacher_rows, batch.labels)
            error.to(batch.labels.device).update(batch.teacher_rows, batch.labels)
    count = int(accuracy.total)
    return Score(float(accuracy.compute()), float(error.compute()), count) if count else None


def score_teacher(facts: Facts) -> None:
    """Score the teacher on the evaluation batches, as they are and with their inputs normalised otherwise."""
    batches = [batch for batch in facts.evaluation if batch.teacher_rows is not None and batch.labels is not None]
    facts.score = _scored(batches)
    if facts.score is None or not all(_is_images(batch) for batch in batches):
        return
    for name, change in normalisations([batch.inputs for batch in batches]).items():
        others = []
        for batch in batches:
            given = teacher_logits(facts.module, batch, change(batch.inputs).to(batch.inputs.dtype))
            other = replace(batch, teacher=given.movedim(facts.module.class_dim, -1), teacher_rows=None)
            _keep_rows(facts, other)
            others.append(other)
        if (score := _scored(others)) is not None:
            facts.renormalised[name] = score


def _is_images(batch: Batch) -> bool:
    x, teacher = batch.inputs, batch.teacher
    return isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point() and isinstance(teacher, Tensor)


def normalisations(images: list[Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return other ways to normalise the images of some batches, by name, from their own range and statistics.

    Example:
        >>> change = normalisations([torch.tensor([[[[-1.0, 1.0]]]])])
        >>> change["pixels in 0…1"](torch.zeros(1, 1, 1, 2)).unique()
        tensor([0.5000])
    """
    pixels = torch.cat([batch.movedim(1, 0).flatten(1) for batch in images], dim=1).float()
    shape = (1, -1, 1, 1)
    low, high = pixels.min(), pixels.max()
    mean, std = pixels.mean(1).view(shape), pixels.std(1).clamp(min=1e-6).view(shape)
    span = (high - low).clamp(min=1e-6)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "mean 0 and standard deviation 1": lambda x: (x - mean) / std,
        "pixels in 0…1": lambda x: (x - low) / span,
        "pixels in −1…1": lambda x: 2 * (x - low) / span - 1,
        "pixels in 0…255": lambda x: 255 * (x - low) / span,
    }
    if len(pixels) == 3:
        m, s = (pixels.new_tensor(v).view(shape) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        ways["ImageNet's statistics"] = lambda x: ((x - low) / span - m) / s
    return ways


def steps_of(facts: Facts, batch: Batch, points: list[Progress]) -> None:
    """Compute the loss, its weights and the gradients at the student's logits at points of the run."""
    module, distiller = facts.module, facts.module.distiller
    extra = take_extra(batch.batch, distiller.batch_keys)[1]
    given = teacher_logits(module, batch, batch.inputs)
    with torch.enable_grad():
        logits = module(batch.inputs).detach().float().requires_grad_()
        for point in points:
            call = partial(distiller, batch.inputs, logits, batch.targets, point, teacher_logits=given, extra=extra)
            out = facts.attempt("step", call)
            if out is None:
                return
            temperature = float(mean_temperature(out.temperature, "teacher"))
            # numbers, because the output would keep its graph, with logits, while memory is measured
            numbers = (temperature, out.kd_weight, out.task_weight, float(out.effective_kd_weight), float(out.loss))
            norms = [_norm(out.kd_weight * out.kd_loss, logits), _norm(out.task_weight * out.task_loss, logits)]
            facts.steps.append(Step(*numbers, *norms))


def _norm(term: Any, logits: Tensor) -> float:
    if not term.requires_grad:
        return 0.0
    gradient = torch.autograd.grad(term, logits, retain_graph=True, allow_unused=True)[0]
    return 0.0 if gradient is None else float(gradient.norm())


def not_finite(value: Any, masked: bool = False) -> bool:
    """Return True if a floating-point tensor in the value has NaN or an infinity; −inf is allowed where masked."""
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return any(bool((~leaf.isfinite() & ~((leaf == -torch.inf) & masked)).any()) for leaf in tensors)
