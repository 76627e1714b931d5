"""A sweep under Ray Tune: its rows are those of the sweep without, and what dies or is pruned is shown."""

from __future__ import annotations

import csv
import os
import re
import secrets
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from kd_lightning.cli import main
from kd_lightning.sweep import on_ray

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
    """Kills its process in the second run, once in a folder, and records the nodes."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Path("nodes").mkdir(exist_ok=True)
        Path("nodes", str(os.getppid())).touch()  # without Ray the parent is another
        if Path(trainer.default_root_dir).name == "0001" and not Path("died").exists():
            Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)


class DiesWithItsNode(Callback):
    """Kills its process and its node, unless that is the head, once in a folder."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        node = os.getppid()
        if str(node) != Path("head").read_text() and not Path("died").exists():
            Path("died").touch()
            os.kill(node, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with one core each, which find in two seconds that one is dead."""
    with pytest.MonkeyPatch.context() as patch:  # which Ray reads when it is imported
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        pytest.importorskip("ray")
        from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

        health = {
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 4,
        }
        nodes: Any = Cluster(True, head_node_args={"num_cpus": 1, "_system_config": health})
        nodes.add_node(num_cpus=1)
        patch.setenv("RAY_ADDRESS", nodes.address)
        yield nodes
        nodes.shutdown()


@pytest.fixture
def folder(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, whose path both nodes know."""
    for name in ("configs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "head").write_text(str(cluster.head_node.all_processes["raylet"][0].process.pid))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kd-lightning"])
    return tmp_path


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
    assert len(os.listdir("nodes")) == 2
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


def test_a_node_dies(cluster: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its run is executed again on another node: none is lost, and none counts twice."""
    cluster.add_node(num_cpus=1)
    grid = ["--temperatures", "4", "--kd-weights", ".5", ".9", "--seeds", "1"]
    main([*SHORT, *grid, f"--trainer.callbacks+={__name__}.DiesWithItsNode", "--output", "sweep"])
    assert Path("died").exists()
    found = rows("sweep")
    assert [(row["kd_weight"], row["state"]) for row in found] == [
        ("0.5", "complete"),
        ("0.9", "complete"),
        ("0.0", "complete"),
    ]
    printed = capsys.readouterr().out
    assert printed.count("was lost with a node of the cluster: executed again") == 1
    assert [line[:5] for line in printed.splitlines() if line.startswith("[")] == ["[1/3]", "[2/3]", "[3/3]"]
    assert len(list(Path("sweep/runs").iterdir())) == 4


@pytest.mark.usefixtures("folder")
def test_a_folder_that_a_node_does_not_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[dict[str, str]] = []
    monkeypatch.setattr("ray.tune.report", told.append)
    plan: Any = None
    on_ray._work({"folder": "sweep/runs/0000"}, plan, str(tmp_path))
    assert re.fullmatch(
        r"the machine \S+ of the Ray cluster does not see the run's folder \S+/sweep/runs/0000\. Start the command in "
        r"a folder that all machines share under the same path, such as one on a network file system\.",
        told[0]["refused"],
    )


@pytest.mark.usefixtures("folder")
def test_a_metric_that_no_run_logs() -> None:
    with pytest.raises(LookupError, match=r"validation did not log 'val_nothing'"):
        main([*SHORT, "--temperatures", "4", "--kd-weights", ".5", "--monitor", "val_nothing", "--output", "sweep"])
