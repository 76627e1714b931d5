"""Arrays (or a temperature to draw) in, a matplotlib Figure out. Needs ``pip install kd-lightning[plots]``."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kd_lightning.temperature import Progress, Signals, TemperaturePolicy

__all__ = [
    "plot_schedule",
    "plot_softening",
    "plot_sweep",
    "plot_temperature_finder",
    "plot_temperature_grid",
    "plot_temperature_history",
]

_STUDENT, _TEACHER = "#1f6fb4", "#d9541e"
_MAX_POINTS = 400
_ABSENT = (math.nan, math.inf, -math.inf)  # no such term at this time
_Spread: TypeAlias = tuple[float, float, float]  # mean, smallest, largest
_Curve: TypeAlias = tuple[Sequence[_Spread], Sequence[_Spread]]  # student, teacher


def plot_schedule(
    policy_or_schedule: float | Callable[[Progress], float] | TemperaturePolicy,
    epochs: int,
    steps_per_epoch: int = 1,
    *,
    num_classes: int = 10,
    seed: int = 0,
) -> Figure:
    """Draw a temperature over a training run that never takes place.

    Anything that may stand for a temperature can be drawn. Where teacher and student differ there are two curves, with
    several temperatures one pair for each.

    A policy that looks at logits gets stand-ins, and the figure says so: random logits of a student that grows sharper
    and comes closer to its teacher over the run, with random labels on which the teacher is right nine times out of
    ten. They show the policy's *range and direction*, not what it does with your models. Of temperatures that differ
    between samples or classes the curve is the mean and the band runs from the smallest to the largest. What is
    learned stays at its start, since nothing is trained.

    The policy itself is left as it was: a copy is drawn, in training mode, so that its moving averages move. At most
    400 steps are drawn, evenly spread, and only at those.

    Args:
        policy_or_schedule: A number, a schedule or a policy.
        epochs: Length of the run.
        steps_per_epoch: Optimiser steps in an epoch. With 1, schedules that count steps see one per epoch.
        num_classes: Classes of the stand-in logits.
        seed: Seed of the stand-in logits.

    Returns:
        The figure; ``figure.savefig("temperature.png")`` writes it.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: What was given is no temperature.
        ValueError: Fewer than one epoch or step, or the policy cannot work with ``num_classes``.

    Example:
        >>> from kd_lightning.temperature import CosineSchedule
        >>> figure = plot_schedule(CosineSchedule(init_value=8.0, end_value=2.0), epochs=30, steps_per_epoch=100)
        >>> figure.axes[0].get_xlabel()
        'epoch'
    """
    if epochs < 1 or steps_per_epoch < 1:
        raise ValueError(
            f"a run has at least one epoch and one step, got epochs={epochs}, steps_per_epoch={steps_per_epoch}."
        )
    plt = _pyplot()
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

    figure, axes = plt.subplots(figsize=(7.0, 3.6), layout="constrained")
    plt.close(figure)  # pyplot keeps no reference to it; it can be shown and saved all the same
    differ = _draw_terms(axes, times, curves)
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
    _tidy(axes)
    return figure


def plot_softening(
    teacher_logits: Tensor | Sequence[float],
    temperatures: Sequence[float] = (1.0, 2.0, 4.0, 8.0),
    *,
    class_names: Sequence[str] | None = None,
    max_classes: int = 15,
) -> Figure:
    """Draw how the teacher's distribution and its entropy change with the temperature.

    Left: the softened probabilities, classes in the order of the first row's logits, the most probable first; on a log
    scale, because what a high temperature brings out is small. Right: the entropy over the temperature, from 0
    (certain) to log C (uniform), with the chosen temperatures marked; of a batch, the mean and the range from the
    10th to the 90th percentile of its samples.

    Args:
        teacher_logits: ``(C,)``, or a batch ``(…, C)``: its first row is drawn on the left.
        temperatures: Positive numbers, one or more.
        class_names: Names for the axis, C of them. Default: their indices.
        max_classes: How many classes to draw on the left.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: Fewer than two classes, NaN or +inf among the logits, no temperature or one that is not positive
            and finite, names that are not C.

    Example:
        >>> figure = plot_softening([6.0, 3.0, 2.0, -1.0], temperatures=[1, 4, 16])
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['T = 1', 'T = 4', 'T = 16']
    """
    logits = torch.as_tensor(teacher_logits).detach().cpu().double()
    logits = logits.reshape(-1, logits.shape[-1]) if logits.dim() else logits.reshape(1, 1)
    num_classes = logits.shape[-1]
    if num_classes < 2 or not len(logits) or logits.isnan().any() or (logits == math.inf).any():
        raise ValueError(
            "teacher_logits must be one or more rows of two or more numbers (−inf for a masked class), got shape "
            f"{tuple(torch.as_tensor(teacher_logits).shape)}."
        )
    values = [float(t) for t in temperatures]
    if not values or not all(0 < t < math.inf for t in values):
        raise ValueError(f"temperatures must be one or more positive, finite numbers, got {list(temperatures)}.")
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"class_names must name all {num_classes} classes, got {len(class_names)} names.")
    plt = _pyplot()

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained", width_ratios=[3, 2])
    plt.close(figure)
    colors = [plt.get_cmap("viridis")(x) for x in torch.linspace(0.85, 0.1, len(values)).tolist()]

    order = logits[0].argsort(descending=True)[:max_classes]
    positions = range(len(order))
    smallest = 1.0
    for t, color in zip(values, colors, strict=True):
        p = (logits[0] / t).softmax(-1)[order].clamp(min=1e-300)
        left.plot(positions, p.tolist(), "o-", color=color, markersize=4, linewidth=1.5, label=f"T = {t:g}")
        smallest = min(smallest, p[logits[0][order] > -math.inf].min().item())
    left.set_yscale("log")
    left.set_ylim(max(0.5 * smallest, 1e-8), 1.6)
    _mark(left, 1 / num_classes, "uniform")
    names = (
        [str(index) for index in order.tolist()] if class_names is None else [class_names[i] for i in order.tolist()]
    )
    turned = any(len(name) > 3 for name in names)
    left.set_xticks(list(positions), names, rotation=35 if turned else 0, ha="right" if turned else "center")
    shown = "" if len(order) == num_classes else f" ({len(order)} of {num_classes})"
    left.set_xlabel(f"class{shown}, by the teacher's logit")
    left.set_ylabel("probability")
    left.set_title("One sample's softened targets", fontsize=10, loc="left")
    left.legend(frameon=False, fontsize=9)

    grid = torch.logspace(math.log10(min(*values, 0.5)), math.log10(max(*values, 20.0)), 120, dtype=torch.float64)
    curve = torch.stack([_entropy(logits, t) for t in grid.tolist()])  # (temperatures, samples)
    right.plot(grid.tolist(), curve.mean(1).tolist(), color="0.25", linewidth=1.5)
    if len(logits) > 1:
        low, high = curve.quantile(0.1, dim=1), curve.quantile(0.9, dim=1)
        right.fill_between(grid.tolist(), low.tolist(), high.tolist(), color="0.25", alpha=0.15, linewidth=0)
    for t, color in zip(values, colors, strict=True):
        right.plot(t, _entropy(logits, t).mean().item(), "o", color=color, markersize=7, zorder=3)
    _mark(right, math.log(num_classes), f"log {num_classes}")
    right.set_xscale("log")
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if grid[0] <= t <= grid[-1]]
    right.set_xticks(ticks, [f"{t:g}" for t in ticks])
    right.minorticks_off()
    right.set_ylim(0, 1.12 * math.log(num_classes))
    right.set_xlabel("temperature T")
    right.set_ylabel("entropy (nats)")
    samples = "" if len(logits) == 1 else f", {len(logits)} samples (10 to 90 %)"
    right.set_title(f"Entropy{samples}", fontsize=10, loc="left")
    for axes in (left, right):
        _tidy(axes)
    return figure


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
    plt.close(figure)

    differ = list(student) != list(teacher)
    sides = [(teacher, _TEACHER, "teacher", "--")] if differ else []
    for values, color, label, style in (*sides, (student, _STUDENT, "student" if differ else "both", "-")):
        _draw_curve(top, steps, values, color, label, 1.0, style)
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
    plt.close(figure)
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
        monitor: What the scores are.
        baseline: Scores without a teacher.
        best: Temperature and weight of the cell to frame.
        mode: ``"max"`` if larger is better.

    Returns:
        The figure; ``figure.savefig("heatmap.png")`` writes it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is nothing to draw.

    Example:
        >>> cells = [(t, w, [0.8 + t / 100, 0.8 + w / 100]) for t in (1, 4) for w in (0.5, 0.9)]
        >>> figure = plot_sweep(cells, "val_acc", baseline=[0.79, 0.8], best=(4, 0.9))
        >>> figure.axes[0].get_title(loc="left")
        'val_acc, mean ± standard deviation of 2 seeds; no teacher (line) 0.7950 ± 0.0071'
    """
    drawn = [(t, w, list(scores)) for t, w, scores in cells if len(scores)]
    if not drawn and not baseline:
        raise ValueError("there are no scores to draw.")
    plt = _pyplot()
    temperatures, weights = sorted({t for t, _, _ in cells}), sorted({w for _, w, _ in cells})
    is_grid = len(cells) == len(temperatures) * len(weights)
    means = [math.fsum(scores) / len(scores) for _, _, scores in drawn]
    level = math.fsum(baseline) / len(baseline) if baseline else None
    levels = means if level is None else [*means, level]
    low, high = min(levels), max(levels)
    margin = 0.02 * (high - low) or 0.01 * (abs(high) or 1.0)
    norm = plt.Normalize(low - margin, high + margin)
    colors = plt.get_cmap("viridis" if mode == "max" else "viridis_r")

    size = (2.6 + 1.15 * len(temperatures), 1.7 + 0.75 * len(weights)) if is_grid else (7.0, 4.2)
    figure, axes = plt.subplots(figsize=(max(size[0], 6.4), max(size[1], 2.8)), layout="constrained")
    plt.close(figure)
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
            axes.add_patch(plt.Rectangle(corner, 0.94, 0.92, fill=False, edgecolor=_TEACHER, linewidth=2.5))
        axes.set_xticks(range(len(temperatures)), [f"{t:g}" for t in temperatures])
        axes.set_yticks(range(len(weights)), [f"{w:g}" for w in weights])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    else:
        at = [(t, w) for t, w, _ in drawn]
        axes.scatter(*zip(*at, strict=True), c=means, cmap=colors, norm=norm, s=90, edgecolors="0.3", linewidths=0.6)
        if best is not None:
            axes.scatter(*best, s=260, facecolors="none", edgecolors=_TEACHER, linewidths=2)
        axes.set_xscale("log")
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 4, 8, 16, 32, 64) if temperatures[0] <= t <= temperatures[-1]]
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.margins(0.08)
        _tidy(axes)
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
    return statistics.fmean(scores), statistics.stdev(scores) if len(scores) > 1 else None


