"""Figures of a search for the temperature: the finder's candidates, and a sweep's cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from kd_lightning.functional.rows import check_option
from kd_lightning.plotting.style import STUDENT, TEACHER, log_axis, pyplot, subplots, tidy
from kd_lightning.ranking import mean_and_std, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Trials: TypeAlias = "Sequence[tuple[float, float | None, Sequence[float]]]"  # temperature, weight, scores
_ROUND = (0.1, 0.2, 0.5, 1, 2, 4, 8, 16, 32, 64)  # ticks where the temperatures are too many to name
_MAX_TICKS = 10


def plot_temperature_finder(
    trials: Sequence[tuple[float, float | None, Sequence[float]]],
    monitor: str,
    suggestion: float | None = None,
    *,
    unit: str = "temperature",
) -> Figure:
    """Draw a search: one dot for each seed, a line through the means, a band of one standard deviation.

    Args:
        trials: Candidate, distillation weight (None: the same for all trials), and the scores of its seeds.
        monitor: Name of the metric that the scores are.
        suggestion: The candidate to mark.
        unit: Name of the quantity that the candidates are.

    Raises:
        ValueError: If there are no trials.

    Example:
        >>> figure = plot_temperature_finder([(2, None, [0.8, 0.82]), (4, None, [0.85, 0.86])], "val_acc", 4)
        >>> figure.axes[0].get_title(loc="left")
        'val_acc after a short training: 2 seeds each, mean ± standard deviation'
    """
    if not trials:
        raise ValueError("there are no trials to draw.")
    figure, axes = subplots(figsize=(7.0, 3.8))
    _draw_curves(axes, trials)
    if suggestion is not None:
        _mark_choice(axes, suggestion, f"suggestion: {suggestion:g}")
    axes.set_xlabel(f"{unit} T" if unit == "temperature" else unit)
    axes.set_ylabel(monitor)
    seeds = max(len(scores) for _, _, scores in trials)
    each = f"{seeds} seeds each, mean ± standard deviation" if seeds > 1 else "one seed, so its noise is unknown"
    axes.set_title(f"{monitor} after a short training: {each}", fontsize=10, loc="left")
    return figure


def plot_sweep(
    cells: Sequence[tuple[float, float, Sequence[float]]],
    monitor: str,
    *,
    baseline: Sequence[float] | None = None,
    best: tuple[float, float] | None = None,
    mode: str = "max",
) -> Figure:
    """Draw a sweep over temperature and weight: a curve for one weight, a heat-map for a grid, else coloured dots.

    Colours are means over the seeds, light being better; the baseline is a line, in the colour bar where there is one.

    Args:
        cells: Temperature, weight, and the scores of its seeds; none where every run failed.
        monitor: Name of the metric that the scores are.
        baseline: Scores without a teacher.
        best: Temperature and weight of the cell to mark.
        mode: ``"max"`` if larger is better.

    Raises:
        ValueError: If there are no scores, ``best`` is no cell, or the mode is unknown.

    Example:
        >>> cells = [(t, w, [0.8 + t / 100, 0.8 + w / 100]) for t in (1, 4) for w in (0.5, 0.9)]
        >>> figure = plot_sweep(cells, "val_acc", baseline=[0.79, 0.8], best=(4, 0.9))
        >>> figure.axes[0].get_title(loc="left")
        'val_acc, mean ± standard deviation of 2 seeds; no teacher (line) 0.7950 ± 0.0071'
    """
    check_option("mode", mode, ("min", "max"))
    if best is not None and not any((t, w) == tuple(best) for t, w, _ in cells):
        raise ValueError(f"best must be the temperature and weight of one of the cells, got {best}.")
    means = [mean_and_std(scores)[0] for _, _, scores in cells if len(scores)]
    if not means and not baseline:
        raise ValueError("there are no scores to draw.")
    temperatures, weights = sorted({t for t, _, _ in cells}), sorted({w for _, w, _ in cells})
    level = mean_and_std(baseline)[0] if baseline else None
    if len(weights) == 1:
        figure, axes = subplots(figsize=(7.0, 3.8))
        _draw_curves(axes, cells)
        if best is not None:
            _mark_choice(axes, best[0], f"best: {best[0]:.4g}")
        if level is not None:
            axes.axhline(level, color="black", linewidth=1.5)
        axes.set_xlabel(f"temperature T (kd_weight {weights[0]:g})")
        axes.set_ylabel(monitor)
    else:
        is_grid = len(cells) == len(temperatures) * len(weights)
        size = (2.6 + 1.15 * len(temperatures), 1.7 + 0.75 * len(weights)) if is_grid else (7.0, 4.2)
        figure, axes = subplots(figsize=(max(size[0], 6.4), max(size[1], 2.8)))
        plt = pyplot()
        levels = means if level is None else [*means, level]
        margin = 0.02 * (max(levels) - min(levels)) or 0.01 * (abs(max(levels)) or 1.0)
        norm = plt.Normalize(min(levels) - margin, max(levels) + margin)
        scale = plt.cm.ScalarMappable(norm, plt.get_cmap("viridis" if mode == "max" else "viridis_r"))
        (_draw_grid if is_grid else _draw_dots)(axes, cells, best, scale)
        axes.set_xlabel("temperature T")
        axes.set_ylabel("kd_weight")
        bar = figure.colorbar(scale, ax=axes, label=monitor, fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)
        if level is not None:
            bar.ax.axhline(level, color="white", linewidth=4)
            bar.ax.axhline(level, color="black", linewidth=2)
    count = max((len(scores) for _, _, scores in cells), default=0)
    title = f"{monitor}, mean ± standard deviation of {count} seeds" if count > 1 else f"{monitor}, one seed"
    title += f"; no teacher (line) {show(baseline)}" if baseline else ""
    axes.set_title(title, fontsize=10, loc="left")
    return figure


def _draw_curves(axes: Axes, trials: _Trials) -> None:
    """Draw the scores over the temperature, each weight in a colour: a dot per seed, a line of means, a band of std."""
    weights = sorted({weight for _, weight, _ in trials if weight is not None}) or [None]
    candidates = sorted({candidate for candidate, _, _ in trials})
    for number, weight in enumerate(weights):
        shade = pyplot().get_cmap("viridis")(0.1 + 0.75 * number / max(len(weights) - 1, 1))
        color = STUDENT if len(weights) == 1 else shade
        curve = sorted((candidate, list(scores)) for candidate, at, scores in trials if at == weight and len(scores))
        if not curve:
            continue
        at = [candidate for candidate, _ in curve]
        mean, std = np.array([mean_and_std(scores) for _, scores in curve]).T
        axes.plot(at, mean, "-", color=color, linewidth=2, label=None if weight is None else f"kd_weight {weight:g}")
        if not np.isnan(std).all():
            std = np.nan_to_num(std)
            axes.fill_between(at, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
        for candidate, scores in curve:
            axes.plot([candidate] * len(scores), scores, "o", color=color, markersize=4, alpha=0.7, markeredgewidth=0)
    for candidate in candidates:
        if not any(scores for at, _, scores in trials if at == candidate):
            place = {"xy": (candidate, 0.02), "xycoords": ("data", "axes fraction"), "ha": "center"}
            axes.annotate("no result", **place, rotation=90, fontsize=9, color="0.4")
    if len(weights) > 1:
        axes.legend(frameon=False, fontsize=9)
    _temperature_axis(axes, candidates)
    margin = (candidates[-1] / candidates[0]) ** 0.06 if len(candidates) > 1 else 2.0
    axes.set_xlim(candidates[0] / margin, candidates[-1] * margin)  # candidates without a score have their place too
    axes.margins(y=0.15)
    tidy(axes)


def _mark_choice(axes: Axes, choice: float, text: str) -> None:
    """Draw a vertical line at the choice, with its name on the side where there is more room."""
    low, high = axes.get_xlim()
    side = "right" if choice**2 > low * high else "left"  # because the axis is on a log scale
    axes.axvline(choice, color=TEACHER, linewidth=1.2, linestyle="--", zorder=0)
    axes.annotate(f" {text} ", (choice, 0.02), xycoords=("data", "axes fraction"), fontsize=9, color=TEACHER, ha=side)


def _draw_grid(axes: Axes, cells: _Trials, best: tuple[float, float] | None, scale: Any) -> None:
    """Draw a coloured field with its mean and standard deviation for each cell."""
    temperatures, weights = sorted({t for t, _, _ in cells}), sorted({w for _, w, _ in cells if w is not None})
    places = [(temperatures.index(t), weights.index(w)) for t, w, _ in cells if w is not None]
    grid = [[math.nan] * len(temperatures) for _ in weights]
    for (column, row), (_, _, scores) in zip(places, cells, strict=True):
        mean, std = mean_and_std(scores)
        grid[row][column] = mean
        text, ink, size = "no result", "0.4", 9.0
        if len(scores):
            r, g, b, _ = scale.to_rgba(mean)
            ink, size = "black" if 0.299 * r + 0.587 * g + 0.114 * b > 0.5 else "white", 9.5
            text = f"{mean:.4g}" if math.isnan(std) else f"{mean:.3f}\n± {std:.3f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=ink, linespacing=1.3)
    axes.set_facecolor("0.93")
    axes.imshow(grid, cmap=scale.cmap, norm=scale.norm, aspect="auto", origin="lower")
    if best is not None:
        corner = (temperatures.index(best[0]) - 0.47, weights.index(best[1]) - 0.46)
        axes.add_patch(pyplot().Rectangle(corner, 0.94, 0.92, fill=False, edgecolor=TEACHER, linewidth=2.5))
    axes.set_xticks(range(len(temperatures)), [f"{t:g}" for t in temperatures])
    axes.set_yticks(range(len(weights)), [f"{w:g}" for w in weights])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_dots(axes: Axes, cells: _Trials, best: tuple[float, float] | None, scale: Any) -> None:
    """Draw a coloured dot for each cell that has a score."""
    drawn = [(t, w, mean_and_std(scores)[0]) for t, w, scores in cells if len(scores)]
    at, weights, means = zip(*drawn, strict=True) if drawn else ((), (), ())
    axes.scatter(at, weights, c=means, cmap=scale.cmap, norm=scale.norm, s=90, edgecolors="0.3", linewidths=0.6)
    if best is not None:
        axes.scatter(*best, s=260, facecolors="none", edgecolors=TEACHER, linewidths=2)
    _temperature_axis(axes, [t for t, _, _ in cells], names=False)
    axes.margins(0.08)
    tidy(axes)


def _temperature_axis(axes: Axes, temperatures: Sequence[float], names: bool = True) -> None:
    """Label each temperature if they are few, else the round ones between them."""
    between = [t for t in _ROUND if min(temperatures) <= t <= max(temperatures)]
    log_axis(axes, temperatures if names and len(temperatures) <= _MAX_TICKS else between)
