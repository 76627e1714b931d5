"""Plots of the atlas. Each image carries a digest of the numbers drawn, which a test compares with the rows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.atlas.arms import ANCHOR, NONE, POLICIES
from benchmarks.atlas.paired import Results, against_constant, best_constant, chosen, paired
from benchmarks.atlas.plan import STUDIES
from benchmarks.atlas.rows import Rows

CONSTANTS, TASKS_PLOT, POLICIES_PLOT = "atlas.png", "atlas_tasks.png", "atlas_policies.png"
Panels = dict[str, dict[str, list[tuple[Any, float, float]]]]
"""Panel → line → (position, mean, standard error)."""


def panels(rows: Rows) -> dict[str, Panels]:
    """Return what each image shows."""
    results = chosen(rows, "last")
    others = ("long tail", "time series", "time series, all labels", "bytes", "cifar100")
    return {
        CONSTANTS: _gains(results, "constants"),
        TASKS_PLOT: {title: lines for name in others for title, lines in _gains(results, name).items()},
        POLICIES_PLOT: _policies(results),
    }


def _gains(results: Results, study: str) -> Panels:
    drawn: Panels = {}
    for setting in STUDIES[study].settings:
        arms = results.get(setting, {})
        if NONE not in arms:
            continue
        lines: dict[str, list[tuple[Any, float, float]]] = {}
        for rule in ("fixed", "equal"):
            points = sorted((t, (r, t)) for r, t in arms if (r == rule or (r, t) == ("fixed", ANCHOR)) and t > 0)
            gains = [(t, paired(arms[arm].tests, arms[NONE].tests)) for t, arm in points]
            if any(arm[0] == rule for _, arm in points):
                lines[rule] = [(t, gain.mean, gain.error) for t, gain in gains]
        drawn[str(setting)] = lines
    return drawn


def _policies(results: Results) -> Panels:
    drawn: Panels = {}
    for setting, arms in results.items():
        if best_constant(arms):
            differences = against_constant({setting: arms}, [(name, 0.0) for name in POLICIES])
            points = [(arm[0], gain.mean, gain.error) for (_, arm), gain in differences.items()]
            if len(points) > 2:  # the long tail has two of its own, which its table shows
                drawn[str(setting)] = {"policy": points}
    return drawn


def digest(drawn: Panels) -> str:
    """Return a digest of the numbers, rounded so that another machine's last bits do not change it."""
    rounded = {
        title: {name: [(x, f"{mean:.3f}", f"{error:.3f}") for x, mean, error in line] for name, line in lines.items()}
        for title, lines in drawn.items()
    }
    return hashlib.sha256(json.dumps(rounded).encode()).hexdigest()


def draw(rows: Rows, folder: Path) -> None:
    """Write the images."""
    for name, drawn in panels(rows).items():
        if drawn:
            figure = _draw_policies(drawn) if name == POLICIES_PLOT else _draw_gains(drawn)
            figure.savefig(folder / name, dpi=70, metadata={"Description": digest(drawn)})


def _figure(count: int, columns: int, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = math.ceil(count / columns)
    figure, axes = pyplot.subplots(lines, columns, squeeze=False, figsize=(width * columns, height * lines), **options)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, axes.flat


def _draw_gains(drawn: Panels) -> Any:
    figure, axes = _figure(len(drawn), min(4, len(drawn)), 3.2, 2.6)
    for axis, (title, lines) in zip(axes, drawn.items(), strict=False):
        for rule, points in lines.items():
            x, means, errors = zip(*points, strict=True)
            axis.errorbar(x, means, errors, marker="o", markersize=3, capsize=2, label=rule)
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axis.set_title(title, fontsize=9)
        if title.startswith("bytes"):
            axis.set_ylabel("bits per byte", fontsize=8)
    axes[0].legend(title="kd_weight", fontsize=7, title_fontsize=7)
    figure.supxlabel("T")
    figure.supylabel("points over no teacher")
    figure.tight_layout()
    return figure


def _draw_policies(drawn: Mapping[str, Mapping[str, list[tuple[Any, float, float]]]]) -> Any:
    names = [name for name in POLICIES if any(name == x for lines in drawn.values() for x, _, _ in lines["policy"])]
    figure, axes = _figure(len(drawn), len(drawn), 3.6, 0.24 * len(names) + 1.2, sharey=True)
    for axis, (title, lines) in zip(axes, drawn.items(), strict=False):
        for name, mean, error in lines["policy"]:
            axis.errorbar(mean, names.index(name), xerr=error, marker="o", markersize=4, capsize=2, color="C0")
        axis.axvline(0, color="gray", linewidth=0.8)
        axis.set_title(title, fontsize=9)
        axis.grid(axis="y", linewidth=0.3)
    axes[0].set_yticks(range(len(names)), [name.replace("Temperature", "") for name in names], fontsize=8)
    axes[0].invert_yaxis()
    figure.supxlabel("points over the best constant, ± standard error", fontsize=9)
    figure.tight_layout()
    return figure