def plot_temperature_grid(histories: Mapping[str, Sequence[_Curve]], *, columns: int = 4, log: bool = False) -> Figure:
    """Draw the temperatures of several policies side by side over training, all to one scale.

    Solid: the student's mean, or both where they agree; dashed: the teacher's. The band runs from the smallest to the
    largest temperature of a batch. Several loss terms are drawn one paler than the other.

    Args:
        histories: For each name one ``(student, teacher)`` per loss term, each of them a mean, smallest and largest
            temperature for every epoch, from 0; all of the same length.
        columns: Panels in a row.
        log: Whether the temperatures are on a log scale, which shows small ones beside large ones.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is nothing to draw, or not the same number of epochs for all.

    Example:
        >>> falling, constant = [(8.0, 8.0, 8.0), (4.0, 4.0, 4.0)], [(4.0, 4.0, 4.0)] * 2
        >>> figure = plot_temperature_grid({"asymmetric": [(constant, falling)], "constant": [(constant, constant)]})
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['asymmetric', 'constant']
    """
    lengths = {name: {len(side) for term in terms for side in term} for name, terms in histories.items()}
    counts = set().union(*lengths.values())
    if len(counts) != 1 or 0 in counts or not all(lengths.values()):
        raise ValueError(f"each name needs temperatures for the same number of epochs, got {lengths}.")
    epochs = range(*counts)
    plt = _pyplot()
    columns = min(columns, len(histories))
    rows = math.ceil(len(histories) / columns)
    size = (2.6 * columns, 1.6 * rows + 0.6)
    shared: dict[str, Any] = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, grid = plt.subplots(rows, columns, figsize=size, **shared)
    plt.close(figure)
    handles = {}
    panels = grid.flatten().tolist()
    for axes, (name, terms) in zip(panels, histories.items(), strict=False):
        differ = _draw_terms(axes, epochs, terms)
        if differ:
            handles = dict(zip(("student", "teacher"), reversed(axes.get_lines()[:2]), strict=True))
        axes.set_title(name, fontsize=9, loc="left")
        _tidy(axes)
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


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install kd-lightning[plots]") from error
    return plt


