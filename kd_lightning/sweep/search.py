"""The sweep: puts the runs in, does those that nobody else does, and reports."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from kd_lightning.sweep.queue import Job, RunQueue, open_study
from kd_lightning.sweep.report import write_report
from kd_lightning.sweep.results import SweepCell, SweepResult, SweepRun
from kd_lightning.sweep.run import Setting, Validations, measure, resolve, train

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.trial import FrozenTrial

__all__ = ["sweep"]

_BASELINE = "no teacher"
_POLL = 1.0  # seconds between two looks at what other processes do
_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}


def sweep(
    config: str | Path | Sequence[str | Path] | Mapping[str, Any],
    temperatures: Sequence[float],
    kd_weights: Sequence[float],
    seeds: int = 3,
    monitor: str = "val_acc",
    mode: Literal["max", "min"] = "max",
    task_weight: float | None = None,
    multiply: bool = False,
    baseline: bool = True,
    sampler: Literal["grid", "tpe"] = "grid",
    trials: int = 20,
    pruner: Literal["none", "median"] = "none",
    output: str = "sweep",
    storage: str | None = None,
    study_name: str = "sweep",
    retry_failed: bool = False,
) -> SweepResult:
    r"""Train a configuration once for each temperature, weight and seed, and compare.

    Every run is ``fit`` of the configuration with three values changed, in one process after the other, by itself:
    freshly seeded, with logs and weights in a folder of its own. Its score is the best validation value of ``monitor``,
    whose weights are kept. A cell is as good as the mean of its seeds. The baseline is the same student with the same
    seeds, steps and data, but ``kd_weight=0`` and ``task_weight=1`` (the teacher still runs, for the metrics that
    compare with it). The test set is measured at the end, of the chosen cell and the baseline alone, and stored.

    The configuration's other callbacks stay; loggers and checkpoints are the sweep's own. ``data.init_args.seed``
    stays too: all runs see the same split.

    *To stop and go on*: the same command continues, also after a crash. Runs that are finished are kept, the one that
    was interrupted is done again from its start. More temperatures, weights or seeds can be given later; another
    configuration is an error. *Several processes*: start the same command as often as you like, on one machine or
    several that share ``output``; they share the runs. SQLite's locks do not work on most network file systems: name a
    journal file there (``storage="sweep/journal.log"``), or a database server.

    Writes to ``output``: ``results.csv``, ``heatmap.png``, ``report.html``, ``sweep.db`` and ``runs/``.

    Args:
        config: YAML files, later ones over earlier ones; or a configuration as a mapping.
        temperatures: Constant temperatures in place of the configuration's policy. For ``sampler="tpe"`` the smallest
            and the largest are the range, searched on a log scale.
        kd_weights: Weights of the distillation term; for ``"tpe"`` the range.
        seeds: Runs per cell: the configuration's ``seed_everything`` and the numbers after it.
        monitor: A validation metric; not ``val_loss`` or ``val_kd_loss``, which change with the temperature.
        mode: Whether larger or smaller is better.
        task_weight: The task term's weight in every cell. None: 1 − kd_weight.
        multiply: The temperatures multiply the configuration's own policy (its ``multiplier``) instead of replacing it.
        baseline: Whether to train the student without the teacher too.
        sampler: ``"grid"`` for every pair; ``"tpe"`` for ``trials`` pairs within the ranges, by Optuna's estimator.
        trials: How many pairs ``"tpe"`` tries.
        pruner: ``"median"`` stops a run that after five others is worse than their median at the same validation. A
            cell with a pruned run is not chosen.
        output: The sweep's folder.
        storage: A database URL or the path of a journal file. None: ``output``/sweep.db.
        study_name: Of the study in the storage.
        retry_failed: Whether runs that failed are done again.

    Raises:
        ImportError: Optuna or matplotlib is not there; says what to install.
        ValueError: An argument outside its range; a metric that cannot choose; another configuration than the sweep was
            started with, naming what differs.
        LookupError: The metric is not logged.
        RuntimeError: Every run failed.

    Example:
        >>> sweep("configs/digits.yaml", temperatures=[1, 4], kd_weights=[0.5, 0.9], seeds=3)  # doctest: +SKIP
    """
    _check(temperatures, kd_weights, monitor, task_weight, seeds=seeds, trials=trials)
    try:
        import matplotlib  # noqa: F401
        import optuna
    except ImportError as error:
        raise ImportError("a sweep needs Optuna and matplotlib: pip install 'kd-lightning[sweep]'") from error

    folder = Path(output)
    with _quiet():
        resolved, parts = resolve(config)
        teacher = parts.model.teacher
        if teacher is None:
            raise ValueError("a sweep needs a teacher: model.init_args.teacher in the configuration.")
        teacher.load()
        asked = {"monitor": monitor, "mode": mode, "task_weight": task_weight, "multiply": multiply, "sampler": sampler}
        settings = _flat({**asked, "teacher weights": teacher.fingerprint(), **_compared(resolved, multiply)})
        del parts, teacher
    folder.mkdir(parents=True, exist_ok=True)
    first_seed = resolved["seed_everything"]
    first_seed = first_seed if isinstance(first_seed, int) and not isinstance(first_seed, bool) else 0
    samplers = {"grid": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
    pruners = {"none": optuna.pruners.NopPruner(), "median": optuna.pruners.MedianPruner(n_startup_trials=5)}
    direction = "maximize" if mode == "max" else "minimize"
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    place = storage or f"sqlite:///{folder / 'sweep.db'}"
    try:
        with open_study(place, study_name, direction, samplers[sampler](), pruners[pruner]) as study, _quiet():
            _refuse_changes(study, settings)
            work = _Sweep(
                RunQueue(study, retry_failed), resolved, folder, monitor, mode, task_weight, multiply,
                [float(t) for t in temperatures], [float(w) for w in kd_weights],
                range(first_seed, first_seed + seeds), baseline, trials if sampler == "tpe" else None,
            )  # fmt: skip
            return work.do()
    finally:
        optuna.logging.set_verbosity(verbosity)


class _Sweep:
    """A sweep under way, in this process."""

    def __init__(
        self,
        queue: RunQueue,
        config: dict[str, Any],
        folder: Path,
        monitor: str,
        mode: Literal["max", "min"],
        task_weight: float | None,
        multiply: bool,
        temperatures: list[float],
        kd_weights: list[float],
        seeds: range,
        baseline: bool,
        suggestions: int | None,
    ) -> None:
        self.queue, self.config, self.folder = queue, config, folder
        self.monitor, self.mode, self.task_weight, self.multiply = monitor, mode, task_weight, multiply
        self.temperatures, self.kd_weights, self.seeds = temperatures, kd_weights, seeds
        self.baseline, self.suggestions = baseline, suggestions
        self.trial: Trial | None = None  # the last that was claimed
        self.interrupted = False

    def do(self) -> SweepResult:
        """Do what is left, in turn with the other processes, then measure and report."""
        in_main_thread = threading.current_thread() is threading.main_thread()  # others have no signals
        handler = signal.signal(signal.SIGINT, self.interrupt) if in_main_thread else None
        try:
            self.share()
            return self.report()
        except (KeyboardInterrupt, SystemExit):  # Lightning makes the one of the other
            if self.trial is not None:
                self.queue.give_up(self.trial.number)
            _say("interrupted: {} of {} runs are finished and kept; the same command goes on".format(*self.progress()))
            raise KeyboardInterrupt from None
        finally:
            if in_main_thread:
                signal.signal(signal.SIGINT, handler)  # Lightning switches it off when it is interrupted

    def interrupt(self, *_: Any) -> None:
        """Ctrl-C: now, or after this run where a library catches the exception and goes on."""
        self.interrupted = True
        raise KeyboardInterrupt

    def share(self) -> None:
        """Run what nobody else runs, until all runs are finished."""
        from optuna.exceptions import UpdateFinishedTrialError

        waited = False
        while self.progress()[0] < len(self.cells()) * len(self.seeds):
            if self.interrupted:
                raise KeyboardInterrupt
            jobs = self.jobs()
            self.queue.put(jobs)
            self.trial = self.queue.claim(jobs)
            if self.trial is None:
                if not waited:
                    _say("nothing is left to start; waiting for the runs of other processes, or their sign of life")
                waited = True
                self.queue.give_up_dead(_say)
                time.sleep(_POLL)
                continue
            waited = False
            try:
                self.run(self.trial)
            except UpdateFinishedTrialError:
                _say(f"run {self.trial.number} was given to another process, which saw no sign of life of this one")

    # ---- what there is to do ----------------------------------------------------------------------------------------

    def cells(self) -> list[str]:
        """The cells by name; the baseline last."""
        if self.suggestions is None:
            cells = [_cell(t, w) for t in self.temperatures for w in self.kd_weights]
        else:
            cells = [f"suggestion {number}" for number in range(1, self.suggestions + 1)]
        return [*dict.fromkeys(cells), *([_BASELINE] if self.baseline else [])]

    def jobs(self) -> list[Job]:
        """All runs, seed after seed. A suggested cell gets its other seeds when its first has made the suggestion."""
        known = {_cell(t, w): {"temperature": t, "kd_weight": w} for t in self.temperatures for w in self.kd_weights}
        known[_BASELINE] = {}
        for trial in self.queue.trials():
            if len(trial.params) == 2:
                known.setdefault(trial.user_attrs.get("cell", ""), dict(trial.params))
        return [
            Job(cell, seed, known.get(cell, {}))
            for seed in self.seeds
            for cell in self.cells()
            if cell in known or seed == self.seeds[0]
        ]

    def setting(self, trial: Trial | FrozenTrial) -> Setting:
        """What the trial's run changes in the configuration."""
        seed = trial.user_attrs["seed"]
        if trial.user_attrs["cell"] == _BASELINE:
            return Setting(None, 0.0, 1.0, seed)
        temperature, kd_weight = trial.params["temperature"], trial.params["kd_weight"]
        task_weight = 1.0 - kd_weight if self.task_weight is None else self.task_weight
        return Setting(temperature, kd_weight, round(task_weight, 12), seed, self.multiply)

    # ---- one run ----------------------------------------------------------------------------------------------------

    def run(self, trial: Trial) -> None:
        """Train one run and record how it ended."""
        is_baseline = trial.user_attrs["cell"] == _BASELINE
        if not is_baseline:
            trial.suggest_float("temperature", min(self.temperatures), max(self.temperatures), log=True)
            trial.suggest_float("kd_weight", min(self.kd_weights), max(self.kd_weights))
        setting = self.setting(trial)
        where = f"runs/{trial.number:04d}"
        folder = self.folder / where
        trial.set_user_attr("folder", where)

        def report(value: float, step: int) -> bool:
            trial.report(value, step)
            return not is_baseline and trial.should_prune()

        watch = Validations(self.monitor, report)
        began = time.monotonic()
        state, score, reason = "COMPLETE", None, ""
        try:
            with self.queue.signs_of_life(trial):
                score, epoch = train(self.config, setting, folder, watch, self.mode)
            state = "PRUNED" if watch.pruned else "COMPLETE"
            for name, value in (("score", score), ("epoch", epoch)):
                trial.set_user_attr(name, value)
        except LookupError as error:
            if not watch.history and self.monitor in str(error):  # it would be so in every run
                self.queue.give_up(trial.number)
                raise
            state, reason = "FAIL", _failed(error, folder)
        except Exception as error:
            state, reason = "FAIL", _failed(error, folder)
        seconds = time.monotonic() - began
        trial.set_user_attr("seconds", round(seconds, 1))
        if reason:
            trial.set_user_attr("reason", reason)
        kept = self.queue.finish(trial.number, state, score if state == "COMPLETE" else None)
        _free_memory()
        done, total = self.progress()
        run = self.as_run(self.queue.study.get_trials(deepcopy=False)[trial.number])
        told = {
            "COMPLETE": f"{self.monitor} {score if score is None else format(score, '.4f')} at epoch {run.epoch}",
            "PRUNED": f"pruned after {len(watch.history)} validations",
            "FAIL": f"failed: {reason}",
        }[state]
        late = "" if kept else "; another process has done it meanwhile"
        _say(f"[{done}/{total}] {run.name}: {told}, {seconds:.0f} s{late}")

    def progress(self) -> tuple[int, int]:
        """Finished runs, and all of them."""
        total = len(self.cells()) * len(self.seeds)
        wanted = {(job.cell, job.seed) for job in self.jobs()}
        return sum(t.state.is_finished() for key, t in self.queue.current().items() if key in wanted), total

    # ---- what came out ----------------------------------------------------------------------------------------------

    def as_run(self, trial: FrozenTrial) -> SweepRun:
        """A trial as a run of the result."""
        setting, told = self.setting(trial), trial.user_attrs
        return SweepRun(
            trial.number, setting.temperature, setting.kd_weight, setting.task_weight, setting.seed,
            _STATES[trial.state.name], told.get("score"), told.get("epoch"), told.get("seconds"),
            told.get("reason", ""), told.get("folder", ""), self.queue.study.user_attrs.get(_test(trial.number), {}),
        )  # fmt: skip

    def result(self, not_tested: str = "") -> SweepResult:
        """The result as far as there is one."""
        trials = self.queue.current()
        cells: list[SweepCell] = []
        for cell in self.cells():
            runs = [self.as_run(trials[cell, seed]) for seed in self.seeds if (cell, seed) in trials]
            cells.append(SweepCell(runs[0].temperature, runs[0].kd_weight, runs))
        baseline = cells.pop() if self.baseline else None
        if self.suggestions is not None:
            cells.sort(key=lambda cell: (cell.temperature, cell.kd_weight))
        return SweepResult(cells, baseline, self.monitor, self.mode, self.folder, not_tested)

    def report(self) -> SweepResult:
        """Measure the chosen cell and the baseline on the test set, write everything, print the table."""
        result = self.result()
        if all(run.state == "failed" for run in result.runs):
            raise RuntimeError(f"every run failed. The first: {result.runs[0].reason}")
        result = self.result(self.test(result))
        result.write_csv(self.folder / "results.csv")
        result.plot().savefig(self.folder / "heatmap.png", dpi=150)
        write_report(result, self.config, self.queue.study.user_attrs["fingerprint"], self.folder / "report.html")
        _say(result.table())
        _say(f"{self.folder / 'report.html'}")
        return result

    def test(self, result: SweepResult) -> str:
        """Measure the runs of the best cell and the baseline that were not measured yet. Returns why it could not."""
        if result.best is None:
            return ""
        runs = [*result.best.runs, *(result.baseline.runs if result.baseline is not None else [])]
        study = self.queue.study
        for run in runs:
            if run.state != "complete" or _test(run.number) in study.user_attrs:
                continue
            setting = Setting(run.temperature, run.kd_weight, run.task_weight, run.seed, self.multiply)
            try:
                metrics = measure(self.config, setting, self.folder / run.folder)
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            study.set_user_attr(_test(run.number), metrics)
            if result.test_metric not in metrics:
                return f"the test loop logs {', '.join(sorted(metrics))}"
        return ""


