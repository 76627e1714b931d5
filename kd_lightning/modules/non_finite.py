"""The check that a run stops at a loss that is not finite, in place of training on with NaN weights."""

from __future__ import annotations

import math

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from kd_lightning.output import DistillationOutput


class NonFiniteHandler(Callback):
    """A callback that handles losses that are not finite, so that :class:`NonFiniteWatch` leaves them alone."""


class NonFiniteWatch:
    """Stops a run at a loss that is NaN or infinite.

    On the CPU every step is looked at, before its backward. Elsewhere a step only records, on the device, whether it
    was the first, and the record is read in the steps that log.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None  # the step of the first such loss, -1 before

    def check(self, out: DistillationOutput, step: int, reads: bool) -> None:
        """Record a step; raise if a loss was not finite, for which only ``reads`` may wait for the device."""
        loss = out.loss.detach()
        if loss.is_cpu:
            if not math.isfinite(loss.item()):
                raise FloatingPointError(_message(out, step))
            return
        first = loss.new_full((), -1.0, dtype=torch.float64) if self._first is None else self._first
        self._first = torch.where((first < 0) & ~torch.isfinite(loss), float(step), first)
        if reads and (found := int(self._first.item())) >= 0:
            raise FloatingPointError(_message(out, found))


def _message(out: DistillationOutput, step: int) -> str:
    sides = []
    for side, logits in (("student", out.student_logits), ("teacher", out.teacher_logits)):
        rows = (logits.isnan() | (logits == torch.inf)).movedim(out.class_dim, -1).any(-1)  # -inf masks a class
        if bad := int(rows.sum()):
            sides.append(f"{bad} of {rows.numel()} rows of the {side}'s logits are NaN or infinite")
    terms = [f"{name} {value.item():g}" for name, value in (("kd_loss", out.kd_loss), ("task_loss", out.task_loss))]
    found = " and ".join(sides) or "all logits are finite, so a loss or its temperature overflows"
    return (
        f"the loss of step {step} is not finite ({', '.join(terms)}): {found}. Look for damaged inputs, too high a "
        "learning rate or too low a precision; SkipNonFinite leaves out such steps instead of stopping."
    )
