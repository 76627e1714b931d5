"""A policy and a loss from outside of the package, in Python and through YAML."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from kd_lightning.cli import main
from kd_lightning.temperature import Signals

ROOT = Path(__file__).parents[2]
MODULE = """
import torch
from typing_extensions import Unpack

from kd_lightning.functional import Temperature, kd_loss
from kd_lightning.losses.logits import LogitLoss
from kd_lightning.temperature import TemperaturePolicy
from kd_lightning.temperature.base import Bounds


class MyTemperature(TemperaturePolicy):
    def __init__(self, value: float = 3.0, **bounds: Unpack[Bounds]) -> None:
        super().__init__(**bounds)
        self.value = value

    def compute(self, signals):
        temperature = signals.full(self.value)
        return Temperature(temperature, temperature)


class MyLoss(LogitLoss):
    function = staticmethod(lambda *logits, **options: 2 * kd_loss(*logits, **options))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "kd_outside.py").write_text(MODULE)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kd-lightning"])
    yield importlib.import_module("kd_outside")
    sys.modules.pop("kd_outside", None)


def fit(*options: str) -> None:
    fast = ("--trainer.fast_dev_run=true", "--trainer.accelerator=cpu")
    main(["fit", "--config", "configs/digits.yaml", *fast, *options])


def test_in_python(module) -> None:
    logits = torch.randn(2, 3)
    policy = module.MyTemperature(5.0, max_temperature=4.0)
    assert repr(policy) == "MyTemperature(value=5, max_temperature=4)"
    assert policy(Signals(logits, logits)).student.item() == 4.0
    with pytest.raises(TypeError, match="max_temprature"):
        module.MyTemperature(max_temprature=4.0)
    assert module.MyLoss()(logits, -logits, policy(Signals(logits, logits))) > 0


def test_in_yaml(module, tmp_path: Path) -> None:
    (tmp_path / "outside.yaml").write_text(
        "model:\n  init_args:\n"
        "    temperature: {class_path: kd_outside.MyTemperature, init_args: {value: 5, max_temperature: 50}}\n"
        "    kd_loss: {class_path: kd_outside.MyLoss}\n"
    )
    fit("--config", "outside.yaml")


def test_a_misspelt_bound_in_yaml(module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wrong.yaml").write_text(
        "model:\n  init_args:\n    temperature: {class_path: LogitStdTemperature, init_args: {max_temprature: 50}}\n"
    )
    with pytest.raises(SystemExit):
        fit("--config", "wrong.yaml")
    assert "max_temprature" in capsys.readouterr().err
