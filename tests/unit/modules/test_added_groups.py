"""A group that joins an optimiser late is scheduled as if it had been there when the schedulers were made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer
from torch.optim.swa_utils import SWALR

from kd_lightning.modules.optimization import add_groups

pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in")
Make = Callable[[Any], Any]


def cycle(optimizer: Optimizer, **options: Any) -> LRScheduler:
    return schedulers.CyclicLR(optimizer, 0.02, 0.2, step_size_up=3, **options)


def warmed(optimizer: Optimizer) -> LRScheduler:
    warmup = schedulers.LinearLR(optimizer, 0.25, total_iters=3)
    return schedulers.SequentialLR(optimizer, [warmup, schedulers.CosineAnnealingLR(optimizer, 6)], [3])


def chained(optimizer: Optimizer) -> LRScheduler:
    parts = [schedulers.ConstantLR(optimizer, 0.5, 3), schedulers.ExponentialLR(optimizer, 0.9)]
    return schedulers.ChainedScheduler(parts, optimizer)


SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.5 ** (step + 1)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.25, 4),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.25, total_iters=4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "SequentialLR": warmed,
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 5, eta_min=0.001),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, min_lr=0.03),
    "CyclicLR": cycle,
    "CyclicLR without momentum": lambda o: cycle(o, cycle_momentum=False, mode="triangular2"),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.3, total_steps=12),
    "OneCycleLR in three": lambda o: schedulers.OneCycleLR(o, 0.3, total_steps=12, three_phase=True),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 5, power=2.0),
    "SWALR": lambda o: SWALR(o, 0.01, anneal_epochs=3),
}
PARAMETERS = [torch.ones(2, requires_grad=True) for _ in range(3)]


def made(make: Make, late: bool, adam: bool = False, **options: Any) -> tuple[Optimizer, Any]:
    group = {"params": [PARAMETERS[2]], "weight_decay": 0.0, **options}
    groups: list[dict[str, Any]] = [{"params": [PARAMETERS[0]]}, {"params": [PARAMETERS[1]], "lr": 0.05}]
    groups += [] if late else [group]
    optimizer = torch.optim.AdamW(groups, lr=0.1) if adam else torch.optim.SGD(groups, lr=0.1, momentum=0.8)
    scheduler = make(optimizer)
    if late:
        config = {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        assert add_groups(config, [group]) is config
    return optimizer, scheduler


def settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def course(optimizer: Optimizer, scheduler: Any, steps: int = 10) -> list[Any]:
    """Return what the groups are set to before and after each step."""
    states = [settings(optimizer)]
    for _ in range(steps):
        optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))
        states.append(settings(optimizer))
    return states


def test_each_scheduler_of_torch_is_tried() -> None:
    assert {*schedulers.__all__, "SWALR"} <= {"LRScheduler"} | {name.split()[0] for name in SCHEDULERS}


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adamw"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_late_group_is_scheduled_as_an_early_one(name: str, adam: bool) -> None:
    early, late = made(SCHEDULERS[name], False, adam), made(SCHEDULERS[name], True, adam)
    assert late[1].state_dict().keys() == early[1].state_dict().keys()
    assert course(*late) == course(*early)
    assert late[1].get_last_lr() == early[1].get_last_lr()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_rate_of_its_own_is_scheduled(name: str) -> None:
    early = course(*made(SCHEDULERS[name], False, lr=0.07))
    for ours, theirs in zip(course(*made(SCHEDULERS[name], True, lr=0.07)), early, strict=True):
        assert [set(group) for group in ours] == [set(group) for group in theirs]
        assert [group["lr"] for group in ours] == pytest.approx([group["lr"] for group in theirs], rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_resumed_group_goes_on_exactly(name: str) -> None:
    whole = course(*made(SCHEDULERS[name], True))
    optimizer, scheduler = made(SCHEDULERS[name], True)
    course(optimizer, scheduler, 4)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    for late in (True, False):  # False: a checkpoint is the same, whichever way the group came
        optimizer, scheduler = made(SCHEDULERS[name], late)
        optimizer.load_state_dict(copy.deepcopy(saved[0]))
        scheduler.load_state_dict(copy.deepcopy(saved[1]))
        assert course(optimizer, scheduler, 6) == whole[4:]


def test_options_for_each_group_of_the_module_leave_room() -> None:
    """The first group's stand for the group that joins."""
    for make in (
        lambda o: schedulers.LambdaLR(o, [lambda step: 0.5**step, lambda step: 1.0]),
        lambda o: schedulers.OneCycleLR(o, [0.3, 0.2], total_steps=12),
        lambda o: schedulers.ReduceLROnPlateau(o, patience=0, min_lr=[0.03, 0.01]),
    ):
        for first, _, new in course(*made(make, True)):
            assert new["lr"] == first["lr"]


def test_a_scheduler_of_ones_own_that_reads_base_lrs() -> None:
    class Halving(LRScheduler):
        def get_lr(self) -> Any:
            return [rate * 0.5**self.last_epoch for rate in self.base_lrs]

    assert course(*made(Halving, True)) == course(*made(Halving, False))


def test_groups_join_the_first_optimizer_and_its_schedulers_alone() -> None:
    first, second = (torch.optim.SGD([p], lr=0.1) for p in PARAMETERS[:2])
    other = schedulers.StepLR(second, 1)
    add_groups(([first, second], [schedulers.StepLR(first, 1), other]), [{"params": [PARAMETERS[2]]}])
    assert [len(optimizer.param_groups) for optimizer in (first, second)] == [2, 1]
    assert other.base_lrs == [0.1]
