"""The figure of what a temperature does to the teacher's distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kd_lightning.functional import predictive_entropy
from kd_lightning.plotting.style import log_axis, mark, pyplot, subplots, tidy
from kd_lightning.ranking import check_counts, checked_temperatures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_softening(
    teacher_logits: Tensor | Sequence[float],
    temperatures: Sequence[float] = (1.0, 2.0, 4.0, 8.0),
    *,
    class_names: Sequence[str] | None = None,
    max_classes: int = 15,
) -> Figure:
    """Draw how the teacher's distribution and its entropy change with the temperature.

    Left: the softened probabilities, classes in the order of the first row's logits, the most probable first; on a log
    scale, because the probabilities that a high temperature raises are small. Right: the entropy over the temperature,
    from 0 (certain) to log C (uniform), with the chosen temperatures marked; of a batch, the mean and the range from
    the 10th to the 90th percentile of its samples.

    Args:
        teacher_logits: ``(C,)``, or a batch ``(…, C)``: its first row is drawn on the left.
        temperatures: Positive numbers, one or more.
        class_names: Names for the axis, C of them. Default: their indices.
        max_classes: How many classes to draw on the left.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If there are fewer than two classes, a logit is NaN or +inf, the temperatures are not one or more
            positive, finite numbers, or the number of names is not C.

    Example:
        >>> figure = plot_softening([6.0, 3.0, 2.0, -1.0], temperatures=[1, 4, 16])
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['T = 1', 'T = 4', 'T = 16']
    """
    try:
        given = torch.as_tensor(teacher_logits)
    except (RuntimeError, TypeError, ValueError):
        raise TypeError(f"teacher_logits must be a tensor, or a sequence of numbers, got {teacher_logits!r}.") from None
    logits = given.detach().cpu().double()
    logits = logits.reshape(-1, logits.shape[-1]) if logits.dim() else logits.reshape(1, 1)
    num_classes = logits.shape[-1]
    if num_classes < 2 or not len(logits) or logits.isnan().any() or (logits == math.inf).any():
        raise ValueError(
            "teacher_logits must be one or more rows of two or more numbers (−inf for a masked class), got shape "
            f"{tuple(given.shape)}."
        )
    values = checked_temperatures("temperatures", temperatures)
    check_counts(max_classes=max_classes)
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"class_names must name all {num_classes} classes, got {len(class_names)} names.")
    plt = pyplot()

    figure, (left, right) = subplots(1, 2, figsize=(9.5, 3.6), width_ratios=[3, 2])
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
    mark(left, 1 / num_classes, "uniform")
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
    curve = torch.stack([predictive_entropy(logits, t) for t in grid.tolist()])  # (temperatures, samples)
    right.plot(grid.tolist(), curve.mean(1).tolist(), color="0.25", linewidth=1.5)
    if len(logits) > 1:
        low, high = curve.quantile(0.1, dim=1), curve.quantile(0.9, dim=1)
        right.fill_between(grid.tolist(), low.tolist(), high.tolist(), color="0.25", alpha=0.15, linewidth=0)
    for t, color in zip(values, colors, strict=True):
        right.plot(t, predictive_entropy(logits, t).mean().item(), "o", color=color, markersize=7, zorder=3)
    mark(right, math.log(num_classes), f"log {num_classes}")
    log_axis(right, [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if grid[0] <= t <= grid[-1]])
    right.set_ylim(0, 1.12 * math.log(num_classes))
    right.set_xlabel("temperature T")
    right.set_ylabel("entropy (nats)")
    samples = "" if len(logits) == 1 else f", {len(logits)} samples (10 to 90 %)"
    right.set_title(f"Entropy{samples}", fontsize=10, loc="left")
    for axes in (left, right):
        tidy(axes)
    return figure
