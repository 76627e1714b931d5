"""The cost of the teacher in a training step, and of the ways to pay less."""

from __future__ import annotations

import copy
import statistics
import tempfile
import timeit
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.preflight.facts import Batch, Facts, teacher_logits
from kd_lightning.teachers import FrozenTeacher, IndexedDataset, TeacherCache
from kd_lightning.teachers.indexed import input_fingerprints

_REPEATS = 5


@dataclass
class Costs:
    """Times in seconds and sizes in bytes; ``times`` are those of the teacher by the way it is run.

    ``not_measured`` has the reason for a way that was not timed, ``cacheable`` is empty where the samples can be cached
    and says otherwise why not.
    """

    student: float
    times: dict[str, float] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)
    cacheable: str = ""
    teacher_bytes: int = 0
    student_bytes: int = 0
    cache_bytes: int = 0
    peak_bytes: int = 0
    device_bytes: int = 0


def measure_costs(facts: Facts, dataset: Any, compiled: bool) -> Costs:
    """Time the teacher and the student on the first batch, the median of five calls each.

    Args:
        facts: Has at least one training batch that both networks took.
        dataset: The training data, to see whether it can be cached; None where it is unknown.
        compiled: Whether to compile the teacher too, which takes seconds to minutes.
    """
    module, batch = facts.module, facts.train[0]
    teacher = module.teacher
    on_device = module.device.type == "cuda"
    if on_device:
        torch.cuda.reset_peak_memory_stats(module.device)
    parameters = [p for p in module.student.parameters() if p.requires_grad]

    def student_step() -> None:
        with torch.enable_grad():
            loss = module(batch.inputs).float().square().mean()
            torch.autograd.grad(loss, parameters, allow_unused=True)

    costs = Costs(_median(student_step, module.device))
    costs.times["live"] = _median(lambda: teacher_logits(module, batch, batch.inputs), module.device)
    if on_device:
        costs.peak_bytes = torch.cuda.max_memory_allocated(module.device)
        costs.device_bytes = torch.cuda.get_device_properties(module.device).total_memory
    costs.teacher_bytes = sum(_bytes(network) for network in teacher.modules())
    costs.student_bytes = _bytes(module.student)
    # because only a network in this process can be run in another precision, or compiled
    if isinstance(teacher, FrozenTeacher):
        _time_variants(costs, teacher, module, batch, compiled)
    given = teacher_logits(module, batch, batch.inputs)
    if isinstance(given, Tensor):
        costs.times["cached"], row_bytes = _try_cache(torch.zeros_like(given), module.device)  # any values take as long
        costs.cache_bytes = row_bytes * (len(dataset) if hasattr(dataset, "__len__") else 0)
        costs.cacheable = _why_not_cacheable(dataset)
    return costs


def _time_variants(costs: Costs, teacher: FrozenTeacher, module: Any, batch: Batch, compiled: bool) -> None:
    variants: dict[str, dict[str, Any]] = {"bf16": {"precision": "bf16"}}
    if compiled:
        variants["compiled"] = {"compile": True}
    else:
        costs.not_measured["compiled"] = "compiling is slow: --compiled true"
    for name, options in variants.items():
        try:
            placed = {"transform": teacher.transform, "placement": teacher.placement}
            other = FrozenTeacher(copy.deepcopy(teacher.module), **placed, **options)
            call = partial(other.logits, batch.inputs, None, module.extract_logits)
            costs.times[name] = _median(call, module.device)
        except Exception as error:  # whatever the network does not take; it is run as it is
            costs.not_measured[name] = " ".join(str(error).split())[:100]


def _try_cache(logits: Tensor, device: torch.device) -> tuple[float, int]:
    """Return the seconds that cached logits of a batch take, and the bytes of each row."""
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache(Path(folder) / "check.cache")
        cache.index([*range(len(logits))], "check")
        rows = torch.arange(len(logits))
        cache.logits(rows, lambda: logits, device)
        return _median(lambda: cache.logits(rows, lambda: logits, device), device), cache.row_bytes


def _why_not_cacheable(dataset: Any) -> str:
    if dataset is None:
        return "the data are no map-style dataset."
    try:
        input_fingerprints(IndexedDataset(dataset))
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def _median(call: Callable[[], Any], device: torch.device) -> float:
    def synchronised() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return statistics.median(timeit.repeat(synchronised, number=1, repeat=_REPEATS + 1)[1:])


def _bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*network.parameters(), *network.buffers()])
