"""The preflight itself: what is run on the few batches, and put back afterwards."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng

from kd_lightning.callbacks.snapshot import Snapshot
from kd_lightning.modules import DistillationModule
from kd_lightning.preflight.costs import measure_costs
from kd_lightning.preflight.facts import Facts, batches_of, look_at, score_teacher, set_up, steps_of
from kd_lightning.preflight.report import Report
from kd_lightning.preflight.verdicts import judge
from kd_lightning.progress import Progress
from kd_lightning.ranking import check_counts


def check(
    module: DistillationModule, data: Any, *, batches: int = 4, max_epochs: int = 1, compiled: bool = False
) -> Report:
    """Look at a run on a few batches before it starts, and judge what goes wrong silently.

    The lines: the teacher; the classes of both networks; the layout of logits and labels; labels; finite values;
    probabilities in the place of logits; the teacher's accuracy (for images also with other normalisations) and
    calibration error; the logits' spread; the targets' entropy at the run's temperatures; a suggested T; the effective
    weight kd_weight·T² and the distillation term's share of the gradient at the student's logits; the teacher's cost
    and its cheaper ways; memory. A line that another problem prevents is absent.

    Afterwards weights, buffers, modes, random states and the data module are as before, bit for bit; but the teacher's
    checkpoint has been read. Training batches give all lines but accuracy and calibration, which validation batches
    give if there are any.

    Args:
        module: The module with student, teacher and losses.
        data: The data module, or a loader of training batches.
        batches: How many batches to look at.
        max_epochs: Length of the run, for schedules.
        compiled: Whether to time a compiled teacher too, which takes seconds to minutes.

    Raises:
        TypeError: If ``module`` is no DistillationModule, or a count is no whole number.
        ValueError: If a count is below 1, the module has no teacher, or there is no training batch.

    Example:
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> teacher = nn.Linear(4, 3)
        >>> _ = teacher.weight.data.copy_(5 * torch.eye(3, 4))  # stands for training
        >>> data = TensorDataset(torch.eye(4)[:3].repeat(20, 1), torch.arange(3).repeat(20))
        >>> module = DistillationModule(student=nn.Linear(4, 3), teacher=teacher)
        >>> report = check(module, DataLoader(data, batch_size=30))
        >>> report.ok, report["teacher's accuracy"].values["accuracy"]
        (True, 1.0)
    """
    if not isinstance(module, DistillationModule):
        raise TypeError(
            f"check takes a DistillationModule, got {type(module).__name__}. Wrap the networks: "
            "DistillationModule(student=..., teacher=...)."
        )
    check_counts(batches=batches, max_epochs=max_epochs)
    if module.teacher is None:
        raise ValueError("check needs a teacher, but the module was made without one: DistillationModule(teacher=...).")
    with isolate_rng():
        kept = Snapshot(module, data)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # each becomes a line, or is repeated by the run
                return _look(module, data, batches, max_epochs, compiled)
        finally:
            kept.restore()


def _look(module: DistillationModule, data: Any, count: int, max_epochs: int, compiled: bool) -> Report:
    distiller, teacher = module.distiller, module.teacher
    facts = Facts(module)
    facts.attempt("teacher", teacher.load)
    train, evaluation = _loaders(data)
    if not facts.problems:
        for policy in distiller.policies().values():
            policy.setup_data(data if isinstance(data, LightningDataModule) else None)
        module.train()
        distiller.eval()  # neither hooks nor hidden states
        distiller.temperature.train()
        facts.train = [*batches_of(module, data, train, count)]
        if not facts.train:
            raise ValueError(f"check looks at training batches, but {type(train).__name__} gives none.")
        for batch in facts.train:
            if not facts.problems:
                look_at(facts, batch)
    costs = None
    if not facts.problems:
        if _comparable(facts):
            steps = max_epochs * (len(train) if hasattr(train, "__len__") else 1)
            points = [Progress(part * steps // 2, steps, part * max_epochs // 2, max_epochs) for part in range(3)]
            steps_of(facts, facts.train[0], points)
        module.eval()
        facts.evaluation = facts.train
        if evaluation is not None and (held := [*batches_of(module, data, evaluation, count)]):
            facts.evaluation, facts.evaluated_on = held, "validation"
            for batch in held:
                look_at(facts, batch)
        if _comparable(facts):
            score_teacher(facts)
        module.train()
        distiller.eval()
        costs = measure_costs(facts, getattr(train, "dataset", None), compiled)
    rows = facts.rows("teacher").cpu()
    return Report(tuple(judge(facts, costs)), rows, tuple(step.temperature for step in facts.steps))


def _comparable(facts: Facts) -> bool:
    """Return True if labels are class numbers of the logits, so that a loss can be computed and scores counted."""
    first = facts.train[0]
    if first.student is None or (first.teacher is not None and first.teacher_rows is None):
        return False
    classes = first.student.shape[-1]
    labels = [batch.labels for batch in facts.train if batch.labels is not None and batch.task == "classes"]
    return all(not len(each) or bool((each >= 0).all() and (each < classes).all()) for each in labels)


def _loaders(data: Any) -> tuple[Any, Any]:
    """Return the training and the validation loaders, the second None where there is none."""
    if not isinstance(data, LightningDataModule):
        return data, None
    train = set_up(data).train_dataloader()
    evaluation = data.val_dataloader() if is_overridden("val_dataloader", data, LightningDataModule) else None
    return train, evaluation or None
