"""The input of a temperature policy: one batch, the parts of it that only the policy reads, and the progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kd_lightning.schedules import Progress


@dataclass(frozen=True)
class Signals:
    """The input of a policy: one batch, and the progress of training.

    Attributes:
        student_logits: ``(…, C)``, class dimension last.
        teacher_logits: The same shape.
        targets: Class indices in the logits' shape without the last dimension, or a boolean mask of the positions that
            count; None where there are neither.
        progress: Step and epoch.
        ignore_index: Target value of positions that do not count; None where all count.
        depth: Where in the student the logits come from: 0 is its first layer with a loss, 1 the last; 1 for the
            logits themselves.
        extra: Parts of the batch by their keys, those that the policy's ``batch_keys`` name.

    Example:
        >>> import torch
        >>> signals = Signals(torch.zeros(2, 3), torch.zeros(2, 3), targets=torch.tensor([1, -100]))
        >>> signals.valid
        tensor([ True, False])
    """

    student_logits: Tensor
    teacher_logits: Tensor
    targets: Tensor | None = None
    progress: Progress = field(default_factory=Progress)
    ignore_index: int | None = -100
    depth: float = 1.0
    extra: Mapping[Any, Any] = field(default_factory=dict)

    @property
    def class_targets(self) -> Tensor | None:
        """The targets where they are class indices, one per position; None otherwise (none, soft, multi-label)."""
        targets = self.targets
        if targets is None or targets.is_floating_point() or targets.shape != self.student_logits.shape[:-1]:
            return None
        return None if targets.dtype == torch.bool else targets

    @property
    def valid(self) -> Tensor | None:
        """Mask of the positions that count, in the logits' shape without the last dimension; None where all do."""
        if self.targets is not None and self.targets.dtype == torch.bool:
            return self.targets
        targets = self.class_targets
        return None if targets is None or self.ignore_index is None else targets != self.ignore_index

    def full(self, value: float) -> Tensor:
        """Return a ``(1,)`` tensor on the device and in the dtype of the student's logits.

        Inside a policy that is float32 (or float64) whatever torch's default dtype is at the moment; half-precision
        trainers change it around the training step.
        """
        return self.student_logits.new_full((1,), value)

    def replace(self, **changes: Any) -> Signals:
        """Return a copy with some attributes changed."""
        return dataclasses.replace(self, **changes)


def take_extra(batch: Any, keys: Sequence[str | int]) -> tuple[Any, dict[Any, Any]]:
    """Return a batch without the parts that a temperature reads, and these parts by their keys.

    A batch that is neither mapping nor tuple has no parts; one that is missing is left to the policy to report.

    Example:
        >>> take_extra({"x": 1, "y": 2, "source": "web"}, ["source"])
        ({'x': 1, 'y': 2}, {'source': 'web'})
        >>> take_extra((1, 2, "web"), [2])
        ((1, 2), {2: 'web'})
    """
    if not keys:
        return batch, {}
    if isinstance(batch, Mapping):
        extra = {key: batch[key] for key in keys if key in batch}
        return ({key: part for key, part in batch.items() if key not in extra} if extra else batch), extra
    if isinstance(batch, (tuple, list)):
        parts = dict(enumerate(batch))
        extra = {key: parts.pop(key) for key in keys if isinstance(key, int) and key in parts}
        return (tuple(parts.values()) if extra else batch), extra
    return batch, {}
