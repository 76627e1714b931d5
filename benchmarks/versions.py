"""The time of losses and training steps in this checkout beside another commit's, in one run.

    python benchmarks/versions.py e08dbfc    # e08dbfc: the last commit before the package was rebuilt by rooms

The other commit's tree is written to a temporary folder. The two versions run in turn, each time in a process of its
own, on one thread; the figure is the median over rounds of the ratio of a round's two processor times (this checkout /
the other), with its least and greatest.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

HERE = Path(__file__).resolve()
SHAPES = [(128, 100), (256, 1000)]


def losses() -> dict[str, Callable[[], None]]:
    """Return forward and backward of the losses that both versions have."""
    from kd_lightning import functional

    T = torch.tensor(4.0)
    steps: dict[str, Callable[[], None]] = {}
    for shape in SHAPES:
        s, t, y = torch.randn(shape, requires_grad=True), torch.randn(shape), torch.randint(shape[1], shape[:1])
        variants: dict[str, Callable[[], Tensor]] = {
            "KD": lambda s=s, t=t: functional.kd_loss(s, t, T),
            "KD with targets": lambda s=s, t=t, y=y: functional.kd_loss(s, t, T, targets=y),
            "reverse KL": lambda s=s, t=t: functional.reverse_kd_loss(s, t, T),
            "JSD": lambda s=s, t=t: functional.jsd_loss(s, t, T),
            "DKD": lambda s=s, t=t, y=y: functional.dkd_loss(s, t, T, targets=y),
            "NKD": lambda s=s, t=t, y=y: functional.nkd_loss(s, t, T, targets=y),
            "DIST": lambda s=s, t=t: functional.dist_loss(s, t, T),
        }
        for name, loss in variants.items():
            steps[f"{name}, {shape[0]} × {shape[1]}"] = lambda loss=loss: loss().backward()
    return steps


def training_steps() -> dict[str, Callable[[], None]]:
    """Return a bare step of the Distiller, and a short fit of the module."""
    from lightning.pytorch import Trainer
    from torch import nn

    from kd_lightning import DistillationModule, Distiller, FrozenTeacher
    from kd_lightning.models import DigitsCNN, resnet8x4, resnet20

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)

    def bare(teacher: nn.Module, student: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
        distiller, optimizer = Distiller(FrozenTeacher(teacher), 4.0), sgd(student.parameters())

        def step() -> None:
            optimizer.zero_grad()
            distiller(x, student(x), y).loss.backward()
            optimizer.step()

        return step

    digits, labels = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
    images, classes = torch.randn(64, 3, 32, 32), torch.randint(100, (64,))
    data: Any = TensorDataset(digits.repeat(40, 1, 1, 1), labels.repeat(40))

    def fit() -> None:
        module = DistillationModule(DigitsCNN(channels=(4, 8), hidden=16), FrozenTeacher(DigitsCNN()), optimizer=sgd)
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(data, batch_size=64))

    return {
        "Distiller, DigitsCNN, 64 × 1 × 8 × 8": bare(DigitsCNN(), DigitsCNN(channels=(4, 8)), digits, labels),
        "Distiller, resnet8x4 → resnet20, 64 × 3 × 32 × 32": bare(resnet8x4(), resnet20(), images, classes),
        "DistillationModule, a fit of 40 steps, DigitsCNN": fit,
    }


def measure_here(seconds: float) -> None:
    """Print the seconds of everything, as JSON; ``kd_lightning`` is the one that PYTHONPATH names."""
    measure.run_quietly(1)
    torch.manual_seed(0)
    times = measure.interleaved_times(losses(), seconds, "cpu", clock=time.process_time)
    print(json.dumps(times | measure.interleaved_times(training_steps(), seconds, "cpu", clock=time.process_time)))


def measured(tree: Path, seconds: float) -> dict[str, float]:
    """Return the seconds of everything with the package of that tree."""
    command = [sys.executable, str(HERE), "--here", str(seconds)]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", default="e08dbfc")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=8.0, help="of the losses, and of the steps, in each round")
    parser.add_argument("--here", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        measure_here(options.here)
        return
    this = HERE.parent.parent
    archive = subprocess.run(["git", "archive", options.commit], cwd=this, capture_output=True, check=True).stdout
    rounds: list[tuple[dict[str, float], dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        for _ in range(options.rounds):
            trees = [this, Path(folder)]
            times = {tree: measured(tree, options.seconds) for tree in random.sample(trees, 2)}
            rounds.append((times[trees[0]], times[trees[1]]))
    print(f"{measure.machine('cpu')}; processor time of one thread; {options.rounds} rounds\n")
    print(
        f"| forward and backward | {options.commit} | this / {options.commit} | least – greatest |\n|---|---|---|---|"
    )
    for name in rounds[0][0]:
        ratios = [here[name] / other[name] for here, other in rounds]
        milliseconds = 1000 * statistics.median(other[name] for _, other in rounds)
        middle = f"{statistics.median(ratios):.2f} | {min(ratios):.2f} – {max(ratios):.2f}"
        print(f"| {name} | {milliseconds:.3f} ms | {middle} |")


if __name__ == "__main__":
    main()
