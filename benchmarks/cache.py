"""What a warm teacher cache costs and saves: an epoch with it, with the live teacher, and without any teacher.

    uv run python benchmarks/cache.py             # time, bytes
    uv run python benchmarks/cache.py --fill      # rows a second of fill and read, sizes of large caches
    uv run python benchmarks/cache.py --latency 2 # rows a second from a file system whose reads wait 2 ms
    uv run python benchmarks/cache.py --accuracy  # digits, with and without augmentation: several minutes

All train the same student under Trainer on images of 32×32 that are augmented in memory (crops and mirror images), in
turn, round after round; the figure is the median over rounds of the ratio of a round's two times. Times are those of
the processor with one thread, so that other work on the machine does not matter much. An epoch is timed without its
first steps, in which a cache is compared with the teacher once.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cache_fill import fill_and_read
from cache_latency import read_slowly
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from measure import check_device, machine, run_quietly, wait
from torch import nn

from kd_lightning import ClassificationModule, DistillationModule, FrozenTeacher
from kd_lightning.datamodules import CIFAR100DataModule, DigitsDataModule
from kd_lightning.models import DigitsCNN, resnet8x4, resnet20, resnet32x4
from kd_lightning.teachers import TeacherCache

BATCH, SKIP = 64, 2
DIGITS_TEACHER = Path(__file__).parent.parent / "configs" / "digits_teacher.safetensors"


class MadeImages(CIFAR100DataModule):
    """CIFAR-100's shape, classes and augmentation; the pixels do not matter to a clock."""

    def __init__(self, steps: int, **kwargs: Any) -> None:
        super().__init__(batch_size=BATCH, val_fraction=0.0, **kwargs)
        self.steps = steps

    def load_split(self, split: Any) -> Any:
        count = self.steps * BATCH
        images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return None if split == "val" else (images, torch.arange(count) % 100)


