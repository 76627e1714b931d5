"""Optimisers and schedulers: what a user may give, what becomes of it, and groups of parameters that join later."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.parsing import lightning_hasattr, lightning_setattr
from torch.optim import LBFGS
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.optimizer import Optimizer
from typing_extensions import Required, TypedDict


class LRSchedulerConfig(TypedDict, total=False):
    """Lightning's ``lr_scheduler`` dictionary, with a function from the optimiser in place of the scheduler.

    Attributes:
        scheduler: A function from the optimiser to a scheduler.
        interval: Whether the scheduler steps each ``"epoch"``, the default, or each ``"step"``.
        frequency: The number of epochs or steps between two steps of the scheduler, 1 by default.
        monitor: The metric that ``ReduceLROnPlateau`` follows.
        strict: Whether a missing ``monitor`` is an error, the default, or a warning.
        reduce_on_plateau: Whether the scheduler's ``step`` takes the metric, as ``ReduceLROnPlateau``'s does.
        name: The name under which ``LearningRateMonitor`` logs.
    """

    scheduler: Required[LRSchedulerCallable]
    interval: Literal["epoch", "step"]
    frequency: int
    monitor: str
    strict: bool
    reduce_on_plateau: bool
    name: str


def check_optimization(optimizer: object, lr_scheduler: object) -> None:
    """Raise if no optimiser or scheduler can be made of what is given."""
    if optimizer is not None:
        _OPTIMIZER.check(optimizer)
    if lr_scheduler is None:
        return
    config: Mapping[str, Any] = lr_scheduler if isinstance(lr_scheduler, Mapping) else {"scheduler": lr_scheduler}
    allowed = LRSchedulerConfig.__annotations__
    if unknown := [str(key) for key in config if key not in allowed]:
        raise ValueError(f"lr_scheduler must have keys out of {', '.join(allowed)}, got {', '.join(unknown)}.")
    _SCHEDULER.check(config.get("scheduler"))
    interval, frequency = config.get("interval", "epoch"), config.get("frequency", 1)
    if interval not in ("epoch", "step"):
        raise ValueError(
            f"the interval of lr_scheduler must be 'epoch' or 'step', got {interval!r}. Leave it out for 'epoch'."
        )
    if not isinstance(frequency, int) or isinstance(frequency, bool) or frequency < 1:
        raise ValueError(
            f"the frequency of lr_scheduler must be an integer of 1 or more, got {frequency!r}. Between two steps of "
            "the scheduler lie so many epochs or steps, whichever interval names."
        )


@dataclass(frozen=True)
class _Factory:
    """An argument that is a function, and what the function takes and makes."""

    name: str
    takes: str
    makes: tuple[type, ...]
    example: str

    def check(self, value: object) -> None:
        if callable(value) and (not isinstance(value, type) or issubclass(value, self.makes)):
            return
        if isinstance(value, self.makes):
            received = f"a {type(value).__name__} that is made already"
        else:
            received = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
        raise TypeError(
            f"{self.name} must be a function or class that is called with {self.takes}, got {received}. "
            f"An example is {self.example}."
        )

    def __call__(self, function: Callable[[Any], Any], argument: Any) -> Any:
        try:
            made = function(argument)
        except TypeError as error:
            raise TypeError(
                f"{self.name} was called with {self.takes} alone and failed: {str(error).rstrip('.')}. Bind its other "
                f"arguments, as in {self.example}."
            ) from error
        if not isinstance(made, self.makes):
            raise TypeError(
                f"{self.name} must return {' or '.join(kind.__name__ for kind in self.makes)}, "
                f"got {type(made).__name__}. An example is {self.example}."
            )
        return made


_OPTIMIZER = _Factory(
    "optimizer",
    "the parameters",
    (Optimizer,),
    "functools.partial(torch.optim.SGD, lr=0.1), or in YAML {class_path: torch.optim.SGD, init_args: {lr: 0.1}}",
)
_SCHEDULER = _Factory(
    "lr_scheduler",
    "the optimizer",
    (LRScheduler, ReduceLROnPlateau),
    "functools.partial(torch.optim.lr_scheduler.StepLR, step_size=10), which {'scheduler': …, 'interval': 'step'} may "
    "hold as well, or in YAML {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 10}}",
)


def configure(
    optimizer: OptimizerCallable | None,
    lr_scheduler: LRSchedulerCallable | LRSchedulerConfig | None,
    groups: list[dict[str, Any]],
    lr: float | None,
    monitor: str,
) -> Any:
    """Return what ``configure_optimizers`` returns, with AdamW and a learning rate of 0.001 as the default.

    ``lr`` takes the place of the optimiser's, except in groups that set their own. ``ReduceLROnPlateau`` follows
    ``monitor`` unless ``lr_scheduler`` names a metric.
    """
    check_optimization(optimizer, lr_scheduler)
    # before the optimiser fills its defaults into the groups
    own = {id(parameter) for group in groups if "lr" in group for parameter in group["params"]}
    make = optimizer or functools.partial(torch.optim.AdamW, lr=1e-3)
    made = _OPTIMIZER(make, groups if len(groups) > 1 else groups[0]["params"])
    if lr is not None:
        check_lr(lr)
        for group in made.param_groups:
            if group["lr"] == made.defaults["lr"] and not own & {id(parameter) for parameter in group["params"]}:
                group["lr"] = lr
    if lr_scheduler is None:
        return made
    config: dict[str, Any] = dict(lr_scheduler) if isinstance(lr_scheduler, Mapping) else {"scheduler": lr_scheduler}
    scheduler = config["scheduler"] = _SCHEDULER(config["scheduler"], made)
    if isinstance(scheduler, ReduceLROnPlateau):
        config.setdefault("monitor", getattr(scheduler, "monitor", monitor))
    return {"optimizer": made, "lr_scheduler": config}


def check_lr(lr: object) -> None:
    """Raise if a learning rate is no finite number above 0."""
    if not isinstance(lr, Real) or isinstance(lr, bool) or not 0 < float(lr) < math.inf:
        raise ValueError(f"lr must be a finite number above 0, got {lr!r}. None leaves the optimizer's own.")


def pass_lr_on(network: LightningModule, lr: float) -> None:
    """Set the learning rate of a network that configures its own optimiser."""
    check_lr(lr)
    for name in ("lr", "learning_rate"):
        if lightning_hasattr(network, name):
            lightning_setattr(network, name, lr)
            return
    raise ValueError(
        f"lr={lr} was set, but {type(network).__name__} configures the optimizer itself and has neither lr nor "
        "learning_rate to take it. Give the module an optimizer, or the network such an attribute."
    )


_OF_SCHEDULERS = ("lr_lambdas", "max_lrs", "base_momentums", "max_momentums", "min_lrs")
"""The lists of torch's schedulers that have an entry for each group, beside ``base_lrs``."""
_OF_GROUPS = ("max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")
"""The entries that torch's schedulers keep in the groups, beside ``initial_lr``."""


def add_groups(configured: Any, groups: list[dict[str, Any]]) -> Any:
    """Add groups to the first optimiser of what ``configure_optimizers`` returned, and to that optimiser's schedulers.

    A group's learning rate is ``group["lr"]``, or else the optimiser's default. Torch's schedulers treat the group as
    if they had been made after it was added, with the options that the first group has.

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
