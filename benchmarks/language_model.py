"""What distillation gives on text: the configs' student with and without its teacher, over seeds, at equal budget.

    uv run python benchmarks/language_model.py --seeds 100 101 102 --processes 4

Each seed changes the initial weights, the data order, and the documents that train and validate. Of each run the
checkpoint with the lowest validation perplexity is tested. Budgets are equal in steps; a step with a teacher takes
longer.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor

from measure import run_quietly

from kd_lightning.cli import KDLightningCLI

RUNS = {
    "no teacher": ["configs/lm_baseline.yaml"],
    "T = 1": ["configs/lm.yaml", "--model.temperature=1.0"],
    "T = 2": ["configs/lm.yaml", "--model.temperature=2.0"],
}


def run(config: list[str], seed: int) -> tuple[float, float, float]:
    """Lowest validation perplexity of one training run, test perplexity there, and validation perplexity at the end."""
    sys.argv = sys.argv[:1]
    run_quietly(1)
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        seeds = [f"--seed_everything={seed}", f"--data.seed={seed}", f"--trainer.default_root_dir={folder}"]
        args = ["--config", *config, *quiet, *seeds]
        cli = KDLightningCLI(args=args, run=False, save_config_callback=None, auto_configure_optimizers=False)
        cli.trainer.fit(cli.model, cli.datamodule)
        last = float(cli.trainer.callback_metrics["val_perplexity"])
        checkpoint = cli.trainer.checkpoint_callback
        best = float(checkpoint.best_model_score)  # pyright: ignore
        path = checkpoint.best_model_path  # pyright: ignore
        (test,) = cli.trainer.test(cli.model, cli.datamodule, ckpt_path=path, verbose=False, weights_only=True)
    return best, test["test_perplexity"], last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    options = parser.parse_args()
    print(
        "| training | seed | validation, lowest | test, there | validation, at the end |\n|---|---|---|---|---|",
        flush=True,
    )
    tests: dict[str, list[float]] = {}
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        running = {name: [pool.submit(run, RUNS[name], seed) for seed in options.seeds] for name in options.only}
        for name, runs in running.items():
            results = [result.result() for result in runs]
            for seed, result in zip(options.seeds, results, strict=True):
                print(f"| {name} | {seed} | {' | '.join(f'{perplexity:.2f}' for perplexity in result)} |", flush=True)
            tests[name] = [test for _, test, _ in results]
    first, *others = tests
    for name in others:  # by seed: what documents a seed trains on moves the perplexity more than all else
        ratios = [mine / theirs for mine, theirs in zip(tests[name], tests[first], strict=True)]
        spread = f" ± {statistics.stdev(ratios):.2f}" if len(ratios) > 1 else ""
        print(f"\ntest perplexity, {name} over {first}, same seed: {statistics.mean(ratios):.2f}{spread}")


if __name__ == "__main__":
    main()
