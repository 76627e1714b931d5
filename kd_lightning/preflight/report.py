"""The report of a preflight: lines with a verdict each, as a table, as JSON and as a figure."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor

from kd_lightning.plotting import plot_softening

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Verdict: TypeAlias = Literal["ok", "look", "wrong"]
_WIDTH = 110


@dataclass(frozen=True)
class Line:
    """A single finding.

    Attributes:
        name: What was looked at.
        verdict: ``"ok"``; ``"look"`` where the value is unusual; ``"wrong"`` where the run cannot do what it is for.
        text: The values in words.
        advice: What to type or change; empty where there is nothing to do.
        values: The numbers, for machines.
    """

    name: str
    verdict: Verdict
    text: str
    advice: str = ""
    values: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The lines of a preflight, and what its figure is drawn from.

    Attributes:
        lines: In the order in which a step computes.
        teacher_logits: Rows of the teacher's logits, ``(N, C)``; empty where there are none.
        temperatures: The teacher's temperature at the start, in the middle and at the end of the run.

    Example:
        >>> import torch
        >>> lines = (Line("labels", "wrong", "label 10 of 10 classes", "number the classes from 0"),)
        >>> report = Report(lines, torch.empty(0, 10), (4.0,))
        >>> report.ok
        False
        >>> print(report)
        wrong  labels  label 10 of 10 classes
                       -> number the classes from 0
        1 line: 1 wrong
    """

    lines: tuple[Line, ...]
    teacher_logits: Tensor = field(repr=False, compare=False)
    temperatures: tuple[float, ...]

    @property
    def ok(self) -> bool:
        """Return True if no line is wrong."""
        return all(line.verdict != "wrong" for line in self.lines)

    def __getitem__(self, name: str) -> Line:
        """Return the line of this name.

        Raises:
            KeyError: If there is no such line; a line after one that stops the preflight is absent.
        """
        found = {line.name: line for line in self.lines}
        return found[name]

    def __str__(self) -> str:
        width = max((len(line.name) for line in self.lines), default=0)
        rows = []
        for line in self.lines:
            start = f"{line.verdict:<5}  {line.name:<{width}}  "
            rest = " " * len(start)
            rows += textwrap.wrap(line.text, _WIDTH, initial_indent=start, subsequent_indent=rest)
            rows += textwrap.wrap(line.advice, _WIDTH, initial_indent=f"{rest}-> ", subsequent_indent=f"{rest}   ")
        verdicts = [line.verdict for line in self.lines]
        counts = [f"{verdicts.count(kind)} {kind}" for kind in ("ok", "look", "wrong") if kind in verdicts]
        return "\n".join([*rows, f"{len(verdicts)} line{'s'[: len(verdicts) != 1]}: {', '.join(counts)}"])

    def as_dict(self) -> dict[str, Any]:
        """Return the report as primitives: ``ok``, ``temperatures`` and ``lines``."""
        lines = [{**vars(line), "values": dict(line.values)} for line in self.lines]
        return {"ok": self.ok, "temperatures": list(self.temperatures), "lines": lines}

    def plot(self) -> Figure:
        """Draw how the teacher's targets soften with T, with the run's temperatures marked; see plot_softening.

        Raises:
            ValueError: If there are no teacher logits to draw.
        """
        if not len(self.teacher_logits) or not self.temperatures:
            raise ValueError("there are no teacher logits to draw: put right first what the report calls wrong.")
        return plot_softening(self.teacher_logits, sorted(set(self.temperatures)))
