"""A teacher from outside of the package, in Python and through YAML."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from kd_lightning import Distiller
from kd_lightning.cli import main

ROOT = Path(__file__).parents[2]
MODULE = """
import torch

from kd_lightning.teachers import Teacher, extract_logits


class Favourite(Teacher):
    calls = 0

    def __init__(self, label: int = 0, classes: int = 10) -> None:
        self.label, self.classes = label, classes

    def logits(self, inputs, index=None, extract=extract_logits):
        Favourite.calls += 1
        return 5.0 * torch.eye(self.classes)[self.label].expand(len(inputs), -1)

    def fingerprint(self):
        return f"favourite {self.label} of {self.classes}"
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "kd_outside_teacher.py").write_text(MODULE)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kd-lightning"])
    yield importlib.import_module("kd_outside_teacher")
    sys.modules.pop("kd_outside_teacher", None)


def test_in_python(module) -> None:
    teacher = module.Favourite(label=2, classes=3)
    distiller = Distiller(teacher, temperature=2.0, kd_weight=1.0, task_weight=0.0)
    out = distiller(torch.ones(4, 1), torch.zeros(4, 3))
    p = torch.tensor([0.0, 0.0, 2.5]).softmax(0)
    torch.testing.assert_close(out.kd_loss, 4 * (p * (3 * p).log()).sum())
    assert distiller.teacher is teacher
    assert not list(distiller.parameters())


def test_in_yaml(module, tmp_path: Path) -> None:
    config = (ROOT / "configs" / "digits.yaml").read_text()
    start, end = config.index("    teacher:\n"), config.index("    temperature:\n")
    teacher = "    teacher: {class_path: kd_outside_teacher.Favourite, init_args: {label: 3}}\n"
    (tmp_path / "mine.yaml").write_text(config[:start] + teacher + config[end:])
    main(["fit", "--config", "mine.yaml", "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"])
    assert module.Favourite.calls > 0
