"""`load_from_checkpoint` of modules that were built in Python, and what it says of what a checkpoint does not hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from kd_lightning import ClassificationModule, DistillationModule, FrozenTeacher
from kd_lightning.losses import CrossEntropyLoss, DKDLoss
from kd_lightning.temperature import CosineSchedule, LearnableTemperature
from tests.helpers import NUM_CLASSES, NUM_FEATURES, assert_same, make_data, make_loader, make_teacher

MakeTrainer = Callable[..., Trainer]


def saved(module: Any, make_trainer: MakeTrainer, folder: Path) -> str:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, make_loader())
    trainer.save_checkpoint(folder / "run.ckpt")
    return str(folder / "run.ckpt")


def shown_call(error: pytest.ExceptionInfo[TypeError]) -> str:
    found = re.search(r"as in (.*)\. What is left out", str(error.value))
    assert found is not None, error.value
    return found[1]


def test_the_error_shows_the_call_that_rebuilds_the_module(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = DistillationModule(
        nn.Linear(NUM_FEATURES, NUM_CLASSES),
        FrozenTeacher(make_teacher()),
        temperature=LearnableTemperature(init_value=5.0),
        kd_loss=DKDLoss(beta=4.0),
        kd_weight=CosineSchedule(0.9, 0.5),
        task_weight=0.3,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    path = saved(module, make_trainer, tmp_path)
    with pytest.raises(
        TypeError, match="does not hold its student: networks, policies and losses are given again"
    ) as e:
        DistillationModule.load_from_checkpoint(path)
    assert "\n" not in str(e.value)
    call = shown_call(e)
    assert call.startswith(
        f"DistillationModule.load_from_checkpoint({path!r}, student=Linear(in_features={NUM_FEATURES}"
    )
    assert "teacher=FrozenTeacher(...)" in call
    assert call.endswith("optimizer=...)")
    names = {"Linear": nn.Linear, **globals()}
    names |= {"FrozenTeacher": lambda _: FrozenTeacher(make_teacher())}  # the two that are no code: what the user knows
    loaded = eval(call.replace("optimizer=...", "optimizer=None"), names)
    assert_same(loaded.state_dict(), module.state_dict())
    assert repr(loaded.distiller) == repr(module.distiller)
    assert loaded.hparams["task_weight"] == 0.3
    inputs = make_data(3).tensors[0]
    assert torch.equal(loaded(inputs), module(inputs))


def test_a_classification_module(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = ClassificationModule(nn.Linear(NUM_FEATURES, NUM_CLASSES), task_loss=CrossEntropyLoss(label_smoothing=0.1))
    path = saved(module, make_trainer, tmp_path)
    with pytest.raises(TypeError, match="does not hold its model") as e:
        ClassificationModule.load_from_checkpoint(path)
    loaded = eval(shown_call(e), {"Linear": nn.Linear, **globals()})
    assert_same(loaded.state_dict(), module.state_dict())
    assert loaded.task_loss.label_smoothing == 0.1


class Mine(DistillationModule):
    """A subclass that builds everything itself, as people write it."""

    def __init__(self, width: int, temperature: float = 3.0) -> None:
        student = nn.Sequential(nn.Linear(NUM_FEATURES, width), nn.ReLU(), nn.Linear(width, NUM_CLASSES))
        super().__init__(student, make_teacher(), LearnableTemperature(init_value=temperature))


class Passes(DistillationModule):
    """A subclass with an argument of its own beside all of the base's."""

    def __init__(self, extra: nn.Module, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.extra = extra


def test_a_subclass_that_builds_its_parts_loads_from_the_path_alone(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = Mine(7)
    loaded = Mine.load_from_checkpoint(saved(module, make_trainer, tmp_path))
    assert_same(loaded.state_dict(), module.state_dict())


def test_a_subclass_with_keywords(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = Passes(nn.Identity(), student=nn.Linear(NUM_FEATURES, NUM_CLASSES), teacher=make_teacher())
    path = saved(module, make_trainer, tmp_path)
    with pytest.raises(TypeError, match="does not hold its extra") as e:
        Passes.load_from_checkpoint(path)
    assert "extra=Identity(), student=Linear(" in shown_call(e) or "student=Linear(" in shown_call(e)
    given = {"extra": nn.Identity(), "student": nn.Linear(NUM_FEATURES, NUM_CLASSES)}
    assert_same(Passes.load_from_checkpoint(path, **given).state_dict(), module.state_dict())


def test_another_task_loss_is_said(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = ClassificationModule(nn.Linear(NUM_FEATURES, NUM_CLASSES), task_loss=nn.MultiMarginLoss())
    path = saved(module, make_trainer, tmp_path)
    with pytest.warns(UserWarning, match=r"trained with task_loss=MultiMarginLoss\(\), but now task_loss=CrossEntropy"):
        ClassificationModule.load_from_checkpoint(path, model=nn.Linear(NUM_FEATURES, NUM_CLASSES))
    distilled = DistillationModule(nn.Linear(NUM_FEATURES, NUM_CLASSES), make_teacher(), task_loss=nn.MultiMarginLoss())
    path = saved(distilled, make_trainer, tmp_path)
    with pytest.warns(UserWarning, match=r"give DistillationModule the same task_loss"):
        DistillationModule.load_from_checkpoint(path, student=nn.Linear(NUM_FEATURES, NUM_CLASSES))


def test_not_on_an_instance(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = ClassificationModule(nn.Linear(NUM_FEATURES, NUM_CLASSES))
    path = saved(module, make_trainer, tmp_path)
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        module.load_from_checkpoint(path)


def test_an_open_file_and_a_missing_one(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = ClassificationModule(nn.Linear(NUM_FEATURES, NUM_CLASSES))
    path = saved(module, make_trainer, tmp_path)
    with open(path, "rb") as file:
        loaded = ClassificationModule.load_from_checkpoint(file, model=nn.Linear(NUM_FEATURES, NUM_CLASSES))
    assert_same(loaded.state_dict(), module.state_dict())
    with open(path, "rb") as file, pytest.raises(TypeError, match=r"load_from_checkpoint\(file, model=Linear\("):
        ClassificationModule.load_from_checkpoint(file)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        ClassificationModule.load_from_checkpoint(tmp_path / "nowhere.ckpt")


def test_a_checkpoint_that_does_not_say_what_it_was_built_of(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    path = saved(ClassificationModule(nn.Linear(NUM_FEATURES, NUM_CLASSES)), make_trainer, tmp_path)
    content = torch.load(path, weights_only=True)
    del content["built_in_python"], content["task_loss"]
    torch.save(content, path)
    with pytest.raises(TypeError, match=r"model=\.\.\.\)\. What is left out beside model takes its default\."):
        ClassificationModule.load_from_checkpoint(path)
