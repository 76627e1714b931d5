"""Arrays in, a matplotlib Figure out. Needs ``pip install kd-lightning[plots]``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_temperature_finder", "plot_temperature_history"]

_STUDENT, _TEACHER = "#1f6fb4", "#d9541e"


def plot_temperature_history(
    steps: Sequence[float],
    student: Sequence[tuple[float, float, float]],
    teacher: Sequence[tuple[float, float, float]],
    *,
    metric: Sequence[tuple[float, float]] = (),
    metric_name: str = "",
) -> Figure:
    """Draw a run's temperatures over its steps, and a validation metric beneath.

    Args:
        steps: Where the temperatures were read.
        student: Mean, smallest and largest at each of them.
        teacher: The same of the teacher; drawn where it differs.
        metric: Pairs of step and value; none for no second panel.
        metric_name: What it is called.

    Returns:
        The figure; ``figure.savefig("temperature.png")`` writes it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The lengths differ, or there is nothing to draw.

    Example:
        >>> constant = [(4.0, 4.0, 4.0)] * 3
        >>> figure = plot_temperature_history(
        ...     [0, 10, 20], constant, constant, metric=[(10, 0.8), (20, 0.9)], metric_name="val_acc")
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['temperature T', 'val_acc']
    """
    if not len(steps) == len(student) == len(teacher) > 0:
        raise ValueError(
            f"each step has a student's and a teacher's temperature, got {len(steps)} steps, {len(student)} and "
            f"{len(teacher)}."
        )
    plt = _pyplot()
    if metric:
        figure, (top, bottom) = plt.subplots(
            2, 1, figsize=(7.0, 4.8), sharex=True, layout="constrained", height_ratios=[3, 2]
        )
    else:
        figure, top = plt.subplots(figsize=(7.0, 3.6), layout="constrained")
        bottom = top

    differ = list(student) != list(teacher)
    sides = [(teacher, _TEACHER, "teacher", "--")] if differ else []
    for values, color, label, style in (*sides, (student, _STUDENT, "student" if differ else "both", "-")):
        mean, low, high = zip(*values, strict=True)
        top.plot(steps, mean, style, color=color, linewidth=2, label=label)
        if low != high:
            top.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    spread = any(low != high for _, low, high in (*student, *teacher))
    whose = "Temperature of student and teacher" if differ else "Temperature, teacher's and student's"
    top.set_title(whose + (": mean and range" if spread else ""), fontsize=10, loc="left")
    top.set_ylabel("temperature T")
    top.margins(x=0.01, y=0.12)
    low, high = top.get_ylim()
    top.set_ylim(0 if low < 0.5 * high else low - 0.1 * (high - low), max(high, low + 0.5))
    if differ:
        top.legend(frameon=False, fontsize=9, loc="best")

    if metric:
        at, values = zip(*metric, strict=True)
        bottom.plot(at, values, "o-", color="0.25", linewidth=1.2, markersize=2.5 if len(at) > 30 else 4)
        bottom.set_ylabel(metric_name)
        bottom.margins(y=0.12)
    bottom.set_xlabel("training step")
    figure.align_ylabels()
    for axes in figure.axes:
        _tidy(axes)
    return figure


def plot_temperature_finder(
    trials: Sequence[tuple[float, float | None, Sequence[float]]],
    monitor: str,
    suggestion: float | None = None,
    *,
    unit: str = "temperature",
) -> Figure:
    """Draw a search: one dot for each seed, a line through the means, a band of one standard deviation.

    Args:
        trials: Candidate, distillation weight (None: one for all), and the scores of its seeds.
        monitor: What the scores are.
        suggestion: The candidate to mark.
        unit: What the candidates are.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is nothing to draw.

    Example:
        >>> figure = plot_temperature_finder([(2, None, [0.8, 0.82]), (4, None, [0.85, 0.86])], "val_acc", 4)
        >>> figure.axes[0].get_title(loc="left")
        'val_acc after a short training: 2 seeds each, mean ± standard deviation'
    """
    if not trials:
        raise ValueError("there are no trials to draw.")
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7.0, 3.8), layout="constrained")
    weights = sorted({weight for _, weight, _ in trials if weight is not None}) or [None]
    candidates = sorted({candidate for candidate, _, _ in trials})
    seeds = max(len(scores) for _, _, scores in trials)
    for number, weight in enumerate(weights):
        color = _STUDENT if len(weights) == 1 else plt.get_cmap("viridis")(0.1 + 0.75 * number / (len(weights) - 1))
        curve = sorted((candidate, list(scores)) for candidate, at, scores in trials if at == weight)
        at = [candidate for candidate, _ in curve]
        means = [math.fsum(scores) / len(scores) for _, scores in curve]
        axes.plot(at, means, "-", color=color, linewidth=2, label=None if weight is None else f"kd_weight {weight:g}")
        if seeds > 1:
            spreads = [
                math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / (len(scores) - 1))
                for (_, scores), mean in zip(curve, means, strict=True)
            ]
            low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
            high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
            axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
        for candidate, scores in curve:
            axes.plot([candidate] * len(scores), scores, "o", color=color, markersize=4, alpha=0.7, markeredgewidth=0)
    if suggestion is not None:
        axes.axvline(suggestion, color=_TEACHER, linewidth=1.2, linestyle="--", zorder=0)
        axes.annotate(f" suggestion: {suggestion:g}", (suggestion, 0.02), xycoords=("data", "axes fraction"),
                      fontsize=9, color=_TEACHER,
                      ha="right" if suggestion == candidates[-1] and len(candidates) > 1 else "left")  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(candidates, [f"{candidate:g}" for candidate in candidates])
    axes.minorticks_off()
    axes.set_xlabel(f"{unit} T" if unit == "temperature" else unit)
    axes.set_ylabel(monitor)
    axes.margins(x=0.06, y=0.15)
    each = f"{seeds} seeds each, mean ± standard deviation" if seeds > 1 else "one seed, so its noise is unknown"
    axes.set_title(f"{monitor} after a short training: {each}", fontsize=10, loc="left")
    if weights != [None]:
        axes.legend(frameon=False, fontsize=9)
    _tidy(axes)
    return figure


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install kd-lightning[plots]") from error
    return plt


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
