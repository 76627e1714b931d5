"""A queue of runs in an Optuna study, shared by several processes so that each run is executed once."""

from __future__ import annotations

import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

__all__ = ["Job", "RunQueue", "open_study"]

_BEAT = 5.0  # seconds between two heartbeats of a run
_POLL = 0.1  # seconds between two attempts to take the lock
_GRACE = 60.0  # seconds without a heartbeat after which a run's process counts as dead


@dataclass(frozen=True)
class Job:
    """A run to execute.

    Attributes:
        cell: Name of the cell.
        seed: The seed.
        params: Temperature and weight; empty for the baseline, and for a cell that the sampler has yet to suggest.
    """

    cell: str
    seed: int
    params: dict[str, float] = field(default_factory=dict, compare=False)


@contextmanager
def open_study(storage: str, name: str, direction: str, sampler: Any, pruner: Any) -> Iterator[Study]:
    """Open or create a study, and close its connections at the end.

    Args:
        storage: URL of a database, or path of a journal file.
        name: Name of the study.
        direction: ``"maximize"`` or ``"minimize"``.
        sampler: An Optuna sampler; None for Optuna's default.
        pruner: An Optuna pruner; None for Optuna's default.
    """
    import optuna
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    options: dict[str, Any] = {"direction": direction, "sampler": sampler, "pruner": pruner, "load_if_exists": True}
    attempt, opened, study = 0, None, None
    while study is None:
        try:
            opened = _open_storage(storage)
            study = optuna.create_study(storage=opened, study_name=name, **options)
        except (
            SQLAlchemyError,
            sqlite3.OperationalError,
            StorageInternalError,
        ):  # because another process creates the tables at this moment
            attempt += 1
            if attempt == 10:
                raise
            time.sleep(0.2 * attempt)
    try:
        yield study
    finally:
        if (engine := getattr(opened, "engine", None)) is not None:
            engine.dispose()


