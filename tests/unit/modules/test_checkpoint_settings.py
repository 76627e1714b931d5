"""Settings in a checkpoint are data: an evil checkpoint runs nothing, and an honest one loads."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from kd_lightning import ClassificationModule, DistillationModule
from kd_lightning.cli import main
from kd_lightning.modules.checkpoint_settings import check_settings
from kd_lightning.temperature import LearnableTemperature, Signals

NETWORK = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 4, "out_features": 3}}
CLI = {"_class_path": "kd_lightning.DistillationModule", "_instantiator": "lightning.pytorch.cli.instantiate_module"}


def touch(path: str) -> nn.Module:
    Path(path).touch()
    return nn.Identity()


class Touches:
    """No part of a model."""

    def __init__(self, path: str) -> None:
        Path(path).touch()

    def __call__(self, *_: Any) -> float:
        return 4.0


def unannotated(path):
    Path(path).touch()


HERE = __name__


def evil(target: Path) -> dict[str, dict[str, Any]]:
    """Settings that would make the file, by what they misuse, and beside them what the message is to name."""
    command = f"touch {target}"
    popen = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(target)]}}
    traced = {"root": "subprocess.getoutput", "concrete_args": {"cmd": command, "encoding": None, "errors": None}}
    trace = {"class_path": "torch.fx.symbolic_trace", "init_args": traced}
    build = {"class_path": "kd_lightning.models.build_model", "init_args": {"factory": "torch.nn.Identity"}}
    return {
        "os.system": {"student": {"class_path": "os.system", "init_args": {"command": command}}},
        "posix.system": {"student": {"class_path": "torch.os.system", "init_args": {"command": command}}},
        "subprocess.Popen": {"student": NETWORK, "temperature": popen},
        "pdb.run": {"student": NETWORK, "temperature": {"class_path": "pdb.run", "init_args": {"statement": "1"}}},
        "builtins.eval": {"student": {"class_path": "builtins.eval", "init_args": {"source": command}}},
        "a function traced": {"student": trace},
        "a file of settings": {"student": str(target.with_suffix(".yaml"))},
        "settings in a string": {"student": yaml.safe_dump(trace)},
        "a function as schedule": {"student": NETWORK, "temperature": "os.system"},
        "a function as teacher": {
            "student": NETWORK,
            "teacher": {"class_path": "kd_lightning.teachers.FunctionTeacher", "init_args": {"fn": "os.system"}},
        },
        "keywords of a factory": {"student": {**build, "dict_kwargs": {"x": popen}}},
        "a string in keywords of a factory": {"student": {**build, "dict_kwargs": {"x": yaml.safe_dump(popen)}}},
        "a list": {"student": NETWORK, "layers": [popen]},
        "a class of the user's": {
            "student": NETWORK,
            "temperature": {"class_path": f"{HERE}.Touches", "init_args": {"path": str(target)}},
        },
        "a function of the user's": {
            "student": {"class_path": f"{HERE}.unannotated", "init_args": {"path": str(target)}}
        },
        "a loader": {
            "student": {
                "class_path": "lightning.pytorch.LightningModule.load_from_checkpoint",
                "init_args": {"checkpoint_path": str(target), "weights_only": False},
            }
        },
        "no dotted path": {"student": {"class_path": "eval"}},
    }


NAMES = [*evil(Path("touched"))]


def settings_of(name: str, target: Path) -> dict[str, Any]:
    target.with_suffix(".yaml").write_text(yaml.safe_dump(evil(target)["a function traced"]["student"]))
    return evil(target)[name]


def write(path: Path, settings: dict[str, Any], key: str = "hyper_parameters", **more: Any) -> Path:
    state = DistillationModule(nn.Linear(4, 3)).state_dict()
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6.0", key: {**CLI, **settings}, **more}, path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_an_evil_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    target = tmp_path / "touched"
    path = write(tmp_path / "evil.ckpt", settings_of(name, target))
    with pytest.raises(ValueError, match=r"^\S+evil\.ckpt names \S+ as (student|temperature|teacher|layers)\S*, and"):
        DistillationModule.load_from_checkpoint(path)
    assert not target.exists()


@pytest.mark.filterwarnings("ignore")  # of jsonargparse, which will refuse os.system by itself in version 5
@pytest.mark.parametrize("name", ["a function traced", "a class of the user's"])
def test_the_file_would_be_made_where_nothing_checks_the_settings(name: str, tmp_path: Path) -> None:
    target = tmp_path / "touched"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DistillationModule, "model", fail_untyped=False)
    with suppress(Exception):
        parser.instantiate_classes(parser.parse_object({"model": settings_of(name, target)}))
    assert target.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_from_the_command_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "touched"
    path = write(tmp_path / "evil.ckpt", settings_of(name, target))
    for command in ("test", "fit"):
        with pytest.raises(ValueError, match=r"evil\.ckpt names \S+ as \S+, and settings in a checkpoint may name"):
            main([command, "--ckpt_path", str(path), "--data", "DigitsDataModule", "--trainer.fast_dev_run=true"])
    assert not target.exists()


@pytest.mark.slow
def test_the_console_script_says_it_in_one_paragraph(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    path = write(tmp_path / "evil.ckpt", settings_of("os.system", target))
    command = [sys.executable, "-m", "kd_lightning", "test", "--ckpt_path", str(path), "--data", "DigitsDataModule"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "may name parts of a model only" in done.stderr
    assert "Traceback" not in done.stderr
    assert not target.exists()


@pytest.mark.parametrize("key", ["hparams", "module_arguments"])
def test_keys_of_old_checkpoints_are_read_too(key: str, tmp_path: Path) -> None:
    target = tmp_path / "touched"
    path = write(tmp_path / "evil.ckpt", evil(target)["a function traced"], key)
    with pytest.raises(ValueError, match=r"names subprocess\.getoutput as student\.init_args\.root"):
        DistillationModule.load_from_checkpoint(path)
    assert not target.exists()


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch touched",)


@pytest.mark.parametrize("opened", [False, True])
def test_a_pickle_that_runs_code_is_not_read(opened: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "hyper_parameters": {"student": Evil()}}, "evil.ckpt")
    path: Any = io.BytesIO(Path("evil.ckpt").read_bytes()) if opened else "evil.ckpt"
    with pytest.raises(
        ValueError, match=r"cannot be read as data: it holds \w+\.system\. A checkpoint is read without"
    ):
        DistillationModule.load_from_checkpoint(path)
    assert not Path("touched").exists()


def test_the_callers_own_arguments_are_not_checked(tmp_path: Path) -> None:
    settings = evil(tmp_path / "touched")["subprocess.Popen"]
    path = write(tmp_path / "a.ckpt", settings)
    module = DistillationModule.load_from_checkpoint(path, temperature=lambda progress: 3.0)
    assert module.distiller.temperature(_signals()).student.item() == 3.0


def _signals() -> Signals:
    return Signals(torch.zeros(2, 3), torch.zeros(2, 3))


def schedule(name: str, **arguments: float) -> dict[str, Any]:
    return {"class_path": f"kd_lightning.temperature.{name}", "init_args": arguments}


HONEST: dict[str, dict[str, Any]] = {
    "a class": {"student": NETWORK},
    "an annotated function": {
        "student": {"class_path": "torchvision.models.resnet18", "init_args": {"num_classes": 3}},
        "_weights": False,
    },
    "build_model": {
        "student": {
            "class_path": "kd_lightning.models.build_model",
            "init_args": {"factory": "torch.nn.Linear"},
            "dict_kwargs": {"in_features": 4, "out_features": 3},
        }
    },
    "schedule, loss, teacher, optimiser": {
        "student": NETWORK,
        "temperature": schedule("CosineSchedule", init_value=8.0, end_value=2.0),
        "kd_loss": {"class_path": "kd_lightning.losses.DKDLoss"},
        "kd_weight": schedule("LinearSchedule", init_value=0.0, end_value=1.0),
        "teacher": {
            "class_path": "kd_lightning.FrozenTeacher",
            "init_args": {
                "module": NETWORK,
                "checkpoint": "teacher.pt",
                "cache": {"class_path": "kd_lightning.teachers.TeacherCache", "init_args": {"path": "cache"}},
            },
        },
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 3}},
    },
    "policies within a policy, layers": {
        "student": NETWORK,
        "temperature": {"class_path": "kd_lightning.temperature.LearnableTemperature", "init_args": {"lr": 0.1}},
        "layers": [
            {
                "class_path": "kd_lightning.LayerTerm",
                "init_args": {
                    "student_layer": "token.embedding",  # the name of a module of the standard library before the dot
                    "teacher_layer": "os.system",  # a name for a layer is data
                    "loss": {"class_path": "kd_lightning.losses.HintLoss"},
                },
            }
        ],
        "_weights": False,
    },
    "a function that is the default": {
        "student": {
            "class_path": "torch.nn.TransformerEncoderLayer",
            "init_args": {"d_model": 4, "nhead": 1, "activation": "torch.nn.functional.relu"},
        },
        "_weights": False,
    },
}


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_checkpoint_passes(name: str, tmp_path: Path) -> None:
    settings = {**CLI, **HONEST[name]}
    check_settings(settings, "a.ckpt")
    if settings.pop("_weights", True):
        module = DistillationModule.load_from_checkpoint(write(tmp_path / "a.ckpt", settings))
        assert isinstance(module.student, nn.Linear)


def test_a_learned_policy_comes_back(tmp_path: Path) -> None:
    settings = {"student": NETWORK, "temperature": {"class_path": "kd_lightning.temperature.LearnableTemperature"}}
    state = DistillationModule(nn.Linear(4, 3), temperature=LearnableTemperature(init_value=7.0)).state_dict()
    module = DistillationModule.load_from_checkpoint(write(tmp_path / "a.ckpt", settings, state_dict=state))
    assert module.distiller.temperature(_signals()).student.item() == pytest.approx(7.0)


def test_a_checkpoint_of_a_fixed_class(tmp_path: Path) -> None:
    fixed = {"_instantiator": CLI["_instantiator"], "model": NETWORK}
    state = ClassificationModule(nn.Linear(4, 3)).state_dict()
    torch.save(
        {"state_dict": state, "pytorch-lightning_version": "2.6.0", "hyper_parameters": fixed}, tmp_path / "a.ckpt"
    )
    assert isinstance(ClassificationModule.load_from_checkpoint(tmp_path / "a.ckpt").model, nn.Linear)
    fixed["model"] = {"class_path": "os.system", "init_args": {"command": "true"}}
    torch.save(
        {"state_dict": state, "pytorch-lightning_version": "2.6.0", "hyper_parameters": fixed}, tmp_path / "a.ckpt"
    )
    with pytest.raises(ValueError, match=r"names os\.system as model, and"):
        ClassificationModule.load_from_checkpoint(tmp_path / "a.ckpt")


def test_a_network_that_the_caller_gave_is_no_setting_of_the_next_checkpoint(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.ckpt", {"student": NETWORK, "kd_weight": 0.5})
    for generation in range(2):
        module = DistillationModule.load_from_checkpoint(path, student=nn.Linear(4, 3))
        assert module.hparams["kd_weight"] == 0.5
        trainer = make_trainer()
        trainer.predict(module, DataLoader(torch.ones(2, 4), batch_size=2))  # pyright: ignore[reportArgumentType]
        path = tmp_path / f"{generation}.ckpt"
        trainer.save_checkpoint(path)
    assert "student" not in torch.load(path, weights_only=True)["hyper_parameters"]


def test_a_module_that_is_not_imported_is_lightnings_to_refuse(tmp_path: Path) -> None:
    (tmp_path / "other_module.py").write_text("raise AssertionError")
    path = write(tmp_path / "a.ckpt", {"student": NETWORK, "_class_path": "other_module.Mine"})
    with pytest.raises(ValueError, match="import the module that defines the class before loading"):
        DistillationModule.load_from_checkpoint(path)
    assert "other_module" not in sys.modules


def test_what_a_checkpoint_names_must_be_a_module(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.ckpt names os\.system as model"):
        check_settings({"_class_path": "os.system"}, "a.ckpt")
