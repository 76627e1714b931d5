"""Bytes a token and the error of the student's gradient, of targets of a few classes against all logits.

    python benchmarks/sparse.py                 # about two minutes on two cores

The teacher is a trigram model of words, with absolute discounting, of the sources of Python's standard library on this
machine; the student is the bigram model of the same text, or knows nothing (equal logits). Distributions of positions
that neither was counted on are compared: the error is ‖g − g_all‖ / ‖g_all‖ of the gradients of ``kd_loss`` with
respect to the student's logits, over all tokens and classes ("token"), or of their sums over the tokens, in which
errors of both signs cancel ("batch"). "cache" is what ``TeacherCache(top_k=k, temperature=T)`` stores, in float16;
"sampled" is made at T too; "uniform" and "renormalize" are made at 1 and brought to T. Prints a table; writes
``out/sparse.csv`` beside this file.
"""

from __future__ import annotations

import argparse
import csv
import re
import sysconfig
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from kd_lightning.functional import Sparse, kd_loss
from kd_lightning.teachers import TeacherCache

OUT = Path(__file__).parent / "out"
VOCABULARY, TOKENS, DISCOUNT = 32_000, 512, 0.75


class Row(NamedTuple):
    """One line of the table."""

    student: str
    targets: str
    k: int
    temperature: float
    bytes_per_token: int
    token_error: float
    batch_error: float


def words() -> list[int]:
    """Return the standard library as word numbers; the rarest words are one."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.rglob("*.py") if "site-packages" not in path.parts)
    text = [word for path in files for word in re.findall(r"\w+|[^\w\s]", path.read_text(errors="ignore"))]
    number = {word: i for i, (word, _) in enumerate(Counter(text).most_common(VOCABULARY - 1))}
    return [number.get(word, VOCABULARY - 1) for word in text]


class Trigrams:
    """A language model by counts, interpolated with those of shorter contexts."""

    def __init__(self, tokens: list[int]) -> None:
        counts = torch.bincount(torch.tensor(tokens), minlength=VOCABULARY).double() + 0.1
        self.unigram = counts / counts.sum()
        self.after: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for one, two, three in zip(tokens, tokens[1:], tokens[2:], strict=False):
            self.after[two,][three] += 1
            self.after[one, two][three] += 1

    def __call__(self, *context: int) -> Tensor:
        """Return the probabilities of the next word."""
        lower = self(*context[1:]) if context else self.unigram
        found = self.after.get(context) if context else None
        if not found:
            return lower
        total = sum(found.values())
        places = torch.tensor([*found])
        of_counts = torch.tensor([*found.values()], dtype=torch.float64) - DISCOUNT
        return (lower * DISCOUNT * len(found)).index_add(0, places, of_counts) / total


def cached(logits: Tensor, k: int, t: float) -> tuple[Sparse, int]:
    """Return the targets through the file of a cache, and its bytes per token."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = TeacherCache(Path(folder) / "teacher.cache", top_k=k, temperature=t)
        cache.index(TensorDataset(torch.zeros(1)), "trigrams")
        target = cache.logits(torch.tensor([0]), lambda: logits[None])
        size = cache.path.stat().st_size - 4096 - 5
    return Sparse(target.indices[0], target.log_probs[0], t, "bucket", target.log_rest[0]), size // len(logits)


def targets_of(logits: Tensor, k: int, t: float) -> Iterator[tuple[str, Sparse, int]]:
    """Yield every kind of targets with their bytes per token."""
    few = 4 * k  # an id of two bytes and a float16
    yield "cache", *cached(logits, k, t)
    yield "uniform", Sparse.top_k(logits, k, 1.0, "uniform"), few + 2
    yield "renormalize", Sparse.top_k(logits, k, 1.0, "renormalize"), few
    yield "sampled", Sparse.sampled(logits, k, t, torch.Generator().manual_seed(0)), few


def gradient(student: Tensor, teacher: Tensor | Sparse, t: float) -> Tensor:
    student = student.clone().requires_grad_()
    return torch.autograd.grad(kd_loss(student, teacher, t), student)[0]


def measure(ks: list[int], temperatures: list[float]) -> Iterator[Row]:
    tokens = words()
    split = int(0.9 * len(tokens))
    model = Trigrams(tokens[:split])
    places = torch.randint(split, len(tokens) - 2, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    teacher = torch.stack([model(*tokens[i : i + 2]).log() for i in places]).float()
    students = {
        "bigram": torch.stack([model(tokens[i + 1]).log() for i in places]).float(),
        "untrained": torch.zeros_like(teacher),
    }
    print(f"{len(tokens):,} words; the teacher's entropy is {-(teacher.exp() * teacher).sum(-1).mean():.2f} nats")
    for name, student in students.items():
        for t in temperatures:
            exact = gradient(student, teacher, t)
            for k in ks:
                for kind, target, size in targets_of(teacher, k, t):
                    error = gradient(student, target, t) - exact
                    per_token = error.norm() / exact.norm()
                    batch = error.sum(0).norm() / exact.sum(0).norm()
                    yield Row(name, kind, k, t, size, round(per_token.item(), 4), round(batch.item(), 4))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    options = parser.parse_args()
    rows = []
    for row in measure(options.k, options.temperatures):
        rows.append(row)
        print("{:10} {:11} k={:<4} T={:<4} {:5} bytes  token {:8.4f}  batch {:8.4f}".format(*row))
    OUT.mkdir(exist_ok=True)
    with (OUT / "sparse.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)


if __name__ == "__main__":
    main()
