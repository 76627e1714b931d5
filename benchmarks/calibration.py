"""Does a calibrated teacher teach better? The digits of the atlas, with and without the teacher's own temperature.

    uv run python -m benchmarks.calibration run    # writes benchmarks/calibration.csv
    uv run python -m benchmarks.calibration        # prints the table of docs/check.md from the CSV

The teacher, split, student and order of batches are those of the atlas (AdamW, 200 steps, kd_weight 0.9, task_weight
0.1). The teacher's temperature is fitted to its validation logits. An arm's learning rate is chosen by its
mean validation accuracy; the test part is read once, after training, and chooses nothing.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.atlas.paired import paired
from benchmarks.atlas.tasks import batches, data, mlp
from benchmarks.table import main
from kd_lightning import Distiller, calibrate
from kd_lightning.teachers import Calibration

CSV = Path(__file__).with_name("calibration.csv")
STEPS, SEEDS = 200, range(5)
TEACHER_STEPS, BATCH_SIZE, FEW = 600, 32, 100
RATES, TEMPERATURES = (0.005, 0.02, 0.08), (1.0, 2.0, 4.0, 8.0)


class Row(NamedTuple):
    """One training; ``own`` is the teacher's own temperature by which its logits are divided, 1 without calibration."""

    images: str
    calibrated: int
    temperature: float
    rate: float
    seed: int
    own: float
    ece_before: float
    ece_after: float
    val: float
    test: float


@cache
def teacher(seed: int) -> tuple[nn.Module, Calibration]:
    """Return the atlas' teacher, and its calibration on the validation part."""
    (x, y), val, _ = data("digits", seed)
    torch.manual_seed(seed)
    network = mlp(x.shape[1], 256, 256, 10)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, fused=True)
    for index in batches(len(x), TEACHER_STEPS, seed, BATCH_SIZE):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x[index]), y[index]).backward()
        optimizer.step()
    return network, calibrate(network, [val])


def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return 100 * (model(part[0]).argmax(-1) == part[1]).float().mean().item()


def train(images: str, calibrated: int, temperature: float, rate: float, seed: int) -> Row:
    """Train one student and score it."""
    (x, y), val, test = data("digits", seed)
    network, calibration = teacher(seed)
    with torch.no_grad():
        logits = network(x)
    logits = calibration.apply(logits) if calibrated else logits
    distiller = Distiller(None, temperature, kd_weight=0.9, task_weight=0.1)
    torch.manual_seed(1000 + seed)
    student = mlp(x.shape[1], 16, 10)
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, fused=True)
    for step, index in enumerate(batches(FEW if images == "few" else len(x), STEPS, seed, BATCH_SIZE)):
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        loss = distiller(x[index], student(x[index]), y[index], teacher_logits=logits[index]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert calibration.calibration_error is not None
    own = calibration.temperature[0] if calibrated else 1.0
    scores = accuracy(student, val), accuracy(student, test)
    return Row(images, calibrated, temperature, rate, seed, own, *calibration.calibration_error, *scores)


def trainings() -> Iterator[Row]:
    """Train every arm with every rate and seed."""
    for images in ("few", "many"):
        for temperature in TEMPERATURES:
            for calibrated in (0, 1):
                for rate in RATES:
                    for seed in SEEDS:
                        yield train(images, calibrated, temperature, rate, seed)


def chosen(rows: list[Row]) -> dict[tuple[str, int, float], dict[int, float]]:
    """Return the test accuracy by seed of each arm at the learning rate with the best mean validation accuracy."""
    arms: dict[tuple[str, int, float], dict[float, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        arms[row.images, row.calibrated, row.temperature][row.rate][row.seed] = row
    best = {arm: max(rates.values(), key=lambda by: statistics.mean(r.val for r in by.values()))
            for arm, rates in arms.items()}  # fmt: skip
    return {arm: {seed: row.test for seed, row in by.items()} for arm, by in best.items()}


def table(rows: list[Row]) -> str:
    """Return the Markdown table: test accuracy without and with calibration, and the paired difference."""
    arms = chosen(rows)
    lines = ["| images | T | as it is | calibrated | difference ± s.e. |", "|---|---|---|---|---|"]
    for images, _, temperature in (arm for arm in arms if arm[1] == 0):
        plain, ours = arms[images, 0, temperature], arms[images, 1, temperature]
        difference = paired(ours, plain)
        means = " | ".join(f"{statistics.mean(arm.values()):.2f}" for arm in (plain, ours))
        lines.append(f"| {images} | {temperature:g} | {means} | {difference.mean:+.2f} ± {difference.error:.2f} |")
    calibrated = {row.seed: row for row in rows if row.calibrated}
    own = sorted(row.own for row in calibrated.values())
    before, after = (statistics.mean(getattr(row, name) for row in calibrated.values())
                     for name in ("ece_before", "ece_after"))  # fmt: skip
    note = f"The teachers' own temperatures are {own[0]:.2f} to {own[-1]:.2f}; their calibration error falls from"
    return "\n".join(lines) + f"\n\n{note} {before:.4f} to {after:.4f} on the labels of the fit."


if __name__ == "__main__":
    main(CSV, Row, trainings, table)
