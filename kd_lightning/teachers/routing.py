"""The rows that each teacher of an ensemble knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kd_lightning.functional.temperature import check_values
from kd_lightning.temperature.signals import Signals

Route: TypeAlias = Callable[[Any, Tensor | None], Tensor]


class Routing:
    """Which of ``count`` teachers know a row: by its label, by a key of the inputs, or by a function."""

    def __init__(self, by: Sequence[Sequence[int]] | str | Route, count: int) -> None:
        self.by = by
        self.count = count
        self._classes: Tensor | None = None
        if isinstance(by, str) or callable(by):
            return
        if not isinstance(by, Sequence) or not all(isinstance(classes, Sequence) for classes in by):
            raise TypeError(
                "routing must be the classes of each teacher, a key of the inputs, or a function of (inputs, targets), "
                f"got {by!r}."
            )
        if len(by) != count or not all(by) or min(map(min, by)) < 0:
            raise ValueError(f"routing by class needs class indices for each of the {count} teachers, got {by!r}.")
        self._classes = torch.zeros(max(map(max, by)) + 2, count, dtype=torch.bool)  # the last: no class
        for teacher, classes in enumerate(by):
            self._classes[list(classes), teacher] = True

    def known(self, shape: torch.Size, signals: Signals, inputs: Any) -> Tensor:
        """Return a mask ``(K, …, 1)``, True where a teacher knows the row, for logits of this shape, classes last."""
        positions, by = shape[:-1], self.by
        if self._classes is not None:
            route = self._by_class(signals.class_targets, positions, shape[-1])
        elif isinstance(by, str):
            if not isinstance(inputs, Mapping) or by not in inputs:
                kind = f"the keys {sorted(map(str, inputs))}" if isinstance(inputs, Mapping) else type(inputs).__name__
                raise ValueError(f"routing={by!r} names a key of the inputs, which are {kind}.")
            route = inputs[by]
        else:
            assert callable(by)
            route = by(inputs, signals.targets)
        if not isinstance(route, Tensor) or route.is_floating_point() or route.is_complex():
            kind = route.dtype if isinstance(route, Tensor) else type(route).__name__
            raise TypeError(f"routing must give a tensor of integers or booleans, got {kind}.")
        numbers = torch.arange(self.count, device=route.device)
        mask = route if route.dtype == torch.bool else route.unsqueeze(-1) == numbers
        *rows, width = mask.shape
        if width != self.count or not rows or tuple(rows) != tuple(positions[: len(rows)]):
            raise ValueError(
                f"routing gave {tuple(route.shape)} for {self.count} teachers and logits of shape {tuple(shape)}: it "
                f"must be the teacher's number for each row, ({positions[0]},), or a mask ({positions[0]}, "
                f"{self.count})."
            )
        ones = [1] * (len(positions) - len(rows))
        return mask.movedim(-1, 0).reshape(self.count, *rows, *ones, 1)

    def _by_class(self, targets: Tensor | None, positions: Sequence[int], num_classes: int) -> Tensor:
        if targets is None:
            raise ValueError(
                f"routing by class needs class indices as targets in the shape {tuple(positions)}. Without them, route "
                "by a function of (inputs, targets) or a key of the inputs."
            )
        assert self._classes is not None
        known = self._classes = self._classes.to(targets.device)
        unknown = len(known) - 1
        if unknown > num_classes:
            raise ValueError(f"routing names class {unknown - 1}, but classes go from 0 to {num_classes - 1}.")
        return known[torch.where((targets >= 0) & (targets < unknown), targets, unknown)]


def check_served(known: Tensor, signals: Signals) -> Tensor:
    """Return the mask, True for all teachers in rows that none knows; raise if the loss does not leave them out."""
    anybody = known.any(0)
    valid = signals.valid
    served = anybody if valid is None else anybody | ~valid.unsqueeze(-1)
    check_values(
        served.all(),
        "routing leaves a row to no teacher of positive weight: give each row at least one, by a teacher's number "
        f"from 0 to {len(known) - 1} or a mask, or leave it out of the loss by its target (ignore_index).",
    )
    return known | ~anybody