class Clock(Callback):
    """Seconds from the end of the first steps to the end of the epoch."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == SKIP - 1:
            self.begin = seconds_on(pl_module.device.type)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds = seconds_on(pl_module.device.type) - self.begin


def seconds_on(device: str) -> float:
    """Processor time, which other work on the machine does not lengthen; of a GPU the time by the wall."""
    wait(device)
    return time.process_time() if device == "cpu" else time.perf_counter()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def quiet_trainer(**options: Any) -> Trainer:
    off = ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary")
    return Trainer(**{"accelerator": "cpu", **dict.fromkeys(off, False), **options})


def epoch(module: LightningModule, data: MadeImages, device: str) -> float:
    clock = Clock()
    quiet_trainer(max_epochs=1, callbacks=[clock], accelerator=device, devices=1).fit(module, datamodule=data)
    return clock.seconds


def time_epochs(rounds: int, steps: int, device: str) -> None:
    print(f"{machine(device)}; batch {BATCH}, {steps - SKIP} steps, {rounds} rounds")
    print("| teacher → student | no teacher | live teacher | warm cache | cache file |")
    print("|---|---|---|---|---|")
    cases: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
        "resnet32x4 → resnet8x4": (resnet32x4, resnet8x4),
        "resnet8x4 → resnet20": (resnet8x4, resnet20),
    }
    for name, (teacher, student) in cases.items():
        network = teacher(num_classes=100)
        times: dict[str, list[float]] = {"alone": [], "live": [], "cached": []}
        with tempfile.TemporaryDirectory() as folder:
            cache = TeacherCache(Path(folder) / "teacher.cache", augmentation="fixed")
            data = MadeImages(steps)
            teachers = {"live": FrozenTeacher(network), "cached": FrozenTeacher(network, cache=cache)}
            for index in range(rounds + 1):
                alone = ClassificationModule(student(num_classes=100), optimizer=sgd)
                modules: dict[str, LightningModule] = {"alone": alone}
                for kind, taught in teachers.items():
                    modules[kind] = DistillationModule(student(num_classes=100), taught, optimizer=sgd)
                for kind, module in modules.items():
                    seconds = epoch(module, data, device)
                    if index:  # the first round fills the cache
                        times[kind].append(seconds)
            assert not len(cache.missing())
            row_bytes = (cache.path.stat().st_size - 4096) / (steps * BATCH)
        median = statistics.median(times["alone"]) / (steps - SKIP) * 1000
        ratios = [statistics.median(t / a for t, a in zip(times[k], times["alone"], strict=True)) for k in times]
        figures = f"{median:.0f} ms a step | {ratios[1]:.2f}× | {ratios[2]:.2f}× | {row_bytes:g} bytes a sample"
        print(f"| {name} | {figures} |", flush=True)


def time_parts(calls: int) -> None:
    """One batch's way through the parts."""
    data = MadeImages(100)
    data.setup("fit")
    assert data.train_dataset is not None
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache(Path(folder) / "teacher.cache", augmentation="fixed")
        indexed = cache.index(data.train_dataset, "teacher")
        logits = torch.randn(len(indexed), 100)
        rows = torch.arange(len(indexed))
        cache.logits(rows, lambda: logits)
        cache.logits(rows, lambda: logits)
        batches = [torch.randint(len(indexed), (BATCH,)) for _ in range(32)]
        turns = itertools.cycle(batches)
        file: Any = cache._file

        def not_there() -> torch.Tensor:
            raise AssertionError

        def unverified() -> None:
            file._verified[:] = False
            cache.logits(next(turns), not_there)

        steps = {
            "read a batch's rows": lambda: cache.logits(next(turns), not_there),
            "… and compare them with their checksums": unverified,
            "augment a batch": lambda: data.train_dataset.__getitems__(next(turns).tolist()),  # pyright: ignore
            "… replayed": lambda: indexed.fetch(next(turns).tolist()),
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(calls):
            for name, step in steps.items():
                begin = time.process_time()
                step()
                times[name].append(time.process_time() - begin)
        for name, values in times.items():
            print(f"{name}: {statistics.median(values) * 1000:.2f} ms", flush=True)


def accuracy(seeds: int) -> None:
    print("| validation accuracy of the digits student, 66 images, 100 epochs | mean | each seed |")
    print("|---|---|---|")
    kinds: dict[str, tuple[bool, dict[str, Any] | None]] = {
        "no augmentation, live teacher": (False, None),
        "no augmentation, cache": (False, {}),
        "shifts, live teacher": (True, None),
        "shifts, cache, fixed": (True, {"augmentation": "fixed"}),
        "shifts, cache, replay in 4 slots": (True, {"augmentation": "replay", "slots": 4}),
        "shifts, cache, replay in 16 slots": (True, {"augmentation": "replay", "slots": 16}),
    }
    for name, (augment, options) in kinds.items():
        found = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            data = DigitsDataModule(batch_size=22, train_fraction=0.05, augment=augment)
            with tempfile.TemporaryDirectory() as folder:
                cache = None if options is None else TeacherCache(Path(folder) / "teacher.cache", seed=seed, **options)
                module = DistillationModule(
                    DigitsCNN(channels=(4, 8), hidden=16),
                    FrozenTeacher(DigitsCNN(), DIGITS_TEACHER, cache=cache),
                    optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
                    lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100),
                )
                trainer = quiet_trainer(max_epochs=100, num_sanity_val_steps=0, check_val_every_n_epoch=100)
                trainer.fit(module, datamodule=data)
            found.append(float(trainer.callback_metrics["val_acc"]))
        print(f"| {name} | {statistics.mean(found):.4f} | {', '.join(f'{value:.4f}' for value in found)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--calls", type=int, default=300, help="of each part of a batch")
    parser.add_argument("--fill", action="store_true")
    parser.add_argument("--latency", type=float, help="milliseconds of a read")
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of the epochs")
    arguments = parser.parse_args()
    check_device(parser, arguments.device)
    run_quietly(1)
    if arguments.fill:
        fill_and_read(arguments.rounds)
    elif arguments.latency is not None:
        read_slowly(arguments.latency, arguments.rounds)
    elif arguments.accuracy:
        accuracy(arguments.seeds)
    else:
        time_parts(arguments.calls)
        time_epochs(arguments.rounds, arguments.steps, arguments.device)


if __name__ == "__main__":
    main()
