"""What each kind of teacher costs beside a plain network: time and memory of a training step, in one run.

    uv run python benchmarks/teachers.py
    uv run python benchmarks/teachers.py --seconds 20 --parts images

A step is teacher, student forward, KD and cross-entropy, backward and SGD in a bare loop. All kinds run in turn, in
random order, round after round; the figure is the ratio of medians to the plain ``FrozenTeacher``, in processor time
with one thread. Memory is the most that torch allocates at once during a step, over what stood before; what
onnxruntime holds is not in it. Caches and files are full, as after the first epoch.

``images``: resnet8x4 → resnet20, 32 images of 32 × 32, 100 classes. ``tokens``: transformers of width 128 and 64 on
4 × 128 tokens of 8192.
"""

from __future__ import annotations

import argparse
import copy
import functools
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Distiller, FrozenTeacher, TeacherCache, TeacherEnsemble
from kd_lightning.models import CausalTransformer, resnet8x4, resnet20
from kd_lightning.teachers import (
    BatchTeacher,
    EMATeacher,
    FunctionTeacher,
    LogitsFile,
    MappedClasses,
    OnnxTeacher,
    Renormalize,
    Teacher,
)

PLAIN = "`FrozenTeacher`, as it is"
Given = tuple[Teacher, Callable[[], Any]]
"""A teacher, and a function that gives its logits for the batch."""


def stepper(
    teacher: Teacher | None, give: Callable[[], Any], student: nn.Module, inputs: Tensor, targets: Tensor
) -> Any:
    """Return a training step."""
    distiller, optimizer = Distiller(teacher, 4.0), torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    if teacher is not None:
        teacher.follow(student)

    def step() -> None:
        taught, logits = give(), student(inputs)
        loss = distiller(inputs, logits, targets, teacher_logits=logits.detach() if taught is None else taught).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if teacher is not None:
            teacher.update()

    return step


def cached(network: nn.Module, inputs: Tensor, targets: Tensor, path: Path, **options: Any) -> Given:
    """Return a teacher whose cache has the batch."""
    teacher = FrozenTeacher(network, cache=TeacherCache(path, **options))
    loader = DataLoader(teacher.index(TensorDataset(inputs, targets)), batch_size=len(inputs))
    for (images, _), index in loader:
        teacher.logits(images, index)
    return teacher, functools.partial(teacher.logits, inputs, torch.arange(len(inputs)))


def image_teachers(network: nn.Module, inputs: Tensor, targets: Tensor, folder: Path) -> dict[str, Given]:
    """Return each kind of teacher of images."""
    with torch.no_grad():
        logits = network(inputs)
    np.save(folder / "logits.npy", logits.numpy())
    torch.onnx.export(
        network, (inputs,), folder / "teacher.onnx", input_names=["x"], output_names=["logits"], dynamo=True
    )
    same = Renormalize([0.5] * 3, [0.25] * 3, [0.4] * 3, [0.2] * 3)
    wide = resnet8x4(num_classes=200).eval()
    every: dict[str, Teacher] = {
        PLAIN: FrozenTeacher(network),
        "`transform=Renormalize(…)`": FrozenTeacher(copy.deepcopy(network), transform=same),
        "`MappedClasses`, other order": MappedClasses(FrozenTeacher(copy.deepcopy(network)), [*range(99, -1, -1)]),
        "`MappedClasses`, 200 classes merged to 100": MappedClasses(
            FrozenTeacher(wide), [[2 * k, 2 * k + 1] for k in range(100)]
        ),
        "`FunctionTeacher`": FunctionTeacher(copy.deepcopy(network).__call__, name="resnet8x4"),
        "`OnnxTeacher`": OnnxTeacher(folder / "teacher.onnx"),
        "`EMATeacher` (of the student)": EMATeacher(),
        "`TeacherEnsemble` of two": TeacherEnsemble([copy.deepcopy(network), copy.deepcopy(network)]),
    }
    kinds: dict[str, Given] = {
        name: (teacher, functools.partial(teacher.logits, inputs)) for name, teacher in every.items()
    }
    kinds["`TeacherCache`"] = cached(copy.deepcopy(network), inputs, targets, folder / "images.cache")
    batch = {"t": logits, "id": torch.arange(len(inputs))}
    in_batch, in_file = BatchTeacher("t"), LogitsFile(folder / "logits.npy", key="id")
    kinds["`BatchTeacher`"] = in_batch, functools.partial(in_batch.logits, batch)
    kinds["`LogitsFile` (.npy)"] = in_file, lambda: in_file.logits(batch, in_file.rows(batch))
    return kinds


def token_teachers(network: nn.Module, inputs: Tensor, targets: Tensor, folder: Path) -> dict[str, Given]:
    """Return a network of tokens, and its caches."""
    plain = FrozenTeacher(network)
    kinds: dict[str, Given] = {PLAIN: (plain, functools.partial(plain.logits, inputs))}
    kinds["`TeacherCache`"] = cached(copy.deepcopy(network), inputs, targets, folder / "tokens.cache")
    for k in (16, 64):
        path, options = folder / f"top{k}.cache", {"top_k": k, "temperature": 4.0}
        kinds[f"`TeacherCache(top_k={k})`"] = cached(copy.deepcopy(network), inputs, targets, path, **options)
    return kinds


def table(
    title: str, kinds: dict[str, Given], student: nn.Module, inputs: Tensor, targets: Tensor, seconds: float
) -> None:
    """Print a row for each kind, and one for no teacher at all."""
    steps = {
        name: stepper(teacher, give, copy.deepcopy(student), inputs, targets) for name, (teacher, give) in kinds.items()
    }
    steps["no teacher"] = stepper(None, lambda: None, copy.deepcopy(student), inputs, targets)
    times = measure.interleaved_times(steps, seconds, "cpu", clock=time.process_time)
    memory = {name: measure.peak_bytes(step, "cpu") for name, step in steps.items()}
    print(f"\n| {title} | step | memory of the step |\n|---|---|---|")
    for name in steps:
        share = memory[name] / memory[PLAIN]
        print(
            f"| {name} | {times[name] / times[PLAIN]:.2f}× | {memory[name] / 2**20:.0f} MiB ({share:.2f}×) |",
            flush=True,
        )
    print(f"\nthe plain step: {times[PLAIN] * 1000:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="least time of each part")
    parser.add_argument("--parts", nargs="+", default=["images", "tokens"], choices=["images", "tokens"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    print(measure.machine("cpu"))
    with tempfile.TemporaryDirectory() as name:
        if "images" in options.parts:
            inputs, targets = torch.randn(32, 3, 32, 32), torch.randint(0, 100, (32,))
            network = resnet8x4(num_classes=100).eval()
            kinds = image_teachers(network, inputs, targets, Path(name))
            table("resnet8x4 → resnet20", kinds, resnet20(num_classes=100), inputs, targets, options.seconds)
        if "tokens" in options.parts:
            tokens = torch.randint(0, 8192, (4, 128))
            network = CausalTransformer(vocab_size=8192, dim=128, depth=2).eval()
            kinds = token_teachers(network, tokens, tokens, Path(name))
            student = CausalTransformer(vocab_size=8192, dim=64, depth=1)
            table("transformers, 4 × 128 tokens", kinds, student, tokens, tokens, options.seconds)


if __name__ == "__main__":
    main()
