"""Sharding from the command line: the configuration runs on two CPU processes; what needs a GPU names it."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from kd_lightning.cli import main
from tests.helpers import on_ranks

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # because each run has a folder of its own
def test_two_processes_run_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(CONFIGS)  # paths in the files start at the project's folder
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kd-lightning"])
    configs = ["--config", "configs/lm.yaml", "--config", "configs/sharded/lm.yaml", "--resume", "auto"]
    distributed = "--trainer.strategy.init_args.save_distributed_checkpoint=true"
    short = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.check_val_every_n_epoch=1"]
    for epochs in (1, 2):
        main_arguments = ["fit", *configs, distributed, *short, f"--trainer.max_epochs={epochs}"]
        on_ranks(2, lambda _, arguments=main_arguments: main(arguments))
    versions = sorted(tmp_path.glob("logs/lm/version_*"))
    newest = versions[-1] / "checkpoints" / "newest.ckpt"
    assert {"__0_0.distcp", "__1_0.distcp"} <= {path.name for path in newest.iterdir()}  # a file for each rank
    with open(versions[-1] / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["val_perplexity"]]
    assert [int(row["epoch"]) for row in rows] == [1]  # the second run goes on after the first
    assert 1 < float(rows[0]["val_perplexity"]) < 1000


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "name"), [("fsdp", "fsdp"), ("deepspeed", "DeepSpeed")])
def test_a_strategy_for_gpus_names_the_way_out(
    strategy: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if strategy == "deepspeed":
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        pytest.importorskip("deepspeed")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else the strategy sets it for the rest of the tests
    monkeypatch.chdir(CONFIGS.parent)
    arguments = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", f"--trainer.strategy={strategy}"]
    monkeypatch.setattr(sys, "argv", ["kd-lightning", "fit", "--config", "configs/digits.yaml", *arguments])
    with pytest.raises(SystemExit):
        main()
    assert (
        f"error: --trainer.strategy: Lightning's {name} strategy needs a GPU. Without one, shard the student with "
        "lightning.pytorch.strategies.ModelParallelStrategy and kd_lightning.ShardedDistillationModule, or take ddp.\n"
    ) in capsys.readouterr().err
