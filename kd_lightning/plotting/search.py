"""Figures of a search for the temperature: the finder's candidates, and a sweep's cells."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kd_lightning.plotting.style import STUDENT, TEACHER, log_axis, pyplot, subplots, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_sweep", "plot_temperature_finder"]


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

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there are no trials.

    Example:
        >>> figure = plot_temperature_finder([(2, None, [0.8, 0.82]), (4, None, [0.85, 0.86])], "val_acc", 4)
        >>> figure.axes[0].get_title(loc="left")
        'val_acc after a short training: 2 seeds each, mean ± standard deviation'
    """
    if not trials:
        raise ValueError("there are no trials to draw.")
    plt = pyplot()
    figure, axes = subplots(figsize=(7.0, 3.8))
    weights = sorted({weight for _, weight, _ in trials if weight is not None}) or [None]
    candidates = sorted({candidate for candidate, _, _ in trials})
    seeds = max(len(scores) for _, _, scores in trials)
    for number, weight in enumerate(weights):
        color = STUDENT if len(weights) == 1 else plt.get_cmap("viridis")(0.1 + 0.75 * number / (len(weights) - 1))
        curve = sorted((candidate, list(scores)) for candidate, at, scores in trials if at == weight)
        at = [candidate for candidate, _ in curve]
        means, spreads = zip(*(_mean_and_spread(scores) for _, scores in curve), strict=True)
        axes.plot(at, means, "-", color=color, linewidth=2, label=None if weight is None else f"kd_weight {weight:g}")
        if seeds > 1:
            low = [mean - (spread or 0.0) for mean, spread in zip(means, spreads, strict=True)]
            high = [mean + (spread or 0.0) for mean, spread in zip(means, spreads, strict=True)]
            axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
        for candidate, scores in curve:
            axes.plot([candidate] * len(scores), scores, "o", color=color, markersize=4, alpha=0.7, markeredgewidth=0)
    if suggestion is not None:
        axes.axvline(suggestion, color=TEACHER, linewidth=1.2, linestyle="--", zorder=0)
        axes.annotate(f" suggestion: {suggestion:g}", (suggestion, 0.02), xycoords=("data", "axes fraction"),
                      fontsize=9, color=TEACHER,
                      ha="right" if suggestion == candidates[-1] and len(candidates) > 1 else "left")  # fmt: skip
    log_axis(axes, candidates)
    axes.set_xlabel(f"{unit} T" if unit == "temperature" else unit)
    axes.set_ylabel(monitor)
    axes.margins(x=0.06, y=0.15)
    each = f"{seeds} seeds each, mean ± standard deviation" if seeds > 1 else "one seed, so its noise is unknown"
    axes.set_title(f"{monitor} after a short training: {each}", fontsize=10, loc="left")
    if weights != [None]:
        axes.legend(frameon=False, fontsize=9)
    tidy(axes)
    return figure


