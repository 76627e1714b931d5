"""Sweeps over temperature and weight: enqueue, execute and report runs."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.cli import instantiate_class
from lightning.pytorch.utilities.seed import isolate_rng
from tqdm.auto import tqdm

from kd_lightning.callbacks.trial import quiet
from kd_lightning.functional.rows import check_option
from kd_lightning.functional.temperature import check_weights
from kd_lightning.ranking import check_counts, check_monitor, checked_temperatures, checked_weights
from kd_lightning.sweep.on_ray import require_ray, share_on_ray
from kd_lightning.sweep.plan import BASELINE, Plan, comparable, refuse_changes
from kd_lightning.sweep.queue import RunQueue, open_queue
from kd_lightning.sweep.report import write_report
from kd_lightning.sweep.results import SweepCell, SweepResult, SweepRun
from kd_lightning.sweep.run import Outcome, Setting, Validations, attempt, free_memory, measure, resolve

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

_POLL = 1.0  # seconds between two checks of the runs of other processes
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
    sampler: Literal["grid", "tpe"] | BaseSampler = "grid",
    trials: int = 20,
    pruner: Literal["none", "median", "asha"] | BasePruner = "none",
    executor: Literal["local", "ray"] = "local",
    output: str = "sweep",
    storage: str | None = None,
    study_name: str = "sweep",
    retry_failed: bool = False,
) -> SweepResult:
    r"""Train a configuration once for each temperature, weight and seed, and compare.

    A run is a freshly seeded ``fit`` of the configuration with another temperature, weight and seed, and with its own
    folder of logs and weights. Its score is the best validation value of ``monitor``, whose weights are kept; a cell's
    score is the mean over its seeds. The baseline is the same student with the same seeds, steps and data, but
    ``kd_weight=0`` and ``task_weight=1`` (the teacher still runs, for the metrics that compare with it). The test set
    is measured at the end, for the chosen cell and the baseline alone.

    The configuration's other callbacks stay; loggers and checkpoints are the sweep's own. All runs use the same split
    of the data, because ``data.init_args.seed`` stays.

    *To resume*, rerun the command, also after a crash: finished runs are kept, an interrupted run starts again. A later
    start may add temperatures, weights or seeds; another configuration is an error. *To share the work*, start the same
    command several times, on one machine or several that share ``output``. SQLite's locks do not work on most network
    file systems: use a journal file there (``storage="sweep/journal.log"``), or a database server.

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
        multiply: Whether the temperatures multiply the configuration's policy instead of replacing it.
        baseline: Whether to train the student without the teacher too.
        sampler: ``"grid"`` for every pair; ``"tpe"``, or an Optuna sampler, for ``trials`` pairs within the ranges.
        trials: Number of pairs that a sampler other than ``"grid"`` suggests.
        pruner: ``"median"`` stops a run that after five others is worse than their median at the same validation;
            ``"asha"`` goes on with the best quarter at validations 1, 4, 16, …; or an Optuna pruner. Seeds are compared
            with each other, and a cell with a pruned run is not chosen.
        executor: ``"ray"`` executes the runs as trials of Ray Tune, on the cluster of ``RAY_ADDRESS`` or on this
            machine. All nodes share the present folder.
        output: The sweep's folder.
        storage: A database URL or the path of a journal file. None: ``output``/sweep.db.
        study_name: Name of the study in the storage.
        retry_failed: Whether failed runs are executed again.

    Raises:
        ImportError: If Optuna or matplotlib is not installed, or Ray Tune where it is the executor.
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range, the metric cannot choose a temperature, or the configuration differs
            from the one the sweep was started with.
        LookupError: If validation does not log the metric, or a machine of the Ray cluster lacks the present folder.
        RuntimeError: If every run failed.

    Example:
        >>> sweep("configs/digits.yaml", temperatures=[1, 4], kd_weights=[0.5, 0.9], seeds=3)  # doctest: +SKIP
    """
    temperatures = checked_temperatures("temperatures", temperatures)
    kd_weights = checked_weights("kd_weights", kd_weights)
    check_counts(seeds=seeds, trials=trials)
    check_monitor(monitor, mode, "a sweep")
    if task_weight is None and max(kd_weights) > 1:
        raise ValueError(
            f"task_weight is 1 − kd_weight by default, which is negative for kd_weight={max(kd_weights):g}: give "
            "task_weight a number, the same in every cell."
        )
    check_weights(task_weight=0.0 if task_weight is None else task_weight)
    try:
        import matplotlib  # noqa: F401
        import optuna
    except ImportError as error:
        raise ImportError("a sweep needs Optuna and matplotlib: pip install 'kd-lightning[sweep]'") from error
    check_option("executor", executor, ("local", "ray"))
    if executor == "ray":
        require_ray()

    samplers = {"grid": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
    pruners = {
        "none": optuna.pruners.NopPruner,
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=5),
        "asha": optuna.pruners.SuccessiveHalvingPruner,
    }
    sampling = _optuna_object("sampler", sampler, samplers, optuna.samplers.BaseSampler)
    pruning = _optuna_object("pruner", pruner, pruners, optuna.pruners.BasePruner)
    sampler_name = sampler if isinstance(sampler, str) else type(sampling).__name__
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output must be a folder, which is made if it is not there, but {output} is a file.")
    with quiet(), isolate_rng():
        resolved, parts = resolve(config)
        teacher = parts.model.teacher
        if teacher is None:
            raise ValueError("a sweep needs a teacher: model.init_args.teacher in the configuration.")
        teacher.load()
        others = {"monitor": monitor, "mode": mode, "task_weight": task_weight, "sampler": sampler_name}
        settings = comparable(resolved, multiply, **others, **{"teacher weights": teacher.fingerprint()})
        del parts, teacher
    folder.mkdir(parents=True, exist_ok=True)
    first_seed = resolved["seed_everything"]
    first_seed = first_seed if isinstance(first_seed, int) and not isinstance(first_seed, bool) else 0
    plan = Plan(
        resolved, folder, monitor, mode, task_weight, multiply, temperatures, kd_weights,
        range(first_seed, first_seed + seeds), baseline, None if sampler == "grid" else trials,
    )  # fmt: skip
    direction = "maximize" if mode == "max" else "minimize"
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    place = storage or f"sqlite:///{folder / 'sweep.db'}"
    try:
        with open_queue(place, study_name, direction, sampling, pruning, retry_failed) as queue, quiet(), isolate_rng():
            refuse_changes(queue.study, settings)
            if seeds > 1 and not isinstance(pruning, optuna.pruners.NopPruner):
                _say("a pruner compares seeds as well as cells: a cell that loses one run for its seed is not chosen")
            return SweepProcess(queue, plan).do(share_on_ray if executor == "ray" else SweepProcess.share)
    finally:
        optuna.logging.set_verbosity(verbosity)


class SweepProcess:
    """The part of a sweep that this process executes."""

    def __init__(self, queue: RunQueue, plan: Plan) -> None:
        self.queue, self.plan = queue, plan
        self.trial: Trial | None = None  # claimed last
        self.interrupted = False
        self.waited = False
        wanted = plan.config["trainer"].get("enable_progress_bar") is not False
        self.bar = tqdm(  # None: only on a terminal, because each run has a line of its own
            total=self.progress()[1], initial=self.progress()[0], desc="Sweep", unit="run",
            disable=None if wanted else True,
        )  # fmt: skip

    def do(self, share: Callable[[SweepProcess], None]) -> SweepResult:
        """Execute the remaining runs together with the other processes, then measure and report."""
        # only the main thread receives signals
        in_main_thread = threading.current_thread() is threading.main_thread()
        handler = signal.signal(signal.SIGINT, self.interrupt) if in_main_thread else None
        try:
            with self.bar:
                share(self)
            return self.report()
        except (KeyboardInterrupt, SystemExit):  # because Lightning converts KeyboardInterrupt to SystemExit
            if self.trial is not None:
                self.queue.give_up(self.trial.number)
            self.bar.close()
            _say("interrupted: {} of {} runs are finished and kept; the same command goes on".format(*self.progress()))
            raise KeyboardInterrupt from None
        finally:
            if in_main_thread:
                signal.signal(signal.SIGINT, handler)  # because Lightning replaces the handler when it is interrupted

    def interrupt(self, *_: Any) -> None:
        """Handle Ctrl-C: end at once, or after the present run if a library catches the exception."""
        self.interrupted = True
        raise KeyboardInterrupt

    def share(self) -> None:
        """Execute the runs that no other process executes, until all are finished."""
        while not self.finished:
            if self.interrupted:
                raise KeyboardInterrupt
            self.trial = self.claim()
            if self.trial is None:
                time.sleep(_POLL)
                continue
            self.run(self.trial)

    @property
    def finished(self) -> bool:
        """Return True if all runs are finished, those of other processes included."""
        done, total = self.progress()
        return done == total

    def claim(self, busy: bool = False) -> Trial | None:
        """Claim a run; return None, and look for dead processes, if nothing is left to start.

        A process is ``busy`` that has runs that are not finished.
        """
        trial = self.queue.claim(self.plan.jobs(self.queue.trials()))
        if trial is None:
            if not self.waited and not busy:
                _say("nothing is left to start; waiting for the runs of other processes, or for stale heartbeats")
            self.queue.give_up_dead(_say)
        self.waited = trial is None and not busy
        return trial

    # ---- one run ----------------------------------------------------------------------------------------------------

    def run(self, trial: Trial) -> None:
        """Train a run and record its score, or the error that ended it."""
        setting, folder = self.begin(trial)
        watch = Validations(self.plan.monitor, lambda value, step: self.prunes(trial, value, step))
        try:
            with self.queue.heartbeat(trial):
                outcome = attempt(self.plan.config, setting, folder, watch, self.plan.mode)
        except LookupError:
            self.queue.give_up(trial.number)
            raise
        free_memory()
        self.end(trial, outcome)

    def begin(self, trial: Trial) -> tuple[Setting, Path]:
        """Return the setting and the folder of a claimed run."""
        self.plan.suggest(trial)
        where = f"runs/{trial.number:04d}"
        trial.set_user_attr("folder", where)
        self.show(self.name(trial))
        return self.plan.setting(trial), self.plan.folder / where

    def prunes(self, trial: Trial, value: float, step: int) -> bool:
        """Record a validation, and return whether to prune the run."""
        self.show(f"{self.name(trial)}: {self.plan.monitor} {value:.4g} at validation {step}")
        trial.report(value, step)
        return trial.user_attrs["cell"] != BASELINE and trial.should_prune()

    def end(self, trial: Trial, outcome: Outcome) -> None:
        """Record the outcome of a run, and tell it."""
        from optuna.exceptions import UpdateFinishedTrialError

        told = {"score": outcome.score, "epoch": outcome.epoch, "reason": outcome.reason or None}
        told["seconds"] = round(outcome.seconds, 1)
        kept = False
        with suppress(UpdateFinishedTrialError):  # because another process may have found the heartbeat stale
            for name, value in told.items():
                if value is not None:
                    trial.set_user_attr(name, value)
            kept = self.queue.finish(trial.number, outcome.state, None if outcome.pruned_at else outcome.score)
        done, total = self.progress()
        self.show(self.name(trial))
        text = f"{outcome.describe(self.plan.monitor)}, {outcome.seconds:.0f} s"
        lost = "given to another process, which found this one's heartbeat stale"
        _say(f"[{done}/{total}] {self.name(trial)}: {text if kept else lost}")

    def name(self, trial: Trial) -> str:
        """Return the name of a claimed run, made of its cell and seed."""
        setting = self.plan.setting(trial)
        weights = setting.kd_weight, setting.task_weight
        return SweepRun(trial.number, setting.temperature, *weights, setting.seed, "running").name

    def show(self, text: str) -> None:
        """Show the number of finished runs, and a text on the present one, in the progress bar."""
        if not self.bar.disable:
            self.bar.n = self.progress()[0]
            self.bar.set_postfix_str(text)

    def progress(self) -> tuple[int, int]:
        """Return the number of finished runs and of all runs."""
        total = len(self.plan.cells) * len(self.plan.seeds)
        wanted = {(job.cell, job.seed) for job in self.plan.jobs(self.queue.trials())}
        return sum(t.state.is_finished() for key, t in self.queue.current().items() if key in wanted), total

    # ---- results ----------------------------------------------------------------------------------------------------

    def as_run(self, trial: FrozenTrial) -> SweepRun:
        """Convert a trial to a run of the result."""
        setting, told = self.plan.setting(trial), trial.user_attrs
        return SweepRun(
            trial.number, setting.temperature, setting.kd_weight, setting.task_weight, setting.seed,
            _STATES[trial.state.name], told.get("score"), told.get("epoch"), told.get("seconds"),
            told.get("reason", ""), told.get("folder", ""), self.queue.study.user_attrs.get(_test(trial.number), {}),
        )  # fmt: skip

    def result(self, not_tested: str = "") -> SweepResult:
        """Collect the runs of all cells."""
        trials = self.queue.current()
        cells: list[SweepCell] = []
        for cell in self.plan.cells:
            runs = [self.as_run(trials[cell, seed]) for seed in self.plan.seeds if (cell, seed) in trials]
            cells.append(SweepCell(runs[0].temperature, runs[0].kd_weight, runs))
        baseline = cells.pop() if self.plan.baseline else None
        if self.plan.suggestions is not None:
            cells.sort(key=lambda cell: (cell.temperature, cell.kd_weight))
        return SweepResult(cells, baseline, self.plan.monitor, self.plan.mode, self.plan.folder, not_tested)

    def report(self) -> SweepResult:
        """Measure the chosen cell and the baseline on the test set, write all files and print the table."""
        result = self.result()
        if all(run.state == "failed" for run in result.runs):
            raise RuntimeError(f"every run failed. The first: {result.runs[0].reason}")
        result = self.result(self.test(result))
        result.write_csv(self.plan.folder / "results.csv")
        if result.is_drawable:
            result.plot().savefig(self.plan.folder / "heatmap.png", dpi=150)
        write_report(
            result, self.plan.config, self.queue.study.user_attrs["fingerprint"], self.plan.folder / "report.html"
        )
        _say(result.table())
        _say(f"{self.plan.folder / 'report.html'}")
        return result

    def test(self, result: SweepResult) -> str:
        """Measure the best cell and the baseline on the test set once; return the error or missing metric, else ""."""
        if result.best is None:
            return ""
        runs = [*result.best.runs, *(result.baseline.runs if result.baseline is not None else [])]
        study = self.queue.study
        for run in runs:
            if run.state != "complete" or _test(run.number) in study.user_attrs:
                continue
            setting = Setting(run.temperature, run.kd_weight, run.task_weight, run.seed, self.plan.multiply)
            try:
                metrics = measure(self.plan.config, setting, self.plan.folder / run.folder)
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            study.set_user_attr(_test(run.number), metrics)
            if result.test_metric not in metrics:
                return f"the test loop logs {', '.join(sorted(metrics))}"
        return ""


def _optuna_object(name: str, value: Any, named: Mapping[str, Callable[[], Any]], kind: type) -> Any:
    """Return the sampler or pruner that an argument names, holds, or describes by ``class_path`` and ``init_args``."""
    if isinstance(value, str) and value in named:
        return named[value]()
    try:
        made = instantiate_class((), value) if isinstance(value, dict) else value
    except (ImportError, AttributeError, KeyError, ValueError):
        made = None  # because the class does not exist
    if not isinstance(made, kind):
        choices = ", ".join(map(repr, named))
        raise ValueError(f"{name} must be one of {choices}, or an Optuna {kind.__name__}, got {value!r}.")
    return made


def _test(number: int) -> str:
    return f"test of run {number}"


def _say(text: str) -> None:
    with tqdm.external_write_mode():  # above the progress bar
        print(text, flush=True)
