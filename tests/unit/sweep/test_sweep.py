from __future__ import annotations

import contextlib
import csv
import io
import os
import signal
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml

from kd_lightning.cli import main
from kd_lightning.sweep import SweepCell, SweepResult, SweepRun, sweep
from kd_lightning.sweep.report import write_report

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
DIGITS = str(ROOT / "configs" / "digits.yaml")
SHORT = ["--config", DIGITS, "--trainer.max_epochs=3"]
GRID = ["--temperatures", "1", "4", "--kd-weights", ".5", ".9"]


@pytest.fixture(scope="module", autouse=True)
def _in_the_project() -> Iterator[None]:
    """The configuration's paths start there; and no command line of pytest's."""
    argv, sys.argv = sys.argv, ["kd-lightning"]
    with contextlib.chdir(ROOT) if sys.version_info >= (3, 11) else _chdir(ROOT):
        yield
    sys.argv = argv


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    yield
    os.chdir(before)


def run(*arguments: str) -> str:
    """Return the text that a command prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main([*arguments])
    return printed.getvalue()


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def shown(scores: list[float]) -> str:
    return f"{statistics.fmean(scores):.4f} ± {statistics.stdev(scores):.4f}"


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, _in_the_project: None) -> tuple[Path, str]:
    """One small sweep of the main job and what it printed."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder, run("sweep", *SHORT, *GRID, "--seeds", "2", "--output", str(folder))


