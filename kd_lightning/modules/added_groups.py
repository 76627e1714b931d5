"""Groups of parameters that join an optimiser whose schedulers are made already."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch.optim import LBFGS
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

_OF_SCHEDULERS = ("lr_lambdas", "max_lrs", "base_momentums", "max_momentums", "min_lrs")
"""The lists of torch's schedulers that have an entry for each group, beside ``base_lrs``."""
_OF_GROUPS = ("max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")
"""The entries that torch's schedulers keep in the groups, beside ``initial_lr``."""


def add_groups(configured: Any, groups: list[dict[str, Any]]) -> Any:
    """Add groups to the first optimiser of what ``configure_optimizers`` returned, and to that optimiser's schedulers.

    A group's learning rate is ``group["lr"]``, or else the optimiser's default. Torch's schedulers treat the group as
    if they had been made after it was added, with the options that the first group has.

    Args:
        configured: What ``configure_optimizers`` returned.
        groups: The groups, with options as for ``Optimizer.add_param_group``.

    Returns:
        ``configured``.

    Raises:
        TypeError: If a scheduler is no ``LRScheduler`` of torch.
        ValueError: If the optimiser has one group only (``LBFGS``), or a scheduler has no rate for a group added.

    Example:
        >>> import torch
        >>> weights, temperature = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weights], lr=0.1, weight_decay=0.5)
        >>> scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
        >>> _ = add_groups(([optimizer], [scheduler]), [{"params": [temperature], "weight_decay": 0.0}])
        >>> [(group["weight_decay"], group["max_lr"]) for group in optimizer.param_groups]
        [(0.5, 0.1), (0.0, 0.1)]
    """
    parts = list(_parts(configured))
    optimizer = next((part for part in parts if isinstance(part, Optimizer)), None)
    if optimizer is None or not groups:
        return configured
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "a temperature that learns is a group of its own in the optimizer, but LBFGS has one group only. Take "
            "another optimizer, such as AdamW, or a temperature that learns nothing."
        )
    given = [part for part in parts if getattr(part, "optimizer", None) is optimizer]
    schedulers = list(dict.fromkeys(each for scheduler in given for each in _flat(scheduler)))
    for group in groups:
        _add_group(optimizer, group, schedulers)
    for scheduler in schedulers:
        _check_rates(scheduler, len(optimizer.param_groups))
    return configured


def _parts(configured: Any) -> Iterator[Any]:
    """Yield the optimisers and schedulers in what ``configure_optimizers`` may return."""
    if isinstance(configured, Mapping):
        for key in ("optimizer", "lr_scheduler", "scheduler"):
            yield from _parts(configured.get(key))
    elif isinstance(configured, (tuple, list)):
        for part in configured:
            yield from _parts(part)
    else:
        yield configured


def _flat(scheduler: Any) -> Iterator[Any]:
    """Yield a scheduler, and those that it chains or runs in sequence."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _flat(inner)


def _add_group(optimizer: Optimizer, group: dict[str, Any], schedulers: list[Any]) -> None:
    optimizer.add_param_group(group)
    first, new = optimizer.param_groups[0], optimizer.param_groups[-1]
    copied = [key for key in _OF_GROUPS if key in first]
    if "max_momentum" in first or any(hasattr(scheduler, "max_momentums") for scheduler in schedulers):
        copied += ["momentum", "betas"]
    if "max_lr" in first or any(hasattr(scheduler, "max_lrs") for scheduler in schedulers):
        copied += ["lr", "initial_lr"]  # a cycle sets rates, whatever they were before; other schedulers multiply
    elif "initial_lr" in first:
        own, initial = new["lr"], first["initial_lr"]
        new["initial_lr"] = own
        new["lr"] = first["lr"] if own == initial else own * (first["lr"] / initial) if initial else own
    new.update({key: first[key] for key in copied if key in first})
    for scheduler in schedulers:
        for values in (getattr(scheduler, name) for name in _OF_SCHEDULERS if hasattr(scheduler, name)):
            values.append(values[0])
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs.append(new["initial_lr"])
        if hasattr(scheduler, "_last_lr"):
            scheduler._last_lr = [*scheduler._last_lr, new["lr"]]


def _check_rates(scheduler: Any, count: int) -> None:
    """Raise if a scheduler that is not torch's gives no rate for each group."""
    name = type(scheduler).__name__
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(
            f"a temperature that learns is a group of its own in the optimizer, which {name}, no LRScheduler of torch, "
            "would leave out. Take one of torch's, such as LambdaLR, or a temperature that learns nothing."
        )
    if type(scheduler).get_lr.__module__.startswith("torch."):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # get_lr warns where it is called between steps
        try:
            rates = list(scheduler.get_lr())
        except (IndexError, KeyError, ValueError) as error:
            rates, reason = [], f"{type(error).__name__}: {str(error).rstrip('.')}"
        else:
            reason = f"it gives {len(rates)} rates"
    if len(rates) != count:
        raise ValueError(
            f"a temperature that learns is a group of its own, the last of {count} in the optimizer, which joined "
            f"after {name} was made, and its get_lr does not know the group: {reason}. Compute the rates from "
            "self.base_lrs, one for each group; or give DistillationModule optimizer and lr_scheduler, which makes the "
            "groups first."
        )
