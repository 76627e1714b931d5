"""The result of a sweep: cells, a table, a choice by validation."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_lightning.ranking import Lead, Mode, Scored, align, candidate_name, rank, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SweepRun:
    """A single run of a sweep.

    Attributes:
        number: Number of the run's trial in the study.
        temperature: The temperature; None in the baseline.
        kd_weight: Weight of the distillation term; 0 in the baseline.
        task_weight: Weight of the task term.
        seed: The run's seed.
        state: ``"complete"``, ``"pruned"``, ``"failed"``, ``"running"`` or ``"waiting"``.
        score: The best validation value; None if the run has no validation.
        epoch: The epoch of the best validation value, from 0.
        seconds: Duration in seconds.
        reason: The error of a failed run.
        folder: Folder of logs and weights, relative to the sweep's folder.
        test: Metrics of the test set; empty where the test set was not measured.
    """

    number: int
    temperature: float | None
    kd_weight: float
    task_weight: float
    seed: int
    state: str
    score: float | None = None
    epoch: int | None = None
    seconds: float | None = None
    reason: str = ""
    folder: str = ""
    test: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return the run's name, made of its cell and seed."""
        return f"{_cell_name(self.temperature, self.kd_weight)}, seed {self.seed}"


@dataclass(frozen=True)
class SweepCell(Scored):
    """A pair of temperature and weight with the runs of all seeds; the baseline if the temperature is None.

    Example:
        >>> runs = [SweepRun(n, 4.0, 0.9, 0.1, n, "complete", score) for n, score in enumerate((0.8, 0.9))]
        >>> cell = SweepCell(4.0, 0.9, runs)
        >>> cell.name, cell.complete, round(cell.mean, 3), round(cell.std, 3)
        ('temperature 4, kd_weight 0.9', True, 0.85, 0.071)
    """

    temperature: float | None
    kd_weight: float
    runs: Sequence[SweepRun]

    @property
    def name(self) -> str:
        """Return the cell's name."""
        return _cell_name(self.temperature, self.kd_weight)

    @property
    def complete(self) -> bool:
        """Return whether the runs of all seeds are complete."""
        return all(run.state == "complete" for run in self.runs)

    @property
    def scores(self) -> list[float]:
        """Return the validation scores of the complete runs."""
        return [run.score for run in self.runs if run.state == "complete" and run.score is not None]

    def test_scores(self, metric: str) -> list[float]:
        """Return the test scores of the runs that were measured on the test set."""
        return [run.test[metric] for run in self.runs if metric in run.test]


