"""``kd-lightning find-temperature --config …``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kd_lightning.cli import main

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kd-lightning"])


def test_it_prints_the_table_draws_the_plot_and_trains_no_further(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finder = ["--finder.candidates=[0.5,2]", "--finder.steps=4", "--finder.seeds=1"]
    main(["find-temperature", "--config", "configs/digits.yaml", *finder, *SMALL])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:2] == ["multiplier", "T"]
    assert [line.split()[0] for line in printed[1:3]] == ["0.5", "2"]
    assert printed[3].startswith("suggestion: multiplier ")
    assert (tmp_path / "logs/digits/version_0/temperature_finder.png").stat().st_size > 10_000
    assert not list(tmp_path.glob("logs/**/*.ckpt"))


def test_a_finder_in_the_configuration_is_the_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]
    main(["find-temperature", "--config", "configs/digits_finder.yaml", *short, *SMALL])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:6]] == ["1", "2", "4", "8", "16"]
    assert "of 3" in printed[1]
    assert not list(tmp_path.glob("logs/**/*.ckpt"))


def test_options_stand_over_the_configured_finder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]
    finder = ["--finder.candidates=[3,5]", "--finder.seeds=1"]
    main(["find-temperature", "--config", "configs/digits_finder.yaml", *short, *SMALL, *finder])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:4]] == ["3", "5", "suggestion:"]
    assert "of 3" not in printed[1]
    assert (tmp_path / "logs/digits_finder/version_0/temperature_finder.png").is_file()  # plot_path stays as configured