def _stand_ins(epochs: int, steps_per_epoch: int, num_classes: int, seed: int, learns: bool) -> Iterator[Signals]:
    """Signals of a run: every step where they are few, else evenly spread, both ends included."""
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
) -> tuple[list[float], Sequence[_Curve]]:
    """Times, and for each loss term and side the mean, smallest and largest temperature at each time."""
    from kd_lightning.temperature import Temperature

    policy = copy.deepcopy(policy).cpu().train()
    times: list[float] = []
    curves: list[tuple[list[_Spread], list[_Spread]]] = []
    for signals in _stand_ins(epochs, steps_per_epoch, num_classes, seed, learns):
        with torch.no_grad():
            computed = policy(signals)
        terms = [computed] if isinstance(computed, Temperature) else list(computed)
        while len(curves) < len(terms):  # a joined policy may give more terms later
            curves.append(([_ABSENT] * len(times), [_ABSENT] * len(times)))
        for number, curve in enumerate(curves):
            for side, values in enumerate(curve):
                t = terms[number][side] if number < len(terms) else None
                values.append(_ABSENT if t is None else (t.mean().item(), t.min().item(), t.max().item()))
        times.append(signals.progress.step / steps_per_epoch)
    return times, curves


def _draw_terms(axes: Axes, times: Sequence[float], curves: Sequence[_Curve]) -> bool:
    """Student and teacher of each loss term, paler for later terms; whether student and teacher differ."""
    differ = any(student != teacher for student, teacher in curves)
    for number, (student, teacher) in enumerate(curves):
        shade = 1.0 if len(curves) == 1 else 1.0 - 0.65 * number / (len(curves) - 1)
        label = "" if len(curves) == 1 else f" {number + 1}"
        if differ:
            _draw_curve(axes, times, teacher, _TEACHER, f"teacher{label}", shade, "--")
        _draw_curve(axes, times, student, _STUDENT, f"student{label}" if differ else f"term{label}", shade, "-")
    return differ