@dataclass(frozen=True)
class SweepResult:
    """The cells of a sweep and their ranking.

    Attributes:
        cells: In the order of temperature, then weight.
        baseline: The same student without the teacher; None if the sweep has no baseline.
        monitor: The validation metric.
        mode: ``"max"`` if larger is better.
        output: The sweep's folder.
        not_tested: The reason why the test set was not measured; empty if it was measured.
    """

    cells: Sequence[SweepCell]
    baseline: SweepCell | None
    monitor: str
    mode: Mode
    output: Path
    not_tested: str = ""

    @property
    def ranking(self) -> list[SweepCell]:
        """Return the complete cells by their mean score, the best first."""
        return rank((cell for cell in self.cells if cell.complete), self.mode)

    @property
    def best(self) -> SweepCell | None:
        """Return the cell with the best mean validation score, the baseline aside; None if no cell is complete."""
        return next(iter(self.ranking), None)

    @property
    def _rows(self) -> list[SweepCell]:
        return [*self.cells, *([] if self.baseline is None else [self.baseline])]

    @property
    def runs(self) -> list[SweepRun]:
        """Return all runs, including the baseline's."""
        return [run for cell in self._rows for run in cell.runs]

    @property
    def test_metric(self) -> str:
        """Return the name of the monitored metric's counterpart on the test set."""
        return self.monitor.replace("val", "test", 1)

    @property
    def is_drawable(self) -> bool:
        """Return True if a cell or the baseline has a score."""
        return any(run.state == "complete" and run.score is not None for run in self.runs)

    def rows(self) -> list[list[str]]:
        """Return the rows of the table, headings first, the baseline last."""
        rows = [["temperature", "kd_weight", self.monitor, "lowest", "highest", "runs"]]
        for cell in self._rows:
            scores = cell.scores
            extremes = [f"{value:.4f}" for value in (min(scores), max(scores))] if scores else ["", ""]
            head = ["no teacher", ""] if cell.temperature is None else [f"{cell.temperature:g}", f"{cell.kd_weight:g}"]
            counts = {state: sum(run.state == state for run in cell.runs) for state in ("pruned", "failed")}
            ends = "".join(f", {count} {state}" for state, count in counts.items() if count)
            rows.append([*head, show(scores), *extremes, f"{len(scores)}{ends}"])
        return rows

    def verdict(self) -> list[str]:
        """Return sentences on the chosen cell, its lead over the next one and the baseline, and its test score."""
        ranking, baseline = self.ranking, self.baseline
        if not ranking:
            without = "" if baseline is None else f"; no teacher {show(baseline.scores)}"
            return [f"no cell has all its runs complete: nothing is chosen{without}"]
        best = ranking[0]

        def compare(other: SweepCell, name: str) -> str:
            return Lead.of(best.scores, other.scores, self.mode).describe(name, "--seeds 3")

        lines = [f"best by {self.monitor}: {best.name}, {show(best.scores)}"]
        if len(ranking) > 1:
            lines.append(compare(ranking[1], ranking[1].name))
        if baseline is not None and baseline.complete:
            lines.append(compare(baseline, f"no teacher ({show(baseline.scores)})"))
        if tests := best.test_scores(self.test_metric):
            without = [] if baseline is None else baseline.test_scores(self.test_metric)
            beside = f"; no teacher {show(without)}" if without else ""
            lines.append(f"{self.test_metric}, measured once: {show(tests)}{beside}")
        else:
            lines.append(f"{self.test_metric} was not measured{': ' if self.not_tested else ''}{self.not_tested}")
        return [*lines, *([self.warning] if self.warning else [])]

    @property
    def warning(self) -> str:
        """Return a sentence if the baseline is better by validation or on the test set than the choice, else ``""``."""
        best, baseline = self.best, self.baseline
        if best is None or baseline is None or not baseline.complete:
            return ""
        tests = best.test_scores(self.test_metric), baseline.test_scores(self.test_metric)
        pairs = {self.monitor: (best.scores, baseline.scores)}
        if len(tests[0]) == len(tests[1]) > 0:
            pairs[self.test_metric] = tests
        lost = [name for name, pair in pairs.items() if Lead.of(*pair, self.mode).amount < 0]
        if not lost:
            return ""
        scores = "; ".join(f"{name} {show(scores)} against {show(others)}" for name, (scores, others) in pairs.items())
        return f"the choice loses to the student without a teacher by {' and '.join(lost)}: {scores}"

    def table(self) -> str:
        """Return the rows as aligned text, followed by the verdict and the errors of failed runs."""
        failed = [f"{run.name}: {run.reason}" for run in self.runs if run.state == "failed"]
        return "\n".join([*align(self.rows()), *self.verdict(), *failed])

    def plot(self) -> Figure:
        """Draw the heat-map of temperature × weight, or the curve over the temperature if there is one weight.

        Raises:
            ValueError: If no run is complete.
        """
        from kd_lightning.plotting import plot_sweep

        cells: Any = [(cell.temperature, cell.kd_weight, cell.scores) for cell in self.cells]
        best: Any = None if self.best is None else (self.best.temperature, self.best.kd_weight)
        baseline = None if self.baseline is None else self.baseline.scores
        return plot_sweep(cells, self.monitor, baseline=baseline, best=best, mode=self.mode)

    def write_csv(self, path: Path) -> None:
        """Write one line per run."""
        names = sorted({name for run in self.runs for name in run.test})
        columns = ["number", "temperature", "kd_weight", "task_weight", "seed", "state"]
        columns += [self.monitor, "epoch", "seconds", *names, "folder", "reason"]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            for run in self.runs:
                seconds = None if run.seconds is None else f"{run.seconds:.1f}"
                writer.writerow({**vars(run), **run.test, self.monitor: run.score, "seconds": seconds})


def _cell_name(temperature: float | None, kd_weight: float) -> str:
    return "no teacher" if temperature is None else candidate_name(temperature, kd_weight)