def _check(
    temperatures: Sequence[float], kd_weights: Sequence[float], monitor: str, task_weight: float | None, **counts: int
) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be 1 or more, got {count}.")
    if not temperatures or not all(0 < t < float("inf") for t in temperatures):
        raise ValueError(f"temperatures must be one or more positive, finite numbers, got {list(temperatures)}.")
    if not kd_weights or not all(0 <= w < float("inf") for w in kd_weights):
        raise ValueError(f"kd_weights must be one or more finite numbers from 0 up, got {list(kd_weights)}.")
    if task_weight is None and max(kd_weights) > 1:
        raise ValueError(
            f"task_weight is 1 − kd_weight by default, which is negative for kd_weight={max(kd_weights):g}: give "
            "task_weight a number, the same in every cell."
        )
    if monitor.startswith("test"):
        raise ValueError(
            f"a sweep does not choose on the test set, got monitor={monitor!r}: what was chosen on it can no longer be "
            "measured on it. Take the metric's validation twin."
        )
    if monitor in ("val_loss", "val_kd_loss"):
        raise ValueError(
            f"{monitor} changes with the temperature itself, so it cannot choose one. Take val_acc or val_task_loss."
        )


def _compared(config: dict[str, Any], multiply: bool) -> dict[str, Any]:
    """The part of a configuration that must not change between two starts of one sweep."""
    kept = json.loads(json.dumps(config))
    for name in ("logger", "default_root_dir", "enable_progress_bar", "enable_model_summary"):
        kept["trainer"].pop(name, None)
    for name in ("kd_weight", "task_weight", *(() if multiply else ("temperature",))):
        kept["model"]["init_args"].pop(name, None)
    return kept


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else None
    if not items:
        return {prefix: config}
    flat: dict[str, Any] = {}
    for name, value in items:
        flat |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def _refuse_changes(study: Any, settings: dict[str, Any]) -> None:
    before = study.user_attrs.get("settings")
    if before is None:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        study.set_user_attr("settings", settings)
        study.set_user_attr("fingerprint", digest)
    elif before != settings:
        names = sorted(name for name in {*before, *settings} if before.get(name, ...) != settings.get(name, ...))
        changes = [f"  {name}: {before.get(name, 'not set')} → {settings.get(name, 'not set')}" for name in names]
        raise ValueError(
            f"the study {study.study_name!r} was started with another configuration, and its runs could not be "
            "compared:\n" + "\n".join(changes) + "\nGo on with the former one, or start another sweep: --output, or "
            "--study-name."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's notes and warnings off; random numbers and its seeds in the environment as they were, afterwards."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    names = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    environment = {name: os.environ.get(name) for name in names}
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), isolate_rng():
            warnings.filterwarnings("ignore", module=r"lightning\.")  # ours stay
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _failed(error: Exception, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "error.txt").write_text("".join(traceback.format_exception(error)))
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _cell(temperature: float, kd_weight: float) -> str:
    return f"temperature {temperature!r}, kd_weight {kd_weight!r}"


def _test(number: int) -> str:
    return f"test of run {number}"


def _say(text: str) -> None:
    print(text, flush=True)
