"""Figures of a temperature over training: planned, recorded, and of several policies side by side."""

from __future__ import annotations

import bisect
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch

from kd_lightning.plotting.style import Curve, Spread, draw_terms, pyplot, subplots, tidy
from kd_lightning.ranking import check_counts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kd_lightning.temperature import Progress, Signals, TemperaturePolicy

_MAX_POINTS = 400
_MAX_REASONS = 12
_ABSENT = (math.nan, math.inf, -math.inf)  # stands for a term that the policy does not return at this time


def plot_schedule(
    policy_or_schedule: float | Callable[[Progress], float] | TemperaturePolicy,
    epochs: int,
    steps_per_epoch: int = 1,
    *,
    num_classes: int = 10,
    seed: int = 0,
) -> Figure:
    """Draw a temperature over a training run that never takes place.

    Where teacher and student temperatures differ, the figure has two curves; with several temperatures, one or two per
    loss term.

    A policy that depends on logits receives random stand-in logits, which a note in the figure mentions: the student
    grows sharper and approaches its teacher over the run, and the teacher is right on nine of ten random labels. The
    stand-ins show the policy's *range and direction*, not its values for your models. If temperatures differ between
    samples or classes, the curve is the mean and the band runs from the smallest to the largest. Learned temperatures
    keep their initial value, since nothing is trained.

    The policy is not changed: a copy in training mode is drawn, so that its moving averages are updated. At most 400
    evenly spaced steps are evaluated.

    Args:
        policy_or_schedule: A number, a schedule or a policy.
        epochs: Length of the run.
        steps_per_epoch: Optimiser steps in an epoch. With 1, schedules that count steps advance once per epoch.
        num_classes: Classes of the stand-in logits.
        seed: Seed of the stand-in logits.

    Raises:
        TypeError: If the subject is no number, schedule or policy, or if a count is no whole number.
        ValueError: If there is less than one epoch or step, or the policy does not fit ``num_classes``.

    Example:
        >>> from kd_lightning.temperature import CosineSchedule
        >>> figure = plot_schedule(CosineSchedule(init_value=8.0, end_value=2.0), epochs=30, steps_per_epoch=100)
        >>> figure.axes[0].get_xlabel()
        'epoch'
    """
    check_counts(epochs=epochs, steps_per_epoch=steps_per_epoch)
    check_counts(least=2, num_classes=num_classes)
    pyplot()  # first, so that a missing matplotlib is reported before any work
    from kd_lightning.temperature import as_policy

    policy = as_policy(policy_or_schedule)
    run = (epochs, steps_per_epoch, num_classes)
    times, curves = _trace(policy, *run, seed=seed)
    notes = []
    if curves != _trace(policy, *run, seed=seed + 1, learns=False)[1]:
        notes.append(f"stand-in logits of {num_classes} classes: range and direction only")
    if any(low != high for curve in curves for side in curve for _, low, high in side):
        notes.append("line: mean, band: smallest to largest")
    if any(True for _ in policy.parameters()):
        notes.append("untrained: what is learned stays at its start")

    figure, axes = subplots(figsize=(7.0, 3.6))
    differ = draw_terms(axes, times, curves)
    axes.set_xlabel("epoch")
    axes.set_ylabel("temperature T")
    axes.set_xlim(0, epochs)
    axes.set_ylim(0, 1.12 * max(high for curve in curves for side in curve for _, _, high in side))
    axes.set_title(_title(policy_or_schedule), fontsize=9, loc="left")
    if differ or len(curves) > 1:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    if notes:
        figure.supxlabel("; ".join(notes), fontsize=8, color="0.4")
    tidy(axes)
    return figure


