"""What the framework costs, and what a teacher's options save.

    uv run python benchmarks/step.py
    uv run python benchmarks/step.py --parts teacher --seconds 60
    uv run python benchmarks/step.py --device cuda

``framework``: one training step of DistillationModule under Trainer against the same step in a bare loop. Both do the
same work: teacher and student forward, KD and cross-entropy, backward, SGD. They run alternately in one process; the
figure is the median over rounds of the ratio of a round's two times.

``teacher``: the same step in a bare loop with the options of FrozenTeacher, and with an ensemble of two, against the
teacher as it is; all variants in turn, medians.

``waits``: how often a step that does not log waits for the device, by the profiler: reads of a value by the host, and
synchronisations of a CUDA stream beyond one to end with.
"""

from __future__ import annotations

import argparse
import collections
import copy
import functools
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import lightning
import measure
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset

from kd_lightning import DistillationModule, Distiller, FrozenTeacher, TeacherEnsemble
from kd_lightning.models import DigitsCNN, resnet8x4, resnet20
from kd_lightning.temperature import CosineSchedule, Progress


class OneBatch(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The same batch over and over, so that data loading costs neither side anything."""

    def __init__(self, shape: tuple[int, ...], classes: int, steps: int) -> None:
        self.batch = torch.randn(shape), torch.randint(0, classes, shape[:1])
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.batch


class Clock(Callback):
    """Times the steps between the first and the last, leaving set-up out."""

    def __init__(self, skip: int) -> None:
        self.skip = skip
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.skip - 1:
            self.begin = now(pl_module.device.type)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds = now(pl_module.device.type) - self.begin


class Recorder(Callback):
    """Counts what waits for the device between the fifth step and the fifteenth, but for validation and logging."""

    WAITS = ("aten::item", "aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize")

    def __init__(self, counts: collections.Counter[str]) -> None:
        self.counts = counts
        self.profiler = torch.profiler.profile()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            self.profiler.start()
        if batch_idx == 14:
            self.profiler.stop()
            self.counts.update({e.key: e.count for e in self.profiler.key_averages() if e.key in self.WAITS})


def now(device: str) -> float:
    """The time at which the device has done what was asked of it."""
    measure.wait(device)
    return time.perf_counter()


def small() -> nn.Module:
    return DigitsCNN(channels=(4, 8), hidden=16)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def under_trainer(module: DistillationModule, data: OneBatch, skip: int, folder: str, log: bool, device: str) -> float:
    clock = Clock(skip)
    trainer = Trainer(
        accelerator=device,
        devices=1,
        max_epochs=1,
        logger=CSVLogger(folder) if log else False,
        enable_progress_bar=log,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    trainer.fit(module, DataLoader(data, batch_size=None))
    return clock.seconds


def bare(student: nn.Module, distiller: Distiller, data: OneBatch, skip: int, device: str) -> float:
    student, distiller = student.to(device), distiller.to(device)
    optimizer, begin = sgd(student.parameters()), 0.0
    for step, (inputs, targets) in enumerate(DataLoader(data, batch_size=None)):
        inputs, targets = inputs.to(device), targets.to(device)
        progress = Progress(step=step, max_steps=len(data))
        loss = distiller(inputs, student(inputs), targets, progress).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == skip - 1:
            begin = now(device)
    return now(device) - begin


OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    '`precision="bf16"`': {"precision": "bf16"},
    "`channels_last=True`": {"channels_last": True},
    "`compile=True`": {"compile": True},
    "`channels_last=True, compile=True`": {"channels_last": True, "compile": True},
    "`micro_batch_size=8`": {"micro_batch_size": 8},
}


def teacher_options(seconds: float, compiled: bool, device: str) -> None:
    """Print what each option gives: time of the teacher's forward and of the step, memory of the forward."""
    inputs, targets = torch.randn(32, 3, 32, 32, device=device), torch.randint(0, 100, (32,), device=device)
    teacher = resnet8x4(num_classes=100).to(device)
    options = {name: given for name, given in OPTIONS.items() if compiled or "compile" not in given}
    teachers: dict[str, Any] = {name: FrozenTeacher(copy.deepcopy(teacher), **given) for name, given in options.items()}
    teachers["two of it, `TeacherEnsemble`"] = TeacherEnsemble([copy.deepcopy(teacher) for _ in range(2)])

    def stepper(teacher: FrozenTeacher | None) -> Callable[[], None]:
        student = resnet20(num_classes=100).to(device)
        distiller, optimizer = Distiller(teacher, 4.0).to(device), sgd(student.parameters())

        def step() -> None:
            logits = student(inputs)
            out = distiller(inputs, logits, targets, teacher_logits=None if teacher else logits.detach())
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()

        return step

    forwards = {name: functools.partial(teacher, inputs) for name, teacher in teachers.items()}
    steps = {name: stepper(teacher) for name, teacher in (teachers | {"no teacher": None}).items()}
    forward_times = measure.interleaved_times(forwards, seconds / 2, device)
    step_times = measure.interleaved_times(steps, seconds / 2, device)
    print("| teacher (resnet8x4 → resnet20, 32 images of 32 × 32) | forward | memory of the forward | step |")
    print("|---|---|---|---|")
    for name in steps:
        forward = memory = "–"
        if name in forwards:
            forward = f"{forward_times[name] / forward_times['as it is']:.2f}×"
            memory = f"{measure.peak_bytes(forwards[name], device) / 2**20:.0f} MiB"
        print(f"| {name} | {forward} | {memory} | {step_times[name] / step_times['as it is']:.2f}× |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["framework", "teacher", "waits"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=7, help="of the framework part")
    parser.add_argument("--seconds", type=float, default=60.0, help="least time of the teacher part")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    options = parser.parse_args()
    measure.check_device(parser, options.device)
    measure.run_quietly(2)
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}, Python {platform.python_version()}"
    print(f"{versions}, 2 threads")
    if "framework" in options.parts:
        framework(options.rounds, options.device)
    if "teacher" in options.parts:
        teacher_options(options.seconds, options.compile, options.device)
    if "waits" in options.parts:
        waits(options.device)


def waits(device: str) -> None:
    """Print how often the host waits for the device in ten steps under Trainer that do not log."""
    module = DistillationModule(small(), FrozenTeacher(DigitsCNN()), CosineSchedule(8.0, 2.0), optimizer=sgd)
    counts = collections.Counter[str]()
    trainer = Trainer(
        accelerator=device, devices=1, max_epochs=1, logger=False, enable_progress_bar=False, log_every_n_steps=10**6,
        enable_checkpointing=False, enable_model_summary=False, callbacks=[Recorder(counts)],
    )  # fmt: skip
    trainer.fit(module, DataLoader(OneBatch((32, 1, 8, 8), 10, 20), batch_size=None))
    print(f"waits in ten steps: {dict(counts) or 'none'}", flush=True)


def framework(rounds: int, device: str) -> None:
    """Print what a step under Trainer costs over the bare one."""
    print("| teacher → student, batch | bare step | Trainer, nothing logged | Trainer, CSV log and progress bar |")
    print("|---|---|---|---|")
    cases = {
        "DigitsCNN → DigitsCNN((4, 8)), (32, 1, 8, 8)": (DigitsCNN, small, (32, 1, 8, 8), 10, 220),
        "resnet20 → resnet20, (64, 3, 32, 32)": (resnet20, resnet20, (64, 3, 32, 32), 100, 22),
        "resnet8x4 → resnet20, (64, 3, 32, 32)": (resnet8x4, resnet20, (64, 3, 32, 32), 100, 22),
    }
    for name, (teacher, student, shape, classes, steps) in cases.items():
        data, skip = OneBatch(shape, classes, steps), steps // 10
        frozen = FrozenTeacher(teacher())
        options: dict[str, Any] = {"teacher": frozen, "temperature": CosineSchedule(8.0, 2.0)}
        times: dict[str, list[float]] = {"bare": [], "quiet": [], "logged": []}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(rounds):
                times["bare"].append(bare(student(), Distiller(**options), data, skip, device))
                for kind in ("quiet", "logged"):
                    module = DistillationModule(student=student(), optimizer=sgd, **options)
                    times[kind].append(under_trainer(module, data, skip, folder, kind == "logged", device))
        ratios = {
            kind: statistics.median(t / b for t, b in zip(times[kind], times["bare"], strict=True)) for kind in times
        }
        milliseconds = statistics.median(times["bare"]) / (steps - skip) * 1000
        print(f"| {name} | {milliseconds:.1f} ms | {ratios['quiet']:.2f}× | {ratios['logged']:.2f}× |", flush=True)


if __name__ == "__main__":
    main()
