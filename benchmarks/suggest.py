"""Compare rules for a temperature with the atlas: the rule's T, the finder's, T = 4, and the best of each setting.

    uv run --with mlxtend python -m benchmarks.suggest run    # writes benchmarks/suggest.csv: rules, and finder runs
    uv run python -m benchmarks.suggest                       # prints the table of docs/check.md from the CSV

A rule reads the teacher's logits of the training images alone (geometric mean of T over the atlas' seeds). Its gain in
a setting is that of the atlas' arm whose temperature is the nearest on a log scale, in points of test accuracy over no
teacher at the last step; its regret is what the setting's best temperature gains more. The finder trains for a
setting's length, but at most 200 steps, with three seeds and the learning rate of the arm T = 4.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.atlas.__main__ import CSV as ATLAS
from benchmarks.atlas.arms import ANCHOR, KD_WEIGHT, TASK_WEIGHT
from benchmarks.atlas.paired import chosen
from benchmarks.atlas.plan import STUDIES
from benchmarks.atlas.rows import Setting
from benchmarks.atlas.rows import read as read_atlas
from benchmarks.atlas.tasks import TASKS, data, rows_of, teacher_logits
from benchmarks.table import main
from kd_lightning import DistillationModule
from kd_lightning.callbacks import TemperatureFinder
from kd_lightning.functional import suggest_temperature

CSV = Path(__file__).with_name("suggest.csv")
TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0)
RULES: dict[str, dict[str, Any]] = {
    **{f"entropy {h:g}": {"entropy": h} for h in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)},
    **{f"top_probability {p:g}": {"top_probability": p} for p in (0.99, 0.9, 0.7, 0.5, 0.3)},
}
GROUPS: dict[str, Callable[[Row], bool]] = {
    "all": lambda row: True,
    "few, x1 and x4": lambda row: row.images == "few" and row.length != "x1/4",
    "few, x1/4": lambda row: row.images == "few" and row.length == "x1/4",
    "many": lambda row: row.images == "many",
}


class Row(NamedTuple):
    """What a rule chooses in a setting of the atlas."""

    task: str
    images: str
    optimizer: str
    length: str
    weighting: str
    rule: str
    temperature: float
    gain: float
    regret: float


def found(setting: Setting, rate: float) -> float:
    """Return the temperature that TemperatureFinder suggests in a setting, on its validation part."""
    task, ((x, y), val, _) = TASKS[setting.task], data(setting.task, 0)
    rows = rows_of(setting.images, y)
    finder = TemperatureFinder(TEMPERATURES, min(task.steps[setting.length], 200), find_only=True)
    module = _Student(
        student=task.student(x, task.classes),
        teacher="batch:teacher",
        temperature=4.0,
        kd_weight=KD_WEIGHT,
        task_weight=TASK_WEIGHT,
        optimizer=partial(torch.optim.AdamW, lr=rate)
        if setting.optimizer == "adamw"
        else partial(torch.optim.SGD, lr=rate, momentum=0.9),
    )
    train = TensorDataset(x[rows], y[rows], teacher_logits(setting.task, "many", 0)[rows])
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[finder], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(
        module,
        DataLoader(train, batch_size=task.batch_size, shuffle=True, collate_fn=_named),
        DataLoader(TensorDataset(*val), batch_size=1000, collate_fn=_named),
    )
    suggestion = finder.suggestion()
    assert suggestion is not None
    return suggestion


class _Student(DistillationModule):
    """A module whose batches are mappings of images, labels and the teacher's logits."""

    def unpack_batch(self, batch: Any) -> tuple[Any, Any]:
        return batch["images"], batch["labels"]


def _named(samples: list[tuple[torch.Tensor, ...]]) -> dict[str, torch.Tensor]:
    parts = [torch.stack(part) for part in zip(*samples, strict=True)]
    return dict(zip(("images", "labels", "teacher"), parts, strict=False))


def choices() -> Iterator[Row]:
    """Yield what each rule chooses in each setting."""
    results = chosen(read_atlas(ATLAS), "last")
    settings = STUDIES["constants"].settings
    ruled = {
        (task, name): statistics.geometric_mean(
            suggest_temperature(teacher_logits(task, "many", seed), **rule) for seed in range(TASKS[task].seeds)
        )
        for task in dict.fromkeys(setting.task for setting in settings)
        for name, rule in RULES.items()
    }
    for setting in settings:
        arms = results[setting]
        base = statistics.mean(arms["none", 0.0].tests.values())
        from_finder = found(setting, arms["fixed", 4.0].rate)
        for weighting in ("fixed", "equal"):
            gains = {
                t: statistics.mean(arms["fixed" if t == ANCHOR else weighting, t].tests.values()) - base
                for t in TEMPERATURES
            }
            best = max(gains, key=lambda t: gains[t])
            named = {name: ruled[setting.task, name] for name in RULES} | {f"T = {t:g}": t for t in TEMPERATURES}
            named |= {"best T of the setting": best} | ({"finder": from_finder} if weighting == "fixed" else {})
            for name, temperature in named.items():
                nearest = min(TEMPERATURES, key=lambda t: abs(math.log(t / temperature)))
                yield Row(*setting[:4], weighting, name, temperature, gains[nearest], gains[best] - gains[nearest])


def table(rows: list[Row]) -> str:
    """Return the Markdown table of mean gains at a fixed kd_weight, and the regret of both weightings."""
    by_rule: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_rule[row.rule].append(row)
    heads = ["rule", "T digits, MNIST-5k", *(f"gain, {group}" for group in GROUPS), "regret ± s.e.", "regret, equal"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, own in by_rule.items():
        fixed = [row for row in own if row.weighting == "fixed"]
        ranges = []
        for task in ("digits", "mnist5k"):
            temperatures = sorted({row.temperature for row in fixed if row.task == task})
            ranges.append("–".join(f"{t:.3g}" for t in dict.fromkeys((temperatures[0], temperatures[-1]))))
        cells = [name, ", ".join(ranges)]
        cells += [f"{statistics.mean(row.gain for row in fixed if is_in(row)):+.2f}" for is_in in GROUPS.values()]
        regrets = [row.regret for row in fixed]
        error = statistics.stdev(regrets) / math.sqrt(len(regrets))
        cells.append(f"{statistics.mean(regrets):.2f} ± {error:.2f}")
        equal = [row.regret for row in own if row.weighting == "equal"]
        cells.append(f"{statistics.mean(equal):.2f}" if equal else "not run")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(CSV, Row, choices, table)