def plot_temperature_history(
    steps: Sequence[float],
    student: Sequence[tuple[float, float, float]],
    teacher: Sequence[tuple[float, float, float]],
    *,
    metric: Sequence[tuple[float, float]] = (),
    metric_name: str = "",
    moves: Sequence[tuple[float, float, str]] = (),
) -> Figure:
    """Draw a run's temperatures over its steps, and a validation metric beneath.

    A move of the temperature by a callback is drawn as a step, with a number under which its reason is listed.

    Args:
        steps: Training steps at which the temperatures were recorded.
        student: Mean, smallest and largest student temperature at each step.
        teacher: The same of the teacher; drawn if it differs from the student's.
        metric: Pairs of step and value; if empty, the figure has no second panel.
        metric_name: Name of the metric.
        moves: Step, ratio and reason of each move, in the order of the steps. Of many, the first twelve are listed.

    Raises:
        ValueError: If the lengths differ, or are 0.

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
    lines = _listed(moves)
    extra = 0.19 * len(lines)  # inches
    if metric:
        figure, (top, bottom) = subplots(2, 1, figsize=(7.0, 4.8 + extra), sharex=True, height_ratios=[3, 2])
    else:
        figure, top = subplots(figsize=(7.0, 3.6 + extra))
        bottom = top

    differ = list(student) != list(teacher)
    spread = any(low != high for _, low, high in (*student, *teacher))
    steps, student, teacher = _with_jumps(steps, student, teacher, moves)
    draw_terms(top, steps, [(student, teacher)])
    whose = "Temperature of student and teacher" if differ else "Temperature, teacher's and student's"
    top.set_title(whose + (": mean and range" if spread else ""), fontsize=10, loc="left", pad=14 if moves else None)
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
    for number, (step, _, _) in enumerate(moves, 1):
        for axes in figure.axes:
            axes.axvline(step, color="0.75", linewidth=0.8, linestyle="--", zorder=0)
        top.annotate(f"{number}", (step, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 1),
                     textcoords="offset points", ha="center", fontsize=8, color="0.3")  # fmt: skip
    if lines:
        figure.supxlabel("\n".join(lines), x=0.02, ha="left", fontsize=8, color="0.3")
    bottom.set_xlabel("training step")
    figure.align_ylabels()
    for axes in figure.axes:
        tidy(axes)
    return figure


def plot_temperature_grid(histories: Mapping[str, Sequence[Curve]], *, columns: int = 4, log: bool = False) -> Figure:
    """Draw the temperatures of several policies side by side over training, all to one scale.

    Solid: the student's mean, or both where they agree; dashed: the teacher's. The band runs from the smallest to the
    largest temperature of a batch. Several loss terms are drawn one paler than the other.

    Args:
        histories: For each name one ``(student, teacher)`` per loss term, each of them a mean, smallest and largest
            temperature for every epoch, from 0; all of the same length.
        columns: Panels in a row.
        log: Whether the temperatures are on a log scale, which shows small ones beside large ones.

    Raises:
        ValueError: If there are no temperatures, or the number of epochs differs between names.

    Example:
        >>> falling, constant = [(8.0, 8.0, 8.0), (4.0, 4.0, 4.0)], [(4.0, 4.0, 4.0)] * 2
        >>> figure = plot_temperature_grid({"asymmetric": [(constant, falling)], "constant": [(constant, constant)]})
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['asymmetric', 'constant']
    """
    check_counts(columns=columns)
    lengths = {name: {len(side) for term in terms for side in term} for name, terms in histories.items()}
    counts = set().union(*lengths.values())
    if len(counts) != 1 or 0 in counts or not all(lengths.values()):
        raise ValueError(f"each name needs temperatures for the same number of epochs, got {lengths}.")
    epochs = range(*counts)
    columns = min(columns, len(histories))
    rows = math.ceil(len(histories) / columns)
    size = (2.6 * columns, 1.6 * rows + 0.6)
    figure, grid = subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    handles = {}
    panels = grid.flatten().tolist()
    for axes, (name, terms) in zip(panels, histories.items(), strict=False):
        differ = draw_terms(axes, epochs, terms)
        if differ:
            handles = dict(zip(("student", "teacher"), reversed(axes.get_lines()[:2]), strict=True))
        axes.set_title(name, fontsize=9, loc="left")
        tidy(axes)
    for axes in panels[len(histories) :]:
        axes.remove()
    for axes in panels[len(histories) - columns : len(histories)]:
        axes.tick_params(labelbottom=True)
    panels[0].set_xlim(0, epochs[-1])
    if log:
        panels[0].set_yscale("log", base=2)
        panels[0].yaxis.set_major_formatter("{x:g}")
    else:
        panels[0].set_ylim(bottom=0)
    figure.supxlabel("epoch", fontsize=10)
    figure.supylabel("temperature T", fontsize=10)
    if handles:
        figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=9, loc="lower right", ncols=2)
    return figure


def _with_jumps(
    steps: Sequence[float],
    student: Sequence[Spread],
    teacher: Sequence[Spread],
    moves: Sequence[tuple[float, float, str]],
) -> tuple[list[float], list[Spread], list[Spread]]:
    """Insert the temperatures right before and after each move, which the recorded steps may leave out."""
    rows = list(zip(steps, student, teacher, strict=True))
    for step, ratio, _ in moves:
        place = bisect.bisect_right([row[0] for row in rows], step)
        if place > 0:
            _, own, taught = rows[place - 1]
            after = [(mean * ratio, low * ratio, high * ratio) for mean, low, high in (own, taught)]
            rows[place:place] = [(step, own, taught), (step, after[0], after[1])]
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


def _listed(moves: Sequence[tuple[float, float, str]]) -> list[str]:
    lines = [f"{number}  step {step:g}: {reason}" for number, (step, _, reason) in enumerate(moves[:_MAX_REASONS], 1)]
    return lines if len(moves) <= _MAX_REASONS else [*lines, f"and {len(moves) - _MAX_REASONS} more"]


def _stand_ins(epochs: int, steps_per_epoch: int, num_classes: int, seed: int, learns: bool) -> Iterator[Signals]:
    """Yield stand-in signals of a run, at every step or at evenly spaced steps including both ends."""
    from kd_lightning.temperature import Progress, Signals

    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (64,), generator=generator)
    noise_t, noise_s = torch.randn(2, 64, num_classes, generator=generator)
    right = torch.where(torch.rand(64, generator=generator) < 0.9, labels, labels.roll(1))
    teacher = 2.0 * noise_t
    teacher[torch.arange(64), right] += 6.0
    total = epochs * steps_per_epoch
    stride = max(1, math.ceil(total / _MAX_POINTS))
    for step in sorted({*range(0, total, stride), total}):
        fraction = step / total
        student = (fraction * teacher if learns else 0.0) + (1.0 - 0.8 * fraction) * noise_s
        progress = Progress(step, total, min(step // steps_per_epoch, epochs - 1), epochs)
        yield Signals(student, teacher, labels, progress)


def _trace(
    policy: TemperaturePolicy, epochs: int, steps_per_epoch: int, num_classes: int, *, seed: int, learns: bool = True
) -> tuple[list[float], Sequence[Curve]]:
    """Return times, and mean, smallest and largest temperature at each time for each loss term and side."""
    from kd_lightning.temperature.base import as_terms

    policy = copy.deepcopy(policy).cpu().train()
    times, rows = [], []
    for signals in _stand_ins(epochs, steps_per_epoch, num_classes, seed, learns):
        with torch.no_grad():
            terms = as_terms(policy(signals))
        rows.append([[(t.mean().item(), t.min().item(), t.max().item()) for t in term[:2]] for term in terms])
        times.append(signals.progress.step / steps_per_epoch)
    # a joined policy may return more terms at one time than at another
    by_term = zip_longest(*rows, fillvalue=(_ABSENT, _ABSENT))
    curves: Any = [tuple(zip(*of_term, strict=True)) for of_term in by_term]
    return times, curves


def _title(subject: object) -> str:
    subject = getattr(subject, "schedule", subject)
    text = f"constant T = {subject:g}" if isinstance(subject, (int, float)) else repr(subject)
    if "\n" in text or "object at" in text:  # the repr of a composed policy or a user's function is no title
        text = getattr(subject, "__name__", type(subject).__name__)
    return text if len(text) <= 80 else text[:79] + "…"
