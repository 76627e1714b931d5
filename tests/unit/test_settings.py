"""Settings after construction work as written, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from kd_lightning import DistillationModule, Distiller, FrozenTeacher
from kd_lightning.callbacks import DistillationCallback
from kd_lightning.losses import KDLoss
from kd_lightning.schedules import ConstantSchedule
from kd_lightning.temperature import ConstantTemperature, LinearSchedule, Signals
from tests.helpers import make_loader, make_network, make_teacher

MAKERS: list[Callable[[nn.Module], Any]] = [
    Distiller,
    lambda teacher: DistillationModule(student=make_network(), teacher=teacher),
    DistillationCallback,
]
makers = pytest.mark.parametrize("make", MAKERS, ids=["Distiller", "DistillationModule", "DistillationCallback"])


@makers
def test_numbers_schedules_and_networks(make: Callable[[nn.Module], Any]) -> None:
    holder = make(make_teacher())
    distiller = getattr(holder, "distiller", holder)
    holder.temperature = 2.0
    holder.kd_weight = 0.5
    holder.task_weight = LinearSchedule(1.0, 0.0)
    network = make_teacher(norm=False)
    holder.teacher = network
    assert isinstance(distiller.temperature, ConstantTemperature)
    assert holder.temperature is distiller.temperature
    logits = torch.zeros(1, 6)
    assert distiller.temperature(Signals(logits, logits)).student.item() == 2.0
    assert distiller.kd_weight == holder.kd_weight == ConstantSchedule(0.5)
    assert distiller.task_weight == LinearSchedule(1.0, 0.0)
    assert isinstance(holder.teacher, FrozenTeacher)
    assert holder.teacher is distiller.teacher
    assert not any(parameter.requires_grad for parameter in network.parameters())
    if isinstance(holder, nn.Module):
        assert not {id(p) for p in network.parameters()} & {id(p) for p in holder.parameters()}
        assert not any("teacher" in name for name in holder.state_dict())


@makers
def test_what_is_refused(make: Callable[[nn.Module], Any]) -> None:
    holder = make(make_teacher())
    with pytest.raises(ValueError, match=r"temperature must be a positive, finite number"):
        holder.temperature = -1.0
    with pytest.raises(TypeError, match="temperature must be a number, a schedule"):
        holder.temperature = "hot"
    with pytest.raises(ValueError, match="value must be a finite number, not negative, got -1"):
        holder.kd_weight = -1
    with pytest.raises(TypeError, match=r"task_weight must be a number or a schedule \(Progress → number\), got None"):
        holder.task_weight = None
    with pytest.raises(ValueError, match="which trains nothing"):
        Distiller(make_teacher(), kd_weight=0, task_weight=0.0)


def test_a_fit_uses_what_was_set(make_trainer: Callable[..., Trainer]) -> None:
    torch.manual_seed(0)
    student, teacher = make_network(), make_teacher()
    states = []
    for late in (False, True):
        options: dict[str, Any] = {"temperature": 2.0, "kd_weight": 0.5, "kd_loss": KDLoss(scale="none")}
        module = DistillationModule(
            student=(network := make_network()),
            teacher=None if late else teacher,
            optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
            **({} if late else options),
        )
        network.load_state_dict(student.state_dict())
        for name, value in options.items() if late else ():
            setattr(module, name, value)
        if late:
            module.teacher = teacher
        make_trainer(max_epochs=1).fit(module, make_loader())
        states.append(module.student.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_set_after_a_cast() -> None:
    distiller: Any = Distiller(make_teacher()).double()
    distiller.teacher = make_teacher().double()
    distiller.temperature = 3.0
    out = distiller(torch.ones(2, 8).double(), torch.zeros(2, 6).double(), torch.tensor([0, 1]))
    assert out.temperature.student.item() == 3.0


@pytest.mark.parametrize("number", [np.float32(4), np.float64(4), np.int64(4)])
def test_numpy_numbers(number: Any) -> None:
    distiller = Distiller(make_teacher(), temperature=number, kd_weight=number)
    assert distiller.temperature(Signals(torch.zeros(1, 6), torch.zeros(1, 6))).student.item() == 4.0
    assert distiller.kd_weight == ConstantSchedule(4.0)
