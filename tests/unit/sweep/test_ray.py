"""A sweep under Ray Tune: its rows are those of the sweep without, and what dies or is pruned is shown."""

from __future__ import annotations

import csv
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from kd_lightning.cli import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # those of Ray
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ROOT = Path(__file__).parents[3]
SHORT = ["sweep", "--config", "configs/digits.yaml", "--trainer.max_epochs=4", "--executor", "ray"]


class Dies(Callback):
    """Kills its process in the second run, once in a folder."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if Path(trainer.default_root_dir).name == "0001" and not Path("died").exists():
            Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # which Ray reads when it is imported
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray: Any = pytest.importorskip("ray")
    for name in ("configs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kd-lightning"])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield tmp_path
    ray.shutdown()


def rows(file: str) -> list[dict[str, str]]:
    with Path(file, "results.csv").open(newline="") as opened:
        return [{name: text for name, text in row.items() if name != "seconds"} for row in csv.DictReader(opened)]


@pytest.mark.usefixtures("folder")
def test_a_sweep_under_ray(capsys: pytest.CaptureFixture[str]) -> None:
    """A worker dies: its row says so, and the retried sweep has the bits of one without Ray."""
    grid = ["--temperatures", "4", "--kd-weights", ".5", ".9", "--seeds", "1"]
    dies = [f"--trainer.callbacks+={__name__}.Dies"]
    main([*SHORT, *grid, *dies, "--output", "ray"])
    died = "Ray's worker died before the end of the run, killed or out of memory"
    assert [(row["state"], row["reason"]) for row in rows("ray")] == [
        ("complete", ""),
        ("failed", died),
        ("complete", ""),
    ]
    assert f"temperature 4, kd_weight 0.9, seed 0: {died}" in capsys.readouterr().out
    main([*SHORT, *grid, *dies, "--output", "ray", "--retry_failed", "true"])
    main([*SHORT, *grid, *dies, "--output", "alone", "--executor", "local"])
    alike = [[{**row, "number": "", "folder": ""} for row in rows(name)] for name in ("ray", "alone")]
    assert alike[0] == alike[1]
    assert all(row["state"] == "complete" for row in alike[0])
    printed = capsys.readouterr().out
    assert printed.count("best by val_acc: temperature 4, kd_weight 0.") == 2
    assert Path("ray", "report.html").exists()


@pytest.mark.usefixtures("folder")
def test_a_pruner_under_ray(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--temperatures", "4", "--kd-weights", "1", "--seeds", "2", "--output", "sweep"]
    pruner = '{"class_path": "optuna.pruners.ThresholdPruner", "init_args": {"lower": 2.0, "n_warmup_steps": 2}}'
    main([*SHORT, *options, "--pruner", pruner])
    found = rows("sweep")
    assert [row["state"] for row in found] == ["pruned", "pruned", "complete", "complete"]  # never the baseline
    assert all(float(row["val_acc"]) > 0 and int(row["epoch"]) < 2 for row in found[:2])
    printed = capsys.readouterr().out
    assert "a cell that loses one run for its seed is not chosen" in printed
    assert printed.count("pruned at validation 2,") == 2


@pytest.mark.usefixtures("folder")
def test_a_metric_that_no_run_logs() -> None:
    with pytest.raises(LookupError, match=r"validation did not log 'val_nothing'"):
        main([*SHORT, "--temperatures", "4", "--kd-weights", ".5", "--monitor", "val_nothing", "--output", "sweep"])
