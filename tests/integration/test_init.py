"""``kd-lightning init``: each template trains its teacher and distils it, in a folder of its own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from kd_lightning.cli import main
from kd_lightning.cli.project import KINDS
from kd_lightning.datamodules import CIFAR100DataModule

pytestmark = pytest.mark.slow

SMALL = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
ONE_EPOCH = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]


@pytest.fixture
def _own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["kd-lightning"])
    monkeypatch.delitem(sys.modules, "mine", raising=False)


@pytest.fixture
def _made_cifar100(monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-100 without the download."""
    images, targets = torch.randint(0, 256, (400, 3, 32, 32), dtype=torch.uint8), torch.arange(400) % 100
    monkeypatch.setattr(CIFAR100DataModule, "prepare_data", lambda self: None)
    monkeypatch.setattr(
        CIFAR100DataModule, "load_split", lambda self, split: None if split == "val" else (images, targets)
    )


@pytest.mark.usefixtures("_own_process", "_made_cifar100")
@pytest.mark.parametrize("kind", KINDS)
def test_a_project_runs(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["init", kind, "project"])
    assert "kd-lightning fit --config teacher.yaml" in capsys.readouterr().out
    project = tmp_path / "project"
    assert {path.name for path in project.iterdir()} == {"README.md", "teacher.yaml", "student.yaml", "mine.py"}
    monkeypatch.chdir(project)
    main(["fit", "--config", "teacher.yaml", *SMALL, *ONE_EPOCH])
    assert Path("teacher/best.ckpt").is_file()
    seen: list[float] = []
    mine = importlib.import_module("mine")
    assert Path(mine.__file__ or "").parent == project
    call = mine.SawTooth.__call__
    monkeypatch.setattr(
        mine.SawTooth, "__call__", lambda self, progress: seen.append(self.high) or call(self, progress)
    )
    main(["fit", "--config", "student.yaml", *SMALL, "--trainer.fast_dev_run=true"])
    assert set(seen) == {2.0 if kind == "text" else 8.0}  # the temperature is the one in mine.py


@pytest.mark.usefixtures("_own_process")
def test_digits_is_the_usual_kind(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    main(["init", "empty"])
    assert "DigitsDataModule" in (tmp_path / "empty" / "student.yaml").read_text()


@pytest.mark.usefixtures("_own_process")
def test_the_saw_tooth(tmp_path: Path) -> None:
    from kd_lightning.schedules import Progress

    main(["init", "digits", "project"])
    sys.path.insert(0, str(tmp_path / "project"))
    schedule = importlib.import_module("mine").SawTooth(8.0, 2.0, 2)
    values = [schedule(Progress(step=step, max_steps=8)) for step in range(8)]
    assert values == [8.0, 6.5, 5.0, 3.5, 8.0, 6.5, 5.0, 3.5]
