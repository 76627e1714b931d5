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
    """Draw each loss term's student and teacher, paler for later terms; return True if student and teacher differ.

    The line is the mean, the band the range.
    """
    differ = any(student != teacher for student, teacher in curves)
    several = len(curves) > 1
    for number, (student, teacher) in enumerate(curves):
        shade = 1.0 - 0.65 * number / (len(curves) - 1) if several else 1.0
        label = f" {number + 1}" if several else ""
        sides = [(student, STUDENT, "student" if differ else "term" if several else "both", "-")]
        if differ:
            sides.insert(0, (teacher, TEACHER, "teacher", "--"))
        for values, color, name, style in sides:
            mean, low, high = zip(*values, strict=True)
            axes.plot(times, mean, style, color=color, alpha=shade, linewidth=2, label=name + label)
            if low != high:
                axes.fill_between(times, low, high, color=color, alpha=0.15 * shade, linewidth=0)
    return differ


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
