"""A checkpoint of another module or another optimiser: what differs, before torch fails on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim.optimizer import Optimizer

from kd_lightning.teachers.weights import misfit


def describe_misfit(module: str, saved: Mapping[str, Any], wanted: Mapping[str, Any], networks: list[str]) -> str:
    """Return why a checkpoint's weights do not load into a module, and what to do.

    Args:
        module: Name of the module's class.
        saved: The checkpoint's state dict.
        wanted: The module's state dict.
        networks: Names under which the module has its networks.
    """
    theirs = list(dict.fromkeys(name.partition(".")[0] for name in saved))
    if networks and not {*networks} & {*theirs}:
        return (
            f"the checkpoint is of another module: its weights are under {', '.join(theirs) or 'no name at all'}, "
            f"those of this {module} under {', '.join(networks)}. Give a checkpoint of a {module}; another network's "
            "weights are for a teacher, FrozenTeacher(network, checkpoint=...)."
        )
    differences = misfit(saved, wanted).partition(". ")[0]
    return (
        f"the checkpoint's weights do not fit this {module}: {differences}. Build the {module} with the networks, "
        "losses and layers of the run that wrote it, or start anew without the checkpoint."
    )


def check_optimizers(saved: Iterable[Any], optimizers: Iterable[Optimizer]) -> None:
    """Raise if the states of a checkpoint's optimisers are of other optimisers than those of the run.

    torch takes over the options of the saved groups, and fails in a later step for one that is absent.

    Args:
        saved: State dicts of optimisers, of a strategy that keeps them as torch does.
        optimizers: The optimisers of the run.

    Raises:
        ValueError: If the groups have other options, or another number of parameters.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> check_optimizers([torch.optim.SGD([weight]).state_dict()], [torch.optim.AdamW([weight])])
        Traceback (most recent call last):
            ...
        ValueError: the checkpoint's optimizer has the options dampening, momentum and nesterov, but ...
    """
    way_out = (
        "Give the optimizer of the run that wrote it, or start a new run without the checkpoint: a checkpoint goes on "
        "with its optimizer."
    )
    for state, optimizer in zip(saved, optimizers, strict=False):
        groups = state.get("param_groups") if isinstance(state, Mapping) else None
        if not groups:
            continue
        # either may have options that a release of torch has added, but not both
        theirs = {*groups[0]} - {*optimizer.defaults, "params", "initial_lr", "swa_lr", "max_lr", "min_lr"}
        theirs -= {"max_momentum", "base_momentum"}  # of cyclic schedulers
        ours = {*optimizer.defaults} - {*groups[0]}
        if theirs and ours:
            raise ValueError(
                f"the checkpoint's optimizer has the options {_listed(theirs)}, but this run's "
                f"{type(optimizer).__name__} has {_listed(ours)}. {way_out}"
            )
        sizes = [len(group["params"]) for group in groups]
        own = [len(group["params"]) for group in optimizer.param_groups]
        if sizes != own:
            raise ValueError(
                f"the checkpoint's optimizer has {sizes} parameters in its groups, but this run's "
                f"{type(optimizer).__name__} has {own}. {way_out}"
            )


def _listed(names: set[str]) -> str:
    *rest, last = sorted(names)
    return f"{', '.join(rest)} and {last}" if rest else last
