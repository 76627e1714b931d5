"""The task loss, with which the student would be trained without a teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

__all__ = ["CrossEntropyLoss"]


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss``, except that a batch without a labelled position gives 0 where torch gives NaN.

    So samples without a label (target ``ignore_index``) can be distilled without spoiling the task loss. Arguments,
    shapes (class dimension second) and soft targets are torch's.

    Example:
        >>> loss = CrossEntropyLoss()
        >>> loss(torch.zeros(2, 3), torch.tensor([-100, -100]))
        tensor(0.)
    """

    @override
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if input.dim() > 2 and input.stride(1) == 1 and target.dim() == input.dim() - 1 and self.reduction != "none":
            # (B, V, L) that is a view of (B, L, V): row by row, as it lies in memory, takes a quarter of the time
            input, target = input.movedim(1, -1).flatten(0, -2), target.flatten()
        loss = super().forward(input, target)
        if target.is_floating_point() or self.reduction != "mean":
            return loss
        labelled = (target != self.ignore_index).any()
        return torch.where(labelled, loss, input.sum() * 0.0)  # keeps the graph: DDP expects every gradient
