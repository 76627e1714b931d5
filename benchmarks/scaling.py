"""Samples per second of distillation on 1, 2 and 4 processes of one thread each: live, cached and sharded teacher.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --device cuda --processes 1 2 4 8

Each process has a batch of its own, so that perfect scaling doubles the samples with the processes. Prints samples/s,
and the ratio to the live teacher on one process. On the CPU, more processes than idle cores measure the cores.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DistillationModule, FrozenTeacher, TeacherCache
from kd_lightning.models import resnet8x4, resnet20
from kd_lightning.teachers import Sharded

KINDS = ["live", "cached", "sharded"]
SKIP = 3  # steps before the clock starts


class Clock(Callback):
    """Writes the seconds of the steps after the first ones, from rank 0."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == SKIP - 1:
            self.began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        if trainer.is_global_zero:
            self.file.write_text(str(time.perf_counter() - self.began))


def samples_per_second(kind: str, processes: int, options: argparse.Namespace, folder: Path) -> float:
    """Return the samples of all processes in a second."""
    torch.manual_seed(0)
    count = options.batch * processes * options.steps
    data: Any = TensorDataset(torch.randn(count, 3, 32, 32), torch.randint(100, (count,)))
    more: dict[str, Any] = {
        "live": {},
        "cached": {"cache": TeacherCache(folder / "teacher.cache")},
        "sharded": {"placement": Sharded(10_000)},
    }
    teacher = FrozenTeacher(resnet8x4(), **more[kind])
    if kind == "cached":
        data = teacher.index(data)
    module = DistillationModule(resnet20(), teacher, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    clock, strategy = folder / "seconds", "ddp_fork" if options.device == "cpu" else "ddp_spawn"
    for _ in range(2 if kind == "cached" else 1):  # the first run fills the cache
        trainer = Trainer(
            accelerator=options.device, devices=processes, strategy="auto" if processes == 1 else strategy,
            max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[Clock(clock)], use_distributed_sampler=True,
        )  # fmt: skip
        trainer.fit(module, DataLoader(data, batch_size=options.batch))
    return options.batch * processes * (options.steps - SKIP) / float(clock.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--batch", type=int, default=32, help="samples of a process")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    measure.check_device(parser, options.device)
    measure.run_quietly(1)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, one thread a process, {options.batch} images a process")
    print("| teacher | " + " | ".join(f"{count} processes" for count in options.processes) + " |")
    print("|---" * (len(options.processes) + 1) + "|")
    first: float | None = None
    for kind in options.kinds:
        cells = []
        for processes in options.processes:
            with tempfile.TemporaryDirectory() as folder:
                rate = samples_per_second(kind, processes, options, Path(folder))
            first = rate if first is None else first
            cells.append(f"{rate:.0f} samples/s ({rate / first:.2f}×)")
        print(f"| {kind} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