def plot_sweep(
    cells: Sequence[tuple[float, float, Sequence[float]]],
    monitor: str,
    *,
    baseline: Sequence[float] | None = None,
    best: tuple[float, float] | None = None,
    mode: str = "max",
) -> Figure:
    """Draw a sweep over temperature and weight: a heat-map where the pairs are a grid, else coloured dots.

    Colours are means over the seeds, light being better; the baseline is a line in the colour bar.

    Args:
        cells: Temperature, weight, and the scores of its seeds; none where every run failed.
        monitor: Name of the metric that the scores are.
        baseline: Scores without a teacher.
        best: Temperature and weight of the cell to frame.
        mode: ``"max"`` if larger is better.

    Returns:
        The figure; ``figure.savefig("heatmap.png")`` writes it.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there are no scores.

    Example:
        >>> cells = [(t, w, [0.8 + t / 100, 0.8 + w / 100]) for t in (1, 4) for w in (0.5, 0.9)]
        >>> figure = plot_sweep(cells, "val_acc", baseline=[0.79, 0.8], best=(4, 0.9))
        >>> figure.axes[0].get_title(loc="left")
        'val_acc, mean ± standard deviation of 2 seeds; no teacher (line) 0.7950 ± 0.0071'
    """
    drawn = [(t, w, list(scores)) for t, w, scores in cells if len(scores)]
    if not drawn and not baseline:
        raise ValueError("there are no scores to draw.")
    plt = pyplot()
    temperatures, weights = sorted({t for t, _, _ in cells}), sorted({w for _, w, _ in cells})
    is_grid = len(cells) == len(temperatures) * len(weights)
    means = [statistics.fmean(scores) for _, _, scores in drawn]
    level = statistics.fmean(baseline) if baseline else None
    levels = means if level is None else [*means, level]
    low, high = min(levels), max(levels)
    margin = 0.02 * (high - low) or 0.01 * (abs(high) or 1.0)
    norm = plt.Normalize(low - margin, high + margin)
    colors = plt.get_cmap("viridis" if mode == "max" else "viridis_r")

    size = (2.6 + 1.15 * len(temperatures), 1.7 + 0.75 * len(weights)) if is_grid else (7.0, 4.2)
    figure, axes = subplots(figsize=(max(size[0], 6.4), max(size[1], 2.8)))
    if is_grid:
        grid = [[math.nan] * len(temperatures) for _ in weights]
        for (t, w, _), mean in zip(drawn, means, strict=True):
            grid[weights.index(w)][temperatures.index(t)] = mean
        axes.set_facecolor("0.93")
        axes.imshow(grid, cmap=colors, norm=norm, aspect="auto", origin="lower")
        for t, w, scores in cells:
            at = (temperatures.index(t), weights.index(w))
            if not len(scores):
                axes.text(*at, "no result", ha="center", va="center", fontsize=8, color="0.4")
                continue
            mean, spread = _mean_and_spread(scores)
            r, g, b, _ = colors(norm(mean))
            ink = "black" if 0.299 * r + 0.587 * g + 0.114 * b > 0.5 else "white"
            text = f"{mean:.4g}" if spread is None else f"{mean:.3f}\n± {spread:.3f}"
            axes.text(*at, text, ha="center", va="center", fontsize=9.5, color=ink, linespacing=1.3)
        if best is not None:
            corner = (temperatures.index(best[0]) - 0.47, weights.index(best[1]) - 0.46)
            axes.add_patch(plt.Rectangle(corner, 0.94, 0.92, fill=False, edgecolor=TEACHER, linewidth=2.5))
        axes.set_xticks(range(len(temperatures)), [f"{t:g}" for t in temperatures])
        axes.set_yticks(range(len(weights)), [f"{w:g}" for w in weights])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    else:
        at = [(t, w) for t, w, _ in drawn]
        axes.scatter(*zip(*at, strict=True), c=means, cmap=colors, norm=norm, s=90, edgecolors="0.3", linewidths=0.6)
        if best is not None:
            axes.scatter(*best, s=260, facecolors="none", edgecolors=TEACHER, linewidths=2)
        ticks = (0.1, 0.2, 0.5, 1, 2, 4, 8, 16, 32, 64)
        log_axis(axes, [t for t in ticks if temperatures[0] <= t <= temperatures[-1]])
        axes.margins(0.08)
        tidy(axes)
    axes.set_xlabel("temperature T")
    axes.set_ylabel("kd_weight")
    bar = figure.colorbar(plt.cm.ScalarMappable(norm, colors), ax=axes, label=monitor, fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    count = max((len(scores) for _, _, scores in cells), default=0)
    title = f"{monitor}, mean ± standard deviation of {count} seeds" if count > 1 else f"{monitor}, one seed"
    if baseline and level is not None:
        bar.ax.axhline(level, color="white", linewidth=4)
        bar.ax.axhline(level, color="black", linewidth=2)
        spread = _mean_and_spread(baseline)[1]
        title += f"; no teacher (line) {level:.4f}" + ("" if spread is None else f" ± {spread:.4f}")
    axes.set_title(title, fontsize=10, loc="left")
    return figure


def _mean_and_spread(scores: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the standard deviation, which is None for a single score."""
    mean = statistics.fmean(scores)
    if len(scores) == 1:
        return mean, None
    return mean, statistics.stdev(scores) if math.isfinite(mean) else math.nan  # stdev raises an error for NaN
