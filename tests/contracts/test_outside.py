"""A policy, a loss and a teacher from outside of the package: one file each, in Python and through YAML."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kd_lightning import Distiller
from kd_lightning.cli import main
from kd_lightning.temperature import Signals

ROOT = Path(__file__).parents[2]
OUTSIDE = {
    "kd_outside_policy": """
from typing_extensions import Unpack

from kd_lightning.temperature import Temperature, TemperaturePolicy
from kd_lightning.temperature.base import Bounds


class MyTemperature(TemperaturePolicy):
    calls = 0

    def __init__(self, value: float = 3.0, **bounds: Unpack[Bounds]) -> None:
        super().__init__(**bounds)
        self.value = value

    def compute(self, signals):
        MyTemperature.calls += 1
        temperature = signals.full(self.value)
        return Temperature(temperature, temperature)
""",
    "kd_outside_loss": """
from kd_lightning.functional.divergences import ClosedForm, Divergence
from kd_lightning.functional.row_loss import row_loss
from kd_lightning.losses import LogitLoss


class Hellinger(Divergence):
    def definition(self, a, b, dim, labels):
        return 2 - 2 * ((a.log_softmax(dim) + b.log_softmax(dim)) / 2).exp().sum(dim, keepdim=True)

    def closed_form(self, a, b, dim, labels, teacher):
        p, q = a.softmax(dim), b.softmax(dim)
        overlaps = (p * q).sqrt()
        overlap = overlaps.sum(dim, keepdim=True)
        return ClosedForm(2 - 2 * overlap, p * overlap - overlaps, q * overlap - overlaps if teacher else None)


def hellinger_loss(student_logits, teacher_logits, temperature, **options):
    return row_loss(Hellinger(), student_logits, teacher_logits, temperature, **options)


class HellingerLoss(LogitLoss):
    calls = 0

    @staticmethod
    def function(*logits, **options):
        HellingerLoss.calls += 1
        return hellinger_loss(*logits, **options)
""",
    "kd_outside_teacher": """
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
""",
}
YAML = """
    temperature: {class_path: kd_outside_policy.MyTemperature, init_args: {value: 5, max_temperature: 50}}
    kd_loss: {class_path: kd_outside_loss.HellingerLoss, init_args: {scale: none}}
    teacher: {class_path: kd_outside_teacher.Favourite, init_args: {label: 3}}
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import one of the modules above, which lie in the present folder."""
    for name, code in OUTSIDE.items():
        (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kd-lightning"])
    yield importlib.import_module
    for name in OUTSIDE:
        sys.modules.pop(name, None)


def fit(model: str, folder: Path) -> None:
    """Fit configs/digits.yaml with another temperature, loss and teacher for a batch."""
    config = (ROOT / "configs" / "digits.yaml").read_text()
    start, end = config.index("    teacher:\n"), config.index("    kd_weight:")
    (folder / "mine.yaml").write_text(config[:start] + model.lstrip("\n") + config[end:])
    main(["fit", "--config", "mine.yaml", "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"])


def test_a_policy_has_bounds_and_a_repr(outside: Callable[[str], ModuleType]) -> None:
    module, logits = outside("kd_outside_policy"), torch.randn(2, 3)
    policy = module.MyTemperature(5.0, max_temperature=4.0)
    assert repr(policy) == "MyTemperature(value=5, max_temperature=4)"
    assert policy(Signals(logits, logits)).student.item() == 4.0
    with pytest.raises(TypeError, match="max_temprature"):
        module.MyTemperature(max_temprature=4.0)


def test_a_loss_has_the_options_of_all_losses(outside: Callable[[str], ModuleType]) -> None:
    module, targets = outside("kd_outside_loss"), torch.tensor([0, -100, 2])
    student, teacher = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = (student / 2).softmax(-1).sqrt().sub((teacher / 2).softmax(-1).sqrt()).square().sum(-1)
    loss = module.HellingerLoss(reduction="none")
    torch.testing.assert_close(loss(student, teacher, 2.0), 4 * expected)
    loss = module.HellingerLoss(scale="none")
    torch.testing.assert_close(loss(student, teacher, 2.0, targets), (expected[0] + expected[2]) / 2)
    assert torch.autograd.gradcheck(
        lambda s, t: loss(s, t, 2.0, targets), (student.requires_grad_(), teacher.requires_grad_())
    )
    with pytest.raises(ValueError, match="reduction"):
        module.HellingerLoss(reduction="max")


def test_a_teacher_teaches_a_distiller(outside: Callable[[str], ModuleType]) -> None:
    teacher = outside("kd_outside_teacher").Favourite(label=2, classes=3)
    distiller = Distiller(teacher, temperature=2.0, kd_weight=1.0, task_weight=0.0)
    out = distiller(torch.ones(4, 1), torch.zeros(4, 3))
    p = torch.tensor([0.0, 0.0, 2.5]).softmax(0)
    torch.testing.assert_close(out.kd_loss, 4 * (p * (3 * p).log()).sum())
    assert distiller.teacher is teacher
    assert not list(distiller.parameters())


@pytest.mark.slow
def test_all_three_in_yaml(outside: Callable[[str], ModuleType], tmp_path: Path) -> None:
    fit(YAML, tmp_path)
    assert outside("kd_outside_policy").MyTemperature.calls > 0
    assert outside("kd_outside_loss").HellingerLoss.calls > 0
    assert outside("kd_outside_teacher").Favourite.calls > 0


@pytest.mark.slow
@pytest.mark.usefixtures("outside")
def test_a_misspelt_bound_in_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fit(YAML.replace("max_temperature", "max_temprature"), tmp_path)
    assert "max_temprature" in capsys.readouterr().err