def test_table_choice_and_test_scores_follow_from_the_runs(swept: tuple[Path, str]) -> None:
    folder, printed = swept
    rows = rows_of(folder)
    assert len(rows) == 2 * (4 + 1)
    assert {row["state"] for row in rows} == {"complete"}
    cells: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        cells.setdefault((row["temperature"], row["kd_weight"]), []).append(row)
    assert set(cells) == {("1.0", "0.5"), ("1.0", "0.9"), ("4.0", "0.5"), ("4.0", "0.9"), ("", "0.0")}
    assert all([row["seed"] for row in runs] == ["0", "1"] for runs in cells.values())
    assert all(
        float(row["task_weight"]) == pytest.approx(1 - float(row["kd_weight"]))
        for runs in cells.values()
        for row in runs
    )
    means = {}
    lines = printed.splitlines()
    for (temperature, weight), runs in cells.items():
        scores = [float(row["val_acc"]) for row in runs]
        start = ["no", "teacher"] if not temperature else [f"{float(temperature):g}", weight]
        (line,) = [line for line in lines if line.split()[:2] == start]
        assert shown(scores) in line
        if temperature:
            means[temperature, weight] = statistics.fmean(scores)
    best = max(means, key=lambda cell: means[cell])
    assert f"best by val_acc: temperature {float(best[0]):g}, kd_weight {best[1]}, " in printed
    measured = {(row["temperature"], row["kd_weight"]) for row in rows if row["test_acc"]}
    assert measured == {best, ("", "0.0")}
    tests = [[float(row["test_acc"]) for row in cells[cell]] for cell in (best, ("", "0.0"))]
    assert f"test_acc, measured once: {shown(tests[0])}; no teacher {shown(tests[1])}" in printed
    assert sum(line.startswith("[") for line in lines) == 10  # one line for each run
    assert "[10/10] no teacher, seed 1: val_acc" in printed
    assert (folder / "heatmap.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("pattern", ["{stage}/{name}", "{name}.{stage}"])
def test_metrics_under_other_names(swept: tuple[Path, str], tmp_path: Path, pattern: str) -> None:
    """The names alone differ: the scores, the choice and the test are those of the sweep without them."""
    monitor, measured = (pattern.format(stage=stage, name="acc") for stage in ("val", "test"))
    naming = ["--trainer.callbacks+=MetricNames", f"--trainer.callbacks.pattern={pattern}"]
    options = [
        "--temperatures",
        "4",
        "--kd-weights",
        ".9",
        "--seeds",
        "1",
        "--monitor",
        monitor,
        "--output",
        str(tmp_path),
    ]
    printed = run("sweep", *SHORT, *naming, *options)
    cells = {("4.0", "0.9", "0"), ("", "0.0", "0")}
    names = "temperature", "kd_weight", "seed"
    plain = {key: row for row in rows_of(swept[0]) if (key := tuple(row[name] for name in names)) in cells}
    named = {tuple(row[name] for name in names): row for row in rows_of(tmp_path)}
    assert plain.keys() == named.keys() == cells
    for key, row in named.items():
        assert float(row[monitor]) == float(plain[key]["val_acc"])
        assert float(row[measured]) > 0.1
    assert f"best by {monitor}: temperature 4, kd_weight 0.9, " in printed
    assert f"{measured}, measured once: " in printed
    assert monitor in (tmp_path / "report.html").read_text()


def test_a_run_is_the_fit_of_its_configuration(swept: tuple[Path, str], tmp_path: Path) -> None:
    """The last run of the sweep, after nine others in its process, is the run by itself."""
    folder, _ = swept
    row = next(r for r in rows_of(folder) if (r["temperature"], r["kd_weight"], r["seed"]) == ("4.0", "0.9", "1"))
    changes = ["--seed_everything=1", "--model.temperature=4.0", "--model.kd_weight=0.9", "--model.task_weight=0.1"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    run("fit", *SHORT, *changes, *quiet, f"--trainer.logger.save_dir={tmp_path}")
    alone = tmp_path / "digits" / "version_0"
    assert (alone / "metrics.csv").read_text() == (folder / row["folder"] / "metrics.csv").read_text()
    # and its weights are the best of them
    best = folder / row["folder"] / "checkpoints" / "best.ckpt"
    same = torch.load(alone / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    kept = torch.load(best, weights_only=True)["state_dict"]
    assert all(torch.equal(kept[name], value) for name, value in same.items())


def test_test_scores_are_those_of_the_best_weights(swept: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = swept
    row = next(r for r in rows_of(folder) if not r["temperature"])
    changes = ["--model.temperature=1.0", "--model.kd_weight=0", "--model.task_weight=1"]
    where = [f"--trainer.logger.save_dir={tmp_path}", "--trainer.enable_progress_bar=false"]
    best = folder / row["folder"] / "checkpoints" / "best.ckpt"
    with pytest.warns(UserWarning, match="temperature"):
        run("test", *SHORT, *changes, *where, "--ckpt_path", str(best))
    with (tmp_path / "digits" / "version_0" / "metrics.csv").open(newline="") as file:
        (metrics,) = csv.DictReader(file)
    assert float(metrics["test_acc"]) == pytest.approx(float(row["test_acc"]), abs=1e-6)


def test_the_report_is_one_valid_file(swept: tuple[Path, str]) -> None:
    folder, printed = swept
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n")
    page = ET.fromstring(text.partition("\n")[2])
    (source,) = [element.get("src", "") for element in page.iter() if element.get("src")]
    assert source.startswith("data:image/png;base64,iVBOR")
    cells, runs, versions = (
        [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")] for table in page.iter("table")
    )
    for row in cells[1:]:
        assert any(row[2] in line for line in printed.splitlines())
    written = rows_of(folder)
    assert [row[0] for row in runs[1:]] == [row["number"] for row in written]
    links = [element.get("href", "") for element in page.iter("a")]
    assert links == [f"{row['folder']}/" for row in written]
    assert all((folder / link / "metrics.csv").is_file() for link in links)
    assert [row[6] for row in runs[1:]] == [f"{float(row['val_acc']):.4f}" for row in written]
    assert ["torch", version("torch")] in versions
    (configuration,) = page.iter("pre")
    assert "kd_lightning.datamodules.DigitsDataModule" in "".join(configuration.itertext())


def test_the_report_escapes_what_it_shows(tmp_path: Path) -> None:
    bad = "<script>alert('&')</script>"
    runs = [SweepRun(0, 1.0, 0.5, 0.5, 0, "complete", 0.5), SweepRun(1, 1.0, 0.5, 0.5, 1, "failed", reason=bad)]
    result = SweepResult([SweepCell(1.0, 0.5, runs)], None, "val_acc", "max", tmp_path)
    write_report(result, {"data": bad}, "f", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert bad in "".join(ET.fromstring(text.partition("\n")[2]).itertext())
    assert "no cell has all its runs complete" in text


def test_the_same_command_runs_nothing_again_and_more_seeds_add_runs(swept: tuple[Path, str]) -> None:
    folder, printed = swept
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/checkpoints/*")}
    again = run("sweep", *SHORT, *GRID, "--seeds=2", "--output", str(folder))
    table = printed[printed.index("temperature  kd_weight") :]
    assert again == table
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/checkpoints/*")}
    more = run("sweep", *SHORT, *GRID, "--seeds=3", "--output", str(folder))
    assert sum(line.startswith("[") for line in more.splitlines()) == 5
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert len(rows_of(folder)) == 15


def test_a_changed_configuration_is_refused(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    with pytest.raises(ValueError, match=r"(?s)configuration.*data\.init_args\.batch_size 22 → 11\..*--output"):
        run("sweep", *SHORT, *GRID, "--seeds", "2", "--output", str(folder), "--data.batch_size=11")
    with pytest.raises(ValueError, match="monitor val_acc → val_agreement"):
        run("sweep", *SHORT, *GRID, "--seeds", "2", "--output", str(folder), "--monitor", "val_agreement")


def test_two_processes_share_a_sweep_and_one_goes_on_after_ctrl_c(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    command = [sys.executable, "-m", "kd_lightning", "sweep", *SHORT, *GRID, "--seeds", "2", "--output", str(folder)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    first = subprocess.Popen(command, **pipes)
    second = subprocess.Popen(command, **pipes)
    assert first.stdout is not None
    line = first.stdout.readline()
    while line and not line.startswith("["):
        line = first.stdout.readline()
    first.send_signal(signal.SIGINT)
    told, errors = first.communicate(timeout=200)
    assert first.returncode == 130, errors
    assert "the same command goes on" in told, (told, errors)
    assert "Traceback" not in errors
    rest, errors = second.communicate(timeout=200)
    assert second.returncode == 0, errors
    rows = rows_of(folder)
    assert len({(row["temperature"], row["kd_weight"], row["seed"]) for row in rows}) == len(rows) == 10
    assert {row["state"] for row in rows} == {"complete"}
    ran = [text for out in (line + told, rest) for text in out.splitlines() if text.startswith("[")]
    assert len(ran) == 10  # what the first had finished was kept, what it was doing was done by the second
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder / 'sweep.db'}")
    states = [trial.state.name for trial in study.get_trials()]
    assert states.count("COMPLETE") == 10
    assert "RUNNING" not in states


def short() -> dict[str, Any]:
    """A configuration for the Python interface: two epochs."""
    config = yaml.safe_load(Path(DIGITS).read_text())
    config["trainer"]["max_epochs"] = 2
    return config


def test_a_failed_run_is_shown_and_the_random_state_is_put_back(tmp_path: Path) -> None:
    seeds = {name: value for name, value in os.environ.items() if name.startswith("PL_")}
    state = torch.get_rng_state()
    result = sweep(short(), [200.0, 2.0], [0.9], seeds=1, task_weight=0.3, output=str(tmp_path))
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: value for name, value in os.environ.items() if name.startswith("PL_")} == seeds
    good, bad = result.cells[1], result.cells[0]
    assert bad.runs[0].state == "failed"
    assert "temperature must be a positive, finite number" in bad.runs[0].reason
    assert "Traceback" in (tmp_path / bad.runs[0].folder / "error.txt").read_text()
    assert "0, 1 failed" in result.table()
    assert "temperature 200, kd_weight 0.9, seed 0: ValueError" in result.table()
    assert result.best is good
    assert good.runs[0].task_weight == 0.3
    assert "one seed" in result.table()
    assert result.baseline is not None
    assert [run.task_weight for run in result.baseline.runs] == [1.0]


def test_a_diverging_run_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    config = short()
    config["model"]["init_args"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e30}}
    with pytest.raises(RuntimeError, match=r"every run failed. The first: FloatingPointError: the loss of step 1 is"):
        sweep(config, [2.0], [0.9], seeds=1, output=str(tmp_path))


def test_tpe_searches_the_ranges_and_gives_each_suggestion_its_seeds(tmp_path: Path) -> None:
    options: dict[str, Any] = {"sampler": "tpe", "trials": 3, "seeds": 2, "baseline": False, "output": str(tmp_path)}
    result = sweep(short(), [1.0, 16.0], [0.5, 0.9], **options)
    assert len(result.cells) == 3
    assert result.baseline is None
    for cell in result.cells:
        assert cell.temperature is not None
        assert 1.0 <= cell.temperature <= 16.0
        assert 0.5 <= cell.kd_weight <= 0.9
        assert [run.seed for run in cell.runs] == [0, 1]
        assert {(run.temperature, run.kd_weight) for run in cell.runs} == {(cell.temperature, cell.kd_weight)}
    assert len({cell.temperature for cell in result.cells}) == 3
    assert result.best is not None
    assert all("test_acc" in run.test for run in result.best.runs)


def test_samplers_and_pruners_of_optuna(tmp_path: Path) -> None:
    """An object in Python, and a class path on the command line, which also describes the object's study."""
    options: dict[str, Any] = {"trials": 1, "seeds": 1, "output": str(tmp_path)}
    sampler, pruner = optuna.samplers.RandomSampler(seed=0), optuna.pruners.ThresholdPruner(lower=2.0)
    result = sweep(short(), [1.0, 16.0], [0.5, 0.9], sampler=sampler, pruner=pruner, **options)
    assert [cell.runs[0].state for cell in result.cells] == ["pruned"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(short()))
    named = ["--sampler=optuna.samplers.RandomSampler", "--pruner=optuna.pruners.NopPruner"]
    few = ["--trials=1", "--seeds=1", f"--output={tmp_path}"]
    assert "0, 1 pruned" in run(
        "sweep", f"--config={tmp_path / 'config.yaml'}", *GRID[:1], "1", "16", *GRID[3:], *named, *few
    )
    with pytest.raises(
        ValueError, match="sampler must be one of 'grid', 'tpe', or an Optuna BaseSampler, got 'random'"
    ):
        sweep(short(), [1.0], [0.5], sampler="random", **options)  # pyright: ignore[reportArgumentType]


def test_multiplied_policies_and_pruned_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruner = optuna.pruners.ThresholdPruner(lower=2.0)  # nothing is good enough
    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda **_: pruner)
    options: dict[str, Any] = {"multiply": True, "pruner": "median", "seeds": 1, "output": str(tmp_path)}
    result = sweep(short(), [1.0, 0.5], [0.9], **options)
    assert [cell.runs[0].state for cell in result.cells] == ["pruned", "pruned"]
    assert result.best is None
    assert "nothing is chosen" in result.table()
    assert result.baseline is not None
    assert result.baseline.complete  # never pruned
    seen = []
    for cell in result.cells:
        with (tmp_path / cell.runs[0].folder / "metrics.csv").open(newline="") as file:
            values = [row["temperature_student"] for row in csv.DictReader(file) if row.get("temperature_student")]
        assert len(values) == 1  # stopped after the first of two validations
        seen.append(float(values[0]))
    assert seen[1] == pytest.approx(seen[0] / 2)
    assert 4 < seen[0] <= 8  # the cosine's start


def test_a_sweep_whose_runs_are_all_pruned_ends_with_its_table(tmp_path: Path) -> None:
    """The figure has no baseline either."""
    pruner = optuna.pruners.ThresholdPruner(lower=2.0)
    result = sweep(short(), [1.0], [0.9], seeds=1, baseline=False, pruner=pruner, output=str(tmp_path))
    assert result.table().splitlines()[-1] == "no cell has all its runs complete: nothing is chosen"
    assert "there is no figure" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [row["state"] for row in rows_of(tmp_path)] == ["pruned"]
    assert not (tmp_path / "heatmap.png").exists()
    with pytest.raises(ValueError, match="there are no scores to draw"):
        result.plot()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("wanted", [True, False])
def test_a_terminal_gets_a_progress_bar_unless_the_configuration_has_none(wanted: bool, tmp_path: Path) -> None:
    config, terminal = short(), Terminal()
    config["trainer"] |= {"max_epochs": 1, "enable_progress_bar": wanted}
    with contextlib.redirect_stderr(terminal):
        sweep(config, [1.0], [0.9], seeds=1, baseline=False, output=str(tmp_path))
    drawn = terminal.getvalue()
    assert ("temperature 1, kd_weight 0.9, seed 0: val_acc 0." in drawn) is wanted
    assert ("Sweep: 100%" in drawn) is wanted


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperatures": []}, ValueError, "temperatures must be one or more positive"),
        ({"kd_weights": [-1.0]}, ValueError, "kd_weights must be one or more finite numbers from 0"),
        ({"kd_weights": [4.0]}, ValueError, "task_weight is 1 − kd_weight by default, which is negative"),
        ({"seeds": 0}, ValueError, "seeds must be 1 or more"),
        ({"monitor": "test_acc"}, ValueError, "does not choose on the test set"),
        ({"monitor": "val_loss"}, ValueError, "val_loss changes with the temperature"),
        ({"monitor": "val_f1"}, LookupError, "validation did not log 'val_f1'; it logged .*val_acc"),
        ({"config": str(ROOT / "configs" / "digits_baseline.yaml")}, TypeError, "needs .* a DistillationModule"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    arguments = {"config": short(), "temperatures": [2.0], "kd_weights": [0.5], "output": str(tmp_path)}
    with pytest.raises(error, match=message):
        sweep(**(arguments | options))


def test_several_devices_are_refused(tmp_path: Path) -> None:
    config = short()
    config["trainer"] |= {"devices": 2, "strategy": "ddp_spawn"}
    with pytest.raises(ValueError, match="each run of a sweep has one device"):
        sweep(config, [2.0], [0.5], output=str(tmp_path))


def test_ctrl_c_that_a_library_catches_ends_the_sweep_after_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any) -> tuple[float, int]:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return 0.5, 1

    monkeypatch.setattr("kd_lightning.sweep.run.train", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        sweep(short(), [2.0], [0.5, 0.9], seeds=1, output=str(tmp_path))
    assert "interrupted: 1 of 3 runs are finished and kept" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before
