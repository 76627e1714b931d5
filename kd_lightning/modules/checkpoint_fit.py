"""A checkpoint of other policies, another module or another optimiser: what fits is loaded, what does not is told."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any

from lightning.pytorch import Trainer
from torch.optim.optimizer import Optimizer

from kd_lightning.teachers.weights import misfit
from kd_lightning.temperature import TemperaturePolicy


def describe_misfit(module: str, saved: Mapping[str, Any], wanted: Mapping[str, Any], networks: list[str]) -> str:
    """Return why the weights that were saved are not those wanted of a module with these networks, and what to do."""
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


_OF_A_POLICY = re.compile(r"(temperature|teacher_temperatures\.\d+|(?:layers\.\d+|outputs\.[^.]+)\.temperature)\.(.+)")


def fit_policies(
    state: dict[str, Any], policies: Mapping[str, TemperaturePolicy], prefix: str = ""
) -> tuple[set[str], set[str]]:
    """Replace in a checkpoint's state what the policies of the run cannot load by their own values.

    Returns the names that were left out of the state, which is changed in place, and those that keep the run's values.
    A state without policies is left as it is.

    Example:
        >>> from kd_lightning.temperature import ConstantTemperature, LearnableTemperature
        >>> learnt = LearnableTemperature()
        >>> state = {f"temperature.{name}": value for name, value in learnt.state_dict().items()}
        >>> fit_policies(state, {"temperature": ConstantTemperature(4.0)})
        ({'temperature.raw'}, set())
        >>> list(state)
        ['temperature.multiplier']
    """
    saved: dict[str, dict[str, Any]] = {}
    for key in state:
        if key.startswith(prefix) and (match := _OF_A_POLICY.fullmatch(key.removeprefix(prefix))):
            saved.setdefault(match[1], {})[match[2]] = state[key]
    left_out, kept = set[str](), set[str]()
    for owner in dict.fromkeys([*saved, *policies]) if saved else ():
        policy, theirs = policies.get(owner), saved.get(owner, {})
        ours = {} if policy is None else policy.state_dict()
        trial = copy.deepcopy(policy)
        for name in dict.fromkeys([*theirs, *ours]):
            if trial is not None and name in ours and name in theirs and _loads(trial, name, theirs[name]):
                continue
            state.pop(f"{prefix}{owner}.{name}", None)
            (kept if name in ours else left_out).add(f"{owner}.{name}")
            if name in ours:
                state[f"{prefix}{owner}.{name}"] = ours[name]
    return left_out, kept


def _loads(policy: TemperaturePolicy, name: str, value: Any) -> bool:
    """Return True if the policy takes this value, whose shape a policy may adapt to."""
    try:
        policy.load_state_dict({name: value}, strict=False)
    except RuntimeError:  # another shape
        return False
    return True


def fit_optimizer(checkpoint: dict[str, Any], trainer: Trainer, policies: Iterable[TemperaturePolicy]) -> None:
    """Replace the policies' groups in a checkpoint's state of the first optimiser, and of its schedulers, by the run's.

    The policies' groups are the optimiser's last. Where the groups before them are not the checkpoint's, nothing is
    changed, and torch raises its own error.
    """
    if not trainer.optimizers or not checkpoint.get("optimizer_states"):
        return
    optimizer, saved = trainer.optimizers[0], checkpoint["optimizer_states"][0]
    own = {id(parameter) for policy in policies for parameter in policy.parameters()}
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    last = takewhile(lambda group: own.issuperset(map(id, group["params"])), reversed(optimizer.param_groups))
    first = len(optimizer.param_groups) - sum(1 for _ in last)
    if sizes[:first] != [len(group["params"]) for group in optimizer.param_groups[:first]]:
        return
    groups = len(sizes), len(optimizer.param_groups)
    fresh = optimizer.state_dict()["param_groups"][first:]
    checkpoint["optimizer_states"][0] = {
        **saved,
        "state": {index: value for index, value in saved["state"].items() if index < sum(sizes[:first])},
        "param_groups": saved["param_groups"][:first] + fresh,
    }
    states = checkpoint.get("lr_schedulers", [])
    for index, (config, state) in enumerate(zip(trainer.lr_scheduler_configs, states, strict=False)):
        if getattr(config.scheduler, "optimizer", None) is optimizer:
            states[index] = _fit_values(state, config.scheduler.state_dict(), first, groups)


def _fit_values(saved: Any, live: Any, first: int, groups: tuple[int, int]) -> Any:
    """Return a scheduler's saved state with the live values in place of those of the groups from ``first`` on."""
    if isinstance(saved, dict) and isinstance(live, dict):
        return {name: _fit_values(value, live.get(name), first, groups) for name, value in saved.items()}
    if not isinstance(saved, list) or not isinstance(live, list):
        return saved
    if any(isinstance(value, dict) for value in saved):  # the schedulers of a SequentialLR
        return [_fit_values(*pair, first, groups) for pair in zip(saved, live, strict=True)]
    return saved[:first] + live[first:] if (len(saved), len(live)) == groups else saved
