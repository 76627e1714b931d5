"""Optimisers and schedulers that have no room for a temperature that learns."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from kd_lightning.modules.optimization import add_groups
from tests.unit.bad_input.case import Case

WEIGHTS, TEMPERATURE = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)


class Fixed(LRScheduler):
    """A scheduler that counts the groups when it is made."""

    def __init__(self, optimizer: Any) -> None:
        self.rates = [group["lr"] for group in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self) -> Any:
        return [rate / 2 for rate in self.rates]


class Numbered(Fixed):
    """A scheduler that looks each group up."""

    def get_lr(self) -> Any:
        return [self.rates[number] for number in range(len(self.optimizer.param_groups))]


class Foreign:
    """A scheduler of another library."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def added(scheduler: Callable[[Any], Any] | None, kind: Any = torch.optim.SGD) -> Callable[[], object]:
    def write() -> object:
        optimizer = kind([WEIGHTS], lr=0.1)
        made = [] if scheduler is None else [{"scheduler": scheduler(optimizer)}]
        return add_groups(([optimizer], made), [{"params": [TEMPERATURE]}])

    return write


NOT_KNOWN = (
    "a temperature that learns is a group of its own, the last of 2 in the optimizer, which joined after {} was made, "
    "and its get_lr does not know the group: {}. Compute the rates from self.base_lrs, one for each group; or give "
    "DistillationModule optimizer and lr_scheduler, which makes the groups first."
)
CASES = [
    Case("LBFGS", added(None, torch.optim.LBFGS), ValueError,
         "a temperature that learns is a group of its own in the optimizer, but LBFGS has one group only. Take another "
         "optimizer, such as AdamW, or a temperature that learns nothing."),
    Case("too few rates", added(Fixed), ValueError, NOT_KNOWN.format("Fixed", "it gives 1 rates")),
    Case("no rate", added(Numbered), ValueError, NOT_KNOWN.format("Numbered", "IndexError: list index out of range")),
    Case("another library's", added(Foreign), TypeError,
         "a temperature that learns is a group of its own in the optimizer, which Foreign, no LRScheduler of torch, "
         "would leave out. Take one of torch's, such as LambdaLR, or a temperature that learns nothing."),
]  # fmt: skip
