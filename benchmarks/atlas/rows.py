"""Rows of the CSV: the settings of a training and its scores."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

PLAIN = "plain"
"""The kind of teacher of rows that name no other."""


class Setting(NamedTuple):
    """Everything that arms compared with each other share."""

    task: str
    images: str
    optimizer: str
    length: str
    teacher: str = PLAIN

    def __str__(self) -> str:
        return " ".join(self[:4] if self.teacher == PLAIN else self)


Arm = tuple[str, float]
"""The weighting ("none", "fixed", "equal") and its T, or a policy's name and 0."""


class Key(NamedTuple):
    """All settings of one training."""

    task: str
    images: str
    optimizer: str
    length: str
    weighting: str
    temperature: float
    rate: float
    seed: int
    teacher: str = PLAIN

    @property
    def setting(self) -> Setting:
        return Setting(*self[:4], self.teacher)

    @property
    def arm(self) -> Arm:
        return self.weighting, self.temperature


class Scores(NamedTuple):
    """Accuracy in percent, or −bits per byte, after the last step and at the best validation of ten."""

    val_last: float
    test_last: float
    val_best: float
    test_best: float


Rows = dict[Key, Scores]
COLUMNS = (*Key._fields[:-1], *Scores._fields, "teacher")


def read(path: Path) -> Rows:
    """Return the finished rows; a line that an interrupted process left half-written is not one."""
    if not path.exists():
        return {}
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    rows: Rows = {}
    for row in csv.DictReader(lines):
        setting = Setting(*(row[name] for name in Setting._fields))
        arm = row["weighting"], float(row["temperature"])
        key = Key(*setting[:4], *arm, float(row["rate"]), int(row["seed"]), setting.teacher)
        rows[key] = Scores(*(float(row[name]) for name in Scores._fields))
    return rows


def run(path: Path, keys: Iterable[Key], train: Callable[[Key], Scores], deadline: float = math.inf) -> int:
    """Train the keys that the file lacks, append each when finished, and return their number."""
    done = read(path)
    text = path.read_text() if path.exists() else ""
    if not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1] or ",".join(COLUMNS) + "\n")
    count = 0
    for key in keys:
        if time.time() > deadline:
            break
        if key not in done:
            scores = train(key)
            line = ",".join((*map(str, key[:-1]), *(f"{value:.4f}" for value in scores), key.teacher))
            with path.open("a") as file:
                file.write(line + "\n")
            count += 1
    return count
