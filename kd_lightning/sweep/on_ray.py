"""The runs of a sweep as trials of Ray Tune, on one machine or a cluster."""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_lightning.callbacks.trial import quiet
from kd_lightning.sweep.run import Outcome, Setting, Validations, attempt, best_of, free_memory

if TYPE_CHECKING:
    from optuna import Trial

    from kd_lightning.sweep.plan import Plan
    from kd_lightning.sweep.search import SweepProcess

__all__ = ["require_ray", "share_on_ray"]

_POLL = 1.0  # seconds between two checks of the runs of other processes
_NOT_SHARED = (
    "the machine {} of the Ray cluster does not see the run's folder {}/{}. Start the command in a folder that all "
    "machines share under the same path, such as one on a network file system."
)
_MOST = 4096  # runs that Ray may start at a time: those that fit the cluster are fewer


def require_ray() -> None:
    """Raise if Ray Tune is not installed.

    Raises:
        ImportError: If Ray Tune is not installed.
    """
    # read at the import: under `uv run`, Ray would send the whole folder to its workers, which share it already
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # whose banner Ray prints at any verbosity
    try:
        import ray.tune  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("executor='ray' needs Ray Tune: pip install 'kd-lightning[sweep,ray]'.") from error


def share_on_ray(process: SweepProcess) -> None:
    """Execute the runs that no other process executes, until all are finished.

    Ray trains. This process claims runs, writes their heartbeats and records what Ray's workers report, so that no
    worker needs the storage.

    Raises:
        LookupError: If validation does not log the metric, or a node of the cluster lacks the present folder.
        KeyboardInterrupt: If Ray Tune was interrupted.
    """
    import ray  # pyright: ignore[reportMissingImports]
    from ray import tune  # pyright: ignore[reportMissingImports]
    from ray.exceptions import ActorUnavailableError  # pyright: ignore[reportMissingImports]
    from ray.tune.schedulers import FIFOScheduler  # pyright: ignore[reportMissingImports]
    from ray.tune.search import Searcher  # pyright: ignore[reportMissingImports]

    class Claims(Searcher):
        def suggest(self, trial_id: str) -> Any:
            return Searcher.FINISHED if runs.are_finished() else runs.claim(trial_id)

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            runs.complete(trial_id)

        def save(self, checkpoint_path: str) -> None: ...  # because the queue is the state

        def restore(self, checkpoint_path: str) -> None: ...

    class Errors(FIFOScheduler):
        def on_trial_error(self, tune_controller: Any, trial: Any) -> None:  # comes before on_trial_complete
            error = pickle.loads(Path(trial.pickled_error_file).read_bytes())  # as Tune has just written it
            runs.claimed[trial.trial_id].unreachable = isinstance(error, ActorUnavailableError)

    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    resources = _resources(process.plan.config)
    runs = _Runs(process, resources)
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", str(_MOST))  # else Tune starts one run after the other
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        work = tune.with_parameters(_work, plan=process.plan, folder=str(Path.cwd()))
        tune.Tuner(
            tune.with_resources(work, resources),
            tune_config=tune.TuneConfig(search_alg=Claims(), scheduler=Errors(), num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(
                storage_path=str((process.plan.folder / "ray").resolve()), stop=runs.prunes, verbose=0
            ),
        ).fit()
    finally:
        runs.give_up()
        logger.setLevel(level)
        if started:
            ray.shutdown()
    if runs.refused:
        raise LookupError(runs.refused)
    if not process.finished:
        raise KeyboardInterrupt


@dataclass
class _Run:
    """A run that a worker of Ray executes.

    Attributes:
        trial: The claimed trial.
        heartbeat: What ends its heartbeat.
        began: When it was claimed.
        nodes: The cluster's nodes then.
        history: Epochs and values of its validations.
        outcome: Its outcome, once known.
        unreachable: Whether its worker could not be reached, of which Ray does not know yet that its node is lost.
    """

    trial: Trial
    heartbeat: ExitStack
    began: float
    nodes: set[str]
    history: list[tuple[int, float]] = field(default_factory=list)
    outcome: Outcome | None = None
    unreachable: bool = False


class _Runs:
    """The claimed runs by the ids of Ray's trials.

    Args:
        process: The sweep's process.
        resources: What a run takes of a node.
    """

    def __init__(self, process: SweepProcess, resources: Mapping[str, float]) -> None:
        self.process, self.resources = process, resources
        self.claimed: dict[str, _Run] = {}
        self.refused = ""  # the error that every run would have
        self.next_claim = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        return _Runs, (None, {})  # because Ray Tune saves its experiment, whose state is the queue's

    def are_finished(self) -> bool:
        """Return True if there is nothing to claim any more."""
        return bool(self.refused) or self.process.interrupted or self.process.finished

    def claim(self, trial_id: str) -> dict[str, Any] | None:
        """Claim a run and return what its worker needs; return None if nothing is left to start at present."""
        if time.monotonic() < self.next_claim:
            return None
        nodes = _nodes()
        fit = sum(
            int(min(node.get(name.upper(), 0.0) // count for name, count in self.resources.items() if count))
            for node in nodes.values()
        )
        if len(self.claimed) > fit:  # so one run waits for room, by which a cluster that can grow does
            return None
        trial = self.process.claim(busy=bool(self.claimed))
        if trial is None:
            self.next_claim = time.monotonic() + _POLL
            return None
        setting, folder = self.process.begin(trial)
        folder.mkdir(parents=True, exist_ok=True)  # its worker looks for it
        self.claimed[trial_id] = run = _Run(trial, ExitStack(), time.monotonic(), set(nodes))
        run.heartbeat.enter_context(self.process.queue.heartbeat(trial))
        return {"setting": asdict(setting), "folder": str(folder)}

    def prunes(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Record what a worker reports, and return whether to stop it."""
        from optuna.exceptions import UpdateFinishedTrialError

        run = self.claimed[trial_id]
        if refused := result.get("refused"):
            self.refused = refused
        elif outcome := result.get("outcome"):
            run.outcome = Outcome(**outcome)
        else:
            run.history.append((result["epoch"], result["value"]))
            try:
                pruned = self.process.prunes(run.trial, result["value"], len(run.history))
            except UpdateFinishedTrialError:  # because another process found the heartbeat stale
                return True
            if pruned:
                best = best_of(run.history, self.process.plan.mode)
                run.outcome = Outcome(*best, time.monotonic() - run.began, len(run.history))
            return pruned
        return False

    def complete(self, trial_id: str) -> None:
        """Record the end of a run, which has no outcome if its worker died; release it if a node died meanwhile."""
        run = self.claimed.pop(trial_id)
        run.heartbeat.close()
        lost = run.outcome is None and (run.unreachable or not run.nodes <= _nodes().keys())
        if lost:
            print(f"run {run.trial.number} was lost with a node of the cluster: executed again", flush=True)
        if self.refused or self.process.interrupted or lost:
            self.process.queue.give_up(run.trial.number)
            return
        dead = "Ray's worker died before the end of the run, killed or out of memory"
        self.process.end(run.trial, run.outcome or Outcome(seconds=time.monotonic() - run.began, reason=dead))

    def give_up(self) -> None:
        """Release the runs that an interruption left, so that the same command executes them."""
        for run in self.claimed.values():
            run.heartbeat.close()
            self.process.queue.give_up(run.trial.number)


def _work(config: dict[str, Any], plan: Plan, folder: str) -> None:
    """Execute a run in a worker of Ray, which starts in a folder of Ray's and may have executed others."""
    from ray import tune  # pyright: ignore[reportMissingImports]

    if not Path(folder, config["folder"]).is_dir():
        tune.report({"refused": _NOT_SHARED.format(socket.gethostname(), folder, config["folder"])})
        return
    os.chdir(folder)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as the command line has it: class_path: mine.Policy
    watch = Validations(plan.monitor)

    def report(value: float, step: int) -> bool:
        tune.report({"value": value, "epoch": watch.history[-1][0]})
        return False

    watch.report = report
    with quiet():
        try:
            outcome = attempt(plan.config, Setting(**config["setting"]), Path(config["folder"]), watch, plan.mode)
        except LookupError as error:
            tune.report({"refused": str(error)})
        else:
            tune.report({"outcome": asdict(outcome)})
    free_memory()


def _nodes() -> dict[str, dict[str, float]]:
    """Return the resources of the cluster's nodes by their ids."""
    import ray  # pyright: ignore[reportMissingImports]

    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def _resources(config: dict[str, Any]) -> dict[str, float]:
    """Return what a run takes: the configuration's threads, and a GPU where it uses one and the cluster has some."""
    import ray  # pyright: ignore[reportMissingImports]

    cores = max((node.get("CPU", 1.0) for node in _nodes().values()), default=1.0)
    uses = config["trainer"].get("accelerator", "auto") in ("auto", "gpu", "cuda")
    return {
        "cpu": min(config.get("num_threads") or 1, cores),
        "gpu": float(uses and ray.cluster_resources().get("GPU", 0) > 0),
    }
