"""Shared helpers of the figures: creating a figure, colours, curves with a band, axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STUDENT, TEACHER = "#1f6fb4", "#d9541e"
Spread: TypeAlias = tuple[float, float, float]  # mean, smallest, largest
Curve: TypeAlias = tuple[Sequence[Spread], Sequence[Spread]]  # student, teacher


def pyplot() -> Any:
    """Import ``matplotlib.pyplot``, or raise an ImportError that says what to install."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install kd-lightning[plots]") from error
    return plt


def subplots(*shape: int, **options: Any) -> tuple[Figure, Any]:
    """Create a figure and its axes as ``pyplot.subplots`` does, without a reference to the figure in pyplot."""
    plt = pyplot()
    figure, axes = plt.subplots(*shape, layout="constrained", **options)
    plt.close(figure)
    return figure, axes


def draw_terms(axes: Axes, times: Sequence[float], curves: Sequence[Curve]) -> bool:
    """Draw student and teacher of each loss term, paler for later terms; return True if student and teacher differ."""
    differ = any(student != teacher for student, teacher in curves)
    alone = "both" if len(curves) == 1 else "term"
    for number, (student, teacher) in enumerate(curves):
        shade = 1.0 if len(curves) == 1 else 1.0 - 0.65 * number / (len(curves) - 1)
        label = "" if len(curves) == 1 else f" {number + 1}"
        if differ:
            _draw_curve(axes, times, teacher, TEACHER, f"teacher{label}", shade, "--")
        _draw_curve(axes, times, student, STUDENT, f"student{label}" if differ else f"{alone}{label}", shade, "-")
    return differ


def _draw_curve(
    axes: Axes,
    times: Sequence[float],
    values: Sequence[Spread],
    color: str,
    label: str,
    shade: float,
    style: str,
) -> None:
    """Draw the mean as a line and the range as a band."""
    mean, low, high = zip(*values, strict=True)
    axes.plot(times, mean, style, color=color, alpha=shade, linewidth=2, label=label)
    if low != high:
        axes.fill_between(times, low, high, color=color, alpha=0.15 * shade, linewidth=0)


def mark(axes: Axes, value: float, text: str) -> None:
    """Draw a dotted horizontal line with its name in the margin."""
    axes.axhline(value, color="0.6", linewidth=0.8, linestyle=":")
    place = {"xycoords": ("axes fraction", "data"), "xytext": (3, 0), "textcoords": "offset points"}
    axes.annotate(text, (1.0, value), **place, va="center", fontsize=8, color="0.4")


def log_axis(axes: Axes, ticks: Sequence[float]) -> None:
    """Put the horizontal axis on a log scale with labels at the ticks alone."""
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def tidy(axes: Axes) -> None:
    """Remove the frame above and to the right, and draw a pale horizontal grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
