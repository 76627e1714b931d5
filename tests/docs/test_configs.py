"""Every YAML in configs/ runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kd_lightning import models
from kd_lightning.cli import main
from kd_lightning.datamodules import CIFAR100DataModule

pytestmark = pytest.mark.slow

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture
def _made_cifar100(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CIFAR-100 without the download, and a teacher for it without the 240 epochs."""
    images = torch.randint(0, 256, (400, 3, 32, 32), dtype=torch.uint8)
    targets = torch.arange(400) % 100
    monkeypatch.setattr(CIFAR100DataModule, "prepare_data", lambda self: None)
    monkeypatch.setattr(
        CIFAR100DataModule, "load_split", lambda self, split: None if split == "val" else (images, targets)
    )
    folder = tmp_path / "logs" / "cifar100_resnet32x4" / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    teacher: nn.Module = models.resnet32x4(num_classes=100)
    torch.save({"state_dict": {f"model.{k}": v for k, v in teacher.state_dict().items()}}, folder / "best.ckpt")


@pytest.fixture
def _made_assistant(tmp_path: Path) -> None:
    """Write the checkpoint that a chain's first run leaves; tests/integration/test_assistant.py runs both."""
    students = {"digits_assistant": ((8, 16), 32), "digits": ((4, 8), 16)}
    for run, (channels, hidden) in students.items():
        folder = tmp_path / "logs" / run / "version_0" / "checkpoints"
        folder.mkdir(parents=True)
        student = models.DigitsCNN(channels=channels, hidden=hidden)
        torch.save({"state_dict": {f"student.{k}": v for k, v in student.state_dict().items()}}, folder / "best.ckpt")


@pytest.mark.usefixtures("_made_cifar100", "_made_assistant")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_runs(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(config.parent)  # paths in the files start at the project's folder
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kd-lightning"])
    main(["fit", "--config", str(config), "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"])
