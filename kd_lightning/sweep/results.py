"""What a sweep found: cells, a table, a choice by validation."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kd_lightning.callbacks.common import paired_lead

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SweepCell", "SweepResult", "SweepRun"]


@dataclass(frozen=True)
class SweepRun:
    """One run.

    Attributes:
        number: Of its trial in the study.
        temperature: None in the baseline.
        kd_weight: 0 in the baseline.
        task_weight: Weight of the task term.
        seed: Its seed.
        state: ``"complete"``, ``"pruned"``, ``"failed"``, ``"running"`` or ``"waiting"``.
        score: The best validation value; None without one.
        epoch: The epoch of that value, from 0.
        seconds: How long it took.
        reason: Why it failed.
        folder: Logs and weights, beneath the sweep's folder.
        test: Metrics of the test set; empty where it was not measured.
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
        """Cell and seed in words."""
        return f"{_cell_name(self.temperature, self.kd_weight)}, seed {self.seed}"


@dataclass(frozen=True)
class SweepCell:
    """One temperature and weight with all its seeds; without a temperature it is the baseline.

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
        """The cell in words."""
        return _cell_name(self.temperature, self.kd_weight)

    @property
    def complete(self) -> bool:
        """Whether every seed ran to its end."""
        return all(run.state == "complete" for run in self.runs)

    @property
    def scores(self) -> list[float]:
        """The validation scores of the complete runs."""
        return [run.score for run in self.runs if run.state == "complete" and run.score is not None]

    @property
    def mean(self) -> float:
        """Mean score; NaN where no run is complete."""
        return mean_and_std(self.scores)[0]

    @property
    def std(self) -> float:
        """Standard deviation over the seeds; NaN for fewer than two."""
        return mean_and_std(self.scores)[1]

    def test_scores(self, metric: str) -> list[float]:
        """The test scores of the runs that were measured."""
        return [run.test[metric] for run in self.runs if metric in run.test]


@dataclass(frozen=True)
class SweepResult:
    """All cells of a sweep, and which is the best.

    Attributes:
        cells: In the order of temperature, then weight.
        baseline: The same student without the teacher; None where it was left out.
        monitor: The validation metric.
        mode: ``"max"`` if larger is better.
        output: The sweep's folder.
        not_tested: Why the test set was not measured; empty if it was.
    """

    cells: Sequence[SweepCell]
    baseline: SweepCell | None
    monitor: str
    mode: str
    output: Path
    not_tested: str = ""

    @property
    def ranking(self) -> list[SweepCell]:
        """The complete cells by their mean score, the best first."""
        sign = -1.0 if self.mode == "max" else 1.0
        return sorted((cell for cell in self.cells if cell.complete and cell.runs), key=lambda cell: sign * cell.mean)

    @property
    def best(self) -> SweepCell | None:
        """The cell with the best mean validation score over all seeds; the baseline takes no part. None without one."""
        return next(iter(self.ranking), None)

    @property
    def runs(self) -> list[SweepRun]:
        """All runs, the baseline's too."""
        rows = [*self.cells, *([] if self.baseline is None else [self.baseline])]
        return [run for cell in rows for run in cell.runs]

    @property
    def test_metric(self) -> str:
        """The test twin of the monitored metric."""
        return self.monitor.replace("val", "test", 1)

    def rows(self) -> list[list[str]]:
        """The table's cells, headings first, the baseline last."""
        rows = [["temperature", "kd_weight", self.monitor, "lowest", "highest", "runs"]]
        for cell in [*self.cells, *([] if self.baseline is None else [self.baseline])]:
            scores = cell.scores
            extremes = [f"{value:.4f}" for value in (min(scores), max(scores))] if scores else ["", ""]
            head = ["no teacher", ""] if cell.temperature is None else [f"{cell.temperature:g}", f"{cell.kd_weight:g}"]
            counts = {state: sum(run.state == state for run in cell.runs) for state in ("pruned", "failed")}
            ends = "".join(f", {count} {state}" for state, count in counts.items() if count)
            rows.append([*head, show(scores), *extremes, f"{len(scores)}{ends}"])
        return rows

    def verdict(self) -> list[str]:
        """The choice, what it is worth, and its test score, in sentences."""
        ranking, baseline = self.ranking, self.baseline
        if not ranking:
            return ["no cell has all its runs complete: nothing is chosen"]
        best = ranking[0]
        lines = [f"best by {self.monitor}: {best.name}, {show(best.scores)}"]
        if len(ranking) > 1:
            lines.append(self._compare(best, ranking[1], ranking[1].name))
        if baseline is not None and baseline.complete:
            lines.append(self._compare(best, baseline, f"no teacher ({show(baseline.scores)})"))
        tests = best.test_scores(self.test_metric)
        if tests:
            without = [] if baseline is None else baseline.test_scores(self.test_metric)
            beside = f"; no teacher {show(without)}" if without else ""
            lines.append(f"{self.test_metric}, measured once: {show(tests)}{beside}")
        else:
            lines.append(f"{self.test_metric} was not measured{': ' if self.not_tested else ''}{self.not_tested}")
        return lines

    def _compare(self, best: SweepCell, other: SweepCell, name: str) -> str:
        lead, error, worth = paired_lead(best.scores, other.scores)
        lead *= 1 if self.mode == "max" else -1
        text = f"it {'trails' if lead < 0 else 'leads'} {name} by {abs(lead):.4f}"
        if len(best.scores) < 2:
            return f"{text} on one seed: --seeds 3 shows how noisy that is"
        return f"{text} ± {error:.4f} (standard error over {len(best.scores)} paired seeds): {worth}"

    def table(self) -> str:
        """Mean ± standard deviation for each cell, the baseline beneath, then the choice."""
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        failed = [f"{run.name}: {run.reason}" for run in self.runs if run.state == "failed"]
        return "\n".join([*lines, *self.verdict(), *failed])

    def plot(self) -> Figure:
        """The heat-map of temperature × weight."""
        from kd_lightning.plotting import plot_sweep

        cells = [(cell.temperature, cell.kd_weight, cell.scores) for cell in self.cells if cell.temperature is not None]
        best = (
            None if self.best is None or self.best.temperature is None else (self.best.temperature, self.best.kd_weight)
        )
        baseline = None if self.baseline is None else self.baseline.scores
        return plot_sweep(cells, self.monitor, baseline=baseline, best=best, mode=self.mode)

    def write_csv(self, path: Path) -> None:
        """One line for each run."""
        names = sorted({name for run in self.runs for name in run.test})
        columns = ["number", "temperature", "kd_weight", "task_weight", "seed", "state"]
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*columns, self.monitor, "epoch", "seconds", *names, "folder", "reason"])
            for run in self.runs:
                tests = [run.test.get(name) for name in names]
                values = [getattr(run, column) for column in columns]
                seconds = None if run.seconds is None else f"{run.seconds:.1f}"
                writer.writerow([*values, run.score, run.epoch, seconds, *tests, run.folder, run.reason])


def mean_and_std(scores: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN where there are too few."""
    return (
        statistics.fmean(scores) if scores else math.nan,
        statistics.stdev(scores) if len(scores) > 1 else math.nan,
    )


def show(scores: Sequence[float]) -> str:
    """``mean ± std``, the mean alone for one score, a dash for none."""
    mean, std = mean_and_std(scores)
    return "–" if not scores else f"{mean:.4f}" if len(scores) == 1 else f"{mean:.4f} ± {std:.4f}"


def _cell_name(temperature: float | None, kd_weight: float) -> str:
    return "no teacher" if temperature is None else f"temperature {temperature:.4g}, kd_weight {kd_weight:.4g}"
