"""Rows of a measurement: written to a CSV as they come, read again, and printed as a table."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch

RowT = TypeVar("RowT", bound=tuple[Any, ...])


def read(path: Path, kind: Callable[..., RowT]) -> list[RowT]:
    """Return the rows of a CSV as ``kind``, a NamedTuple whose fields are text, whole numbers or floats."""
    kinds = get_type_hints(kind)
    with path.open(newline="") as file:
        return [kind(**{name: kinds[name](cell) for name, cell in row.items()}) for row in csv.DictReader(file)]


def main(
    path: Path, kind: Callable[..., RowT], measure: Callable[[], Iterable[RowT]], table: Callable[[list[RowT]], str]
) -> None:
    """Measure and write the CSV if the command line says ``run``, and print the table of its rows."""
    torch.set_num_threads(1)
    if sys.argv[1:] == ["run"]:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(get_type_hints(kind))
            for row in measure():
                writer.writerow(f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row)
                file.flush()
    print(table(read(path, kind)))