def _open_storage(storage: str) -> Any:
    """Open a storage; SQLite takes the write lock at once, lest two processes both read that a run is waiting."""
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy import event

    if "://" not in storage:
        Path(storage).parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(storage))
    if not storage.startswith("sqlite"):
        return RDBStorage(storage)
    opened = RDBStorage(storage, engine_kwargs={"connect_args": {"timeout": 60}})
    event.listen(opened.engine, "connect", lambda connection, _: _set_up(connection))
    event.listen(opened.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    opened.engine.dispose()  # because the connections opened so far lack these listeners
    return opened


def _set_up(connection: Any) -> None:
    """Leave BEGIN to the listener, and do not sync each commit, which is safe against crashes of a process."""
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


class RunQueue:
    """A queue whose runs are trials of a study: waiting, claimed by one process, finished.

    A process writes a heartbeat every few seconds while it executes a run. A process whose heartbeat is stale for a
    minute counts as dead, and its run is executed by another one. Processes watch whether the heartbeat *changes*, so
    the clocks of two machines need not agree. Where two processes enqueue the same run, the lower trial number counts.

    Args:
        study: The study.
        retry_failed: Whether failed runs are executed again.
    """

    def __init__(self, study: Study, retry_failed: bool = False) -> None:
        self.study = study
        self._retry = {trial.number for trial in self.trials() if trial.state.name == "FAIL"} if retry_failed else set()
        self._seen: dict[tuple[int, Any], float] = {}

    def trials(self) -> list[FrozenTrial]:
        """Return all trials in their present state."""
        return self.study.get_trials(deepcopy=False)

    def current(self) -> dict[tuple[str, int], FrozenTrial]:
        """Return the valid trial of each cell and seed, without those given up or to be retried."""
        found: dict[tuple[str, int], FrozenTrial] = {}
        for trial in self.trials():
            cell, seed = trial.user_attrs.get("cell"), trial.user_attrs.get("seed")
            given_up = trial.state.name == "FAIL" and "reason" not in trial.user_attrs
            if cell is not None and seed is not None and not given_up and trial.number not in self._retry:
                found.setdefault((cell, seed), trial)
        return found

    def put(self, jobs: Iterable[Job]) -> None:
        """Enqueue the jobs that no process has enqueued; one process at a time does so."""
        jobs = list(jobs)
        if self._missing(jobs):
            with self._lock():
                for job in self._missing(jobs):
                    self.study.enqueue_trial(job.params, user_attrs={"cell": job.cell, "seed": job.seed})

    def _missing(self, jobs: Iterable[Job]) -> list[Job]:
        there = self.current()
        return [job for job in jobs if (job.cell, job.seed) not in there]

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold a second study as a lock, as its name is unique in the storage; delete a lock whose heartbeat is stale.

        A process that loses its lock, taken for dead, may enqueue a run twice, which :meth:`current` resolves.
        """
        import optuna
        from optuna.exceptions import DuplicatedStudyError

        storage, name = self.study._storage, f"{self.study.study_name} (lock)"
        seen, since, lock = None, time.monotonic(), None
        while lock is None:
            try:
                lock = optuna.create_study(storage=storage, study_name=name)
            except DuplicatedStudyError:
                time.sleep(_POLL)
                with suppress(KeyError):  # because the lock may be released at any time
                    beat = optuna.load_study(study_name=name, storage=storage).user_attrs.get("alive")
                    if beat != seen:
                        seen, since = beat, time.monotonic()
                    elif time.monotonic() - since >= _GRACE:
                        optuna.delete_study(study_name=name, storage=storage)
        try:
            with self.heartbeat(lock):
                yield
        finally:
            with suppress(KeyError):  # because another process may have found the heartbeat stale
                optuna.delete_study(study_name=name, storage=storage)

    def claim(self, jobs: Iterable[Job]) -> Trial | None:
        """Claim the next waiting trial of these jobs; return None if no such trial is waiting."""
        wanted = {(job.cell, job.seed) for job in jobs}
        while any(key in wanted and trial.state.name == "WAITING" for key, trial in self.current().items()):
            trial = self.study.ask()
            key = (trial.user_attrs.get("cell"), trial.user_attrs.get("seed"))
            owner = self.current().get(key)  # pyright: ignore[reportArgumentType]
            if key in wanted and owner is not None and owner.number == trial.number:
                trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
                return trial
            self.give_up(trial.number)  # because it is another command's, or ask() created it as nothing was waiting
        return None

    def running(self) -> list[FrozenTrial]:
        """Return the trials that a process has claimed and not finished."""
        return [trial for trial in self.current().values() if trial.state.name == "RUNNING"]

    @contextmanager
    def heartbeat(self, holder: Trial | Study) -> Iterator[None]:
        """Write the heartbeat of a trial or a lock until the context ends."""
        stop = threading.Event()

        def beat() -> None:
            count = 0
            while not stop.wait(_BEAT):
                count += 1
                with suppress(Exception):  # because the database may be busy, and the next heartbeat suffices
                    holder.set_user_attr("alive", count)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def give_up_dead(self, say: Callable[[str], None]) -> None:
        """Give up the runs whose heartbeat is stale."""
        now = time.monotonic()
        for trial in self.running():
            heartbeat = (trial.number, trial.user_attrs.get("alive"))
            if now - self._seen.setdefault(heartbeat, now) >= _GRACE:
                worker = trial.user_attrs.get("worker", "unknown")
                say(f"run {trial.number} of process {worker} has had no heartbeat for {_GRACE:g} s: executed again")
                self.give_up(trial.number)

    def give_up(self, number: int) -> None:
        """Release a run, so that another process can execute it."""
        self.finish(number, "FAIL")

    def finish(self, number: int, state: str, value: float | None = None) -> bool:
        """Record the end of a run; return False if another process has recorded it before."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            self.study.tell(number, value, state=TrialState[state])
        except (ValueError, UpdateFinishedTrialError):
            return False
        return True