def _draw_curve(
    axes: Axes,
    times: Sequence[float],
    values: Sequence[_Spread],
    color: str,
    label: str,
    shade: float,
    style: str,
) -> None:
    mean, low, high = zip(*values, strict=True)
    axes.plot(times, mean, style, color=color, alpha=shade, linewidth=2, label=label)
    if low != high:
        axes.fill_between(times, low, high, color=color, alpha=0.15 * shade, linewidth=0)


def _title(subject: object) -> str:
    subject = getattr(subject, "schedule", subject)
    text = f"constant T = {subject:g}" if isinstance(subject, (int, float)) else repr(subject)
    if "\n" in text or "object at" in text:  # a policy made of policies, a user's function
        text = getattr(subject, "__name__", type(subject).__name__)
    return text if len(text) <= 80 else text[:79] + "…"


def _mark(axes: Axes, value: float, text: str) -> None:
    """A dotted line with its name in the margin."""
    axes.axhline(value, color="0.6", linewidth=0.8, linestyle=":")
    place = {"xycoords": ("axes fraction", "data"), "xytext": (3, 0), "textcoords": "offset points"}
    axes.annotate(text, (1.0, value), **place, va="center", fontsize=8, color="0.4")


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _entropy(logits: Tensor, temperature: float) -> Tensor:
    p = (logits / temperature).softmax(-1)
    return torch.special.entr(p).sum(-1)
