"""What distillation gives on digits: the configs' student with and without its teacher, over seeds.

    uv run python benchmarks/digits.py --seeds 100 101 102 103 104
    uv run python benchmarks/digits.py --only "no teacher" "constant T = 4" --model.optimizer.init_args.lr=0.005

What it does not know itself, such as the last, goes to each training as an argument of kd-lightning.

Each seed changes the initial weights, the data order and the choice of the labelled images. Accuracies are those of the
last epoch, without any choice by validation or test.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from measure import run_quietly

from kd_lightning.cli import KDLightningCLI

RUNS = {
    "no teacher": ["configs/digits_baseline.yaml"],
    "constant T = 1": ["configs/digits.yaml", "--model.temperature=1.0"],
    "constant T = 4": ["configs/digits.yaml", "--model.temperature=4.0"],
    "constant T = 8": ["configs/digits.yaml", "--model.temperature=8.0"],
    "cosine T = 8 → 2": ["configs/digits.yaml"],
    "constant T = 4, and layers": ["configs/digits_layers.yaml"],
}
CHAIN = {  # each learns from the one before
    "assistant, from the teacher, T = 4": ["configs/digits_assistant.yaml"],
    "student, from the assistant, T = 4": ["configs/digits_from_assistant.yaml"],
}


def run(config: list[str], seed: int, weights: Path | None = None, further: Sequence[str] = ()) -> tuple[float, float]:
    """Validation and test accuracy of one training run, which may leave its student's weights."""
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        seeds = [f"--seed_everything={seed}", f"--data.seed={seed}", f"--trainer.default_root_dir={folder}"]
        args = ["--config", *config, *quiet, *seeds, *further]
        cli = KDLightningCLI(args=args, run=False, save_config_callback=None, auto_configure_optimizers=False)
        cli.trainer.fit(cli.model, cli.datamodule)
        val_acc = float(cli.trainer.callback_metrics["val_acc"])
        (test,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
        if weights is not None:
            torch.save(cli.model.student.state_dict(), weights)
    return val_acc, test["test_acc"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102, 103, 104])
    parser.add_argument("--only", nargs="+", default=[""], help="trainings whose name contains one of these")
    options, further = parser.parse_known_args()
    seeds = options.seeds
    sys.argv = sys.argv[:1]
    run_quietly(1)
    print(f"| training | val_acc | test_acc | (mean ± std, seeds {seeds})\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, config in (RUNS | CHAIN).items():
            if not any(part in name for part in options.only):
                continue
            accuracies = []
            for seed in seeds:
                weights = Path(folder) / f"{seed}.pt"
                taught = [f"--model.teacher.checkpoint={weights}"] if weights.exists() else []
                accuracies.append(run([*config, *taught], seed, weights if name in CHAIN else None, further))
            val, test = zip(*accuracies, strict=True)
            cells = [f"{statistics.mean(acc):.3f} ± {statistics.stdev(acc):.3f}" for acc in (val, test)]
            print(f"| {name} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
