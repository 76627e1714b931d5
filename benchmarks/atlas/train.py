"""One training of the atlas."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from benchmarks.atlas.arms import ADAPTIVE, ANCHOR, POLICIES, TASK_WEIGHT, Run, weight_of
from benchmarks.atlas.rows import Key, Scores
from benchmarks.atlas.tasks import TASKS, batches, cross_entropy, data, rows_of, score, teacher_logits
from kd_lightning import Distiller
from kd_lightning.callbacks.adaptive_rule import TemperatureRange
from kd_lightning.losses import KDLoss
from kd_lightning.progress import Progress

EVALUATIONS = 10


def train(key: Key) -> Scores:
    """Train one student and score it."""
    task, ((x, y), val, test) = TASKS[key.task], data(key.task, 0 if TASKS[key.task].one_teacher else key.seed)
    rows, steps = rows_of(key.images, y), task.steps[key.length]
    x, y = x[rows], y[rows]
    logits = None
    if key.weighting != "none":
        logits = teacher_logits(key.task, key.images if key.images == "longtail" else "many", key.seed, key.teacher)
        logits = logits[rows]
    torch.manual_seed(2000 + key.seed)
    distiller = _distiller(key, y, steps)
    torch.manual_seed(1000 + key.seed)
    student = task.student(x, task.classes)
    groups: list[dict[str, Any]] = [{"params": [*student.parameters()]}, *distiller.temperature.param_groups()]
    if key.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=key.rate, fused=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=key.rate, momentum=0.9, fused=True)
    rule = ADAPTIVE[key.weighting]().rule if key.weighting in ADAPTIVE else None
    per_epoch = math.ceil(len(x) / task.batch_size)
    best, best_state = -math.inf, copy.deepcopy(student.state_dict())
    for step, index in enumerate(batches(len(x), steps, key.seed, task.batch_size), 1):
        for group in optimizer.param_groups:
            group["lr"] = key.rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        inputs, targets = x[index], y[index]
        outputs = student(inputs)
        if logits is None:
            loss = cross_entropy(outputs, targets)
        else:
            progress = Progress(step - 1, steps, (step - 1) // per_epoch, math.ceil(steps / per_epoch))
            loss = distiller(inputs, outputs, targets, progress, teacher_logits=logits[index]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (steps // EVALUATIONS) == 0:
            value = score(student, val)
            if value > best:
                best, best_state = value, copy.deepcopy(student.state_dict())
            if rule is not None:
                _adapt(rule, distiller, value)
    val_last, test_last = score(student, val), score(student, test)
    student.load_state_dict(best_state)
    return Scores(val_last, test_last, best, score(student, test))


def _distiller(key: Key, labels: torch.Tensor, steps: int) -> Distiller:
    task, temperature = TASKS[key.task], key.temperature or 1.0
    kd_weight = 0.0 if key.weighting == "none" else weight_of(key.arm)
    if key.weighting in POLICIES:
        counts = labels.bincount() if labels.dim() == 1 else None
        temperature = POLICIES[key.weighting].build(Run(task.classes, counts, steps))
    kd_loss: nn.Module | None = KDLoss(class_dim=2) if labels.dim() == 2 else None
    return Distiller(None, temperature, kd_loss, kd_weight=kd_weight, task_weight=TASK_WEIGHT)


def _adapt(rule: Any, distiller: Distiller, value: float) -> None:
    """Move the temperature as AdaptiveTemperature does after a validation, for the constant T = ANCHOR."""
    policy: Any = distiller.temperature
    temperature = float(ANCHOR * policy.multiplier)
    move = rule.check(value, TemperatureRange(*[temperature] * 3), policy.min_temperature, policy.max_temperature)
    if move is not None:
        policy.multiplier.mul_(move.ratio)
