"""The progress of training, which schedules are a function of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Progress", "Unit"]

Unit = Literal["epoch", "step"]


@dataclass(frozen=True)
class Progress:
    """The progress of training.

    Attributes:
        step: Optimiser steps taken so far, from 0.
        max_steps: Steps in the whole run; None if unknown.
        epoch: Epochs finished so far, from 0.
        max_epochs: Epochs in the whole run; None if unknown.

    Example:
        >>> Progress(step=25, max_steps=100, epoch=2, max_epochs=8).fraction
        0.25
    """

    step: int = 0
    max_steps: int | None = None
    epoch: int = 0
    max_epochs: int | None = None

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1]: by steps where their number is known, else by epochs.

        Raises:
            ValueError: If the run has no known end.
        """
        if self.max_steps is not None:
            return min(self.step / max(self.max_steps, 1), 1.0)
        if self.max_epochs is not None:
            return min(self.epoch / max(self.max_epochs, 1), 1.0)
        raise ValueError(
            "this schedule spans the whole run, whose end must be known, but Progress has neither max_steps nor "
            "max_epochs. Give the Trainer max_epochs or max_steps (max_time alone names no step), or take a schedule "
            "that counts, such as ExponentialSchedule."
        )

    def count(self, unit: Unit) -> int:
        """Return the epochs or steps so far."""
        return self.epoch if unit == "epoch" else self.step

    def segment(self, begin: int, end: int | None, unit: Unit) -> Progress:
        """Return the progress within one part of the run: from ``begin`` to ``end`` (None: to the end of the run).

        Steps are converted to epochs and back where the run's length is known in both.

        Example:
            >>> Progress(step=60, max_steps=100, epoch=6, max_epochs=10).segment(5, None, "epoch")
            Progress(step=10, max_steps=50, epoch=1, max_epochs=5)
        """
        per_epoch = None if not (self.max_steps and self.max_epochs) else self.max_steps / self.max_epochs

        def convert(value: int, to: Unit) -> int | None:
            if to == unit:
                return value
            if per_epoch is None:
                return None
            return round(value * per_epoch if to == "step" else value / per_epoch)

        def part(count: int, maximum: int | None, to: Unit) -> tuple[int, int | None]:
            start = convert(begin, to)
            if start is None:
                return 0, None
            stop = maximum if end is None else convert(end, to)
            return max(count - start, 0), None if stop is None else stop - start

        step, max_steps = part(self.step, self.max_steps, "step")
        epoch, max_epochs = part(self.epoch, self.max_epochs, "epoch")
        return Progress(step, max_steps, epoch, max_epochs)
