"""``--resume auto`` and ``--ckpt_path last``: a command that is started again continues its run."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_lightning.cli import main

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The dirpath has changed")]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(epochs: int, *more: str) -> None:
    fixed = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.max_epochs"]
    main(["fit", "--config", "configs/digits.yaml", *fixed, str(epochs), "--model.temperature", "4.0", *more])


def checkpoint(version: int, name: str = "newest") -> Any:
    return torch.load(f"logs/digits/version_{version}/checkpoints/{name}.ckpt", weights_only=True)


@pytest.fixture
def interrupted(folder: Path) -> None:
    """A run of two epochs that is to have three."""
    fit(2)


@pytest.mark.usefixtures("interrupted")
@pytest.mark.parametrize("option", [["--resume", "auto"], ["--ckpt_path", "last"]])
def test_a_command_that_is_repeated_continues_its_run(option: list[str], folder: Path) -> None:
    fit(3, *option)
    assert checkpoint(1)["epoch"] == 2
    steps = checkpoint(0)["global_step"] // 2
    assert checkpoint(1)["global_step"] == 3 * steps
    assert "resume: null" in (folder / "logs/digits/version_1/run_config.yaml").read_text()


@pytest.mark.usefixtures("interrupted")
def test_the_file_of_a_killed_process_is_passed_over(folder: Path) -> None:
    half = folder / "logs/digits/version_1/checkpoints/newest.ckpt"
    half.parent.mkdir(parents=True)
    whole = (folder / "logs/digits/version_0/checkpoints/newest.ckpt").read_bytes()
    half.write_bytes(whole[: len(whole) // 2])
    fit(3, "--resume", "auto")
    assert checkpoint(2)["epoch"] == 2
    assert checkpoint(2)["global_step"] == checkpoint(0)["global_step"] // 2 * 3


def test_without_an_earlier_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fit(1, "--ckpt_path", "last")
    assert capsys.readouterr().err.endswith(
        "error: --ckpt_path last: there is no checkpoint of an earlier run in logs/digits. Name the file, or use "
        "--resume auto, which starts afresh where there is none.\n"
    )
    shutil.rmtree(folder / "logs", ignore_errors=True)
    fit(1, "--resume", "auto")
    assert checkpoint(0)["epoch"] == 0


def test_both_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fit(1, "--resume", "auto", "--ckpt_path", "mine.ckpt")
    assert capsys.readouterr().err.endswith(
        "error: --resume auto finds the checkpoint by itself, but --ckpt_path mine.ckpt names one as well. Leave "
        "one of them out.\n"
    )


@pytest.mark.usefixtures("interrupted")
def test_what_a_run_left_is_measured(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """Lightning measures the network as it was built where the process has not trained."""

    caplog.set_level(logging.INFO)
    settings = ["--trainer.enable_progress_bar=false", "--model.temperature=4.0"]

    def measured(path: str, *more: str) -> list[str]:
        capsys.readouterr()
        main(["test", "--config", "configs/digits.yaml", *settings, "--ckpt_path", path, *more])
        return [line for line in capsys.readouterr().out.splitlines() if "test_" in line]

    for which, name in (("last", "newest"), ("best", "best")):
        caplog.clear()
        assert measured(which) == measured(f"logs/digits/version_0/checkpoints/{name}.ckpt") != []
        assert f"Measuring logs/digits/version_0/checkpoints/{name}.ckpt." in caplog.text  # scores may be the same
    with pytest.raises(SystemExit):
        measured("best", "--trainer.logger.name=none")
    assert "--ckpt_path best: there is no best checkpoint of an earlier run in logs/none." in capsys.readouterr().err
