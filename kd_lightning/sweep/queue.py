"""A queue of runs in an Optuna study, shared by several processes so that each run is executed once."""

from __future__ import annotations

import os
import random
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
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

__all__ = ["Job", "RunQueue", "open_queue"]

_BEAT = 5.0  # seconds between two heartbeats of a run
_AHEAD = 32  # trials that wait at most: a storage reads all waiting trials at each claim, 0.3 ms a trial
_POLL = 0.2  # mean seconds between two checks of a queue that another process fills
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

    @property
    def key(self) -> tuple[str, int]:
        """Cell and seed."""
        return self.cell, self.seed


@contextmanager
def open_queue(
    storage: str, name: str, direction: str, sampler: Any = None, pruner: Any = None, retry_failed: bool = False
) -> Iterator[RunQueue]:
    """Open or create a study as a queue, and close its connections at the end.

    Args:
        storage: URL of a database, or path of a journal file.
        name: Name of the study.
        direction: ``"maximize"`` or ``"minimize"``.
        sampler: An Optuna sampler; None for Optuna's default.
        pruner: An Optuna pruner; None for Optuna's default.
        retry_failed: Whether failed runs are executed again.
    """
    import optuna
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    options: dict[str, Any] = {"direction": direction, "sampler": sampler, "pruner": pruner, "load_if_exists": True}
    attempt, queue, opened = 0, None, None
    while queue is None:
        try:
            opened = _open_storage(storage)
            queue = RunQueue(optuna.create_study(storage=opened, study_name=name, **options), opened, retry_failed)
        except (SQLAlchemyError, sqlite3.OperationalError, StorageInternalError):
            attempt += 1  # because another process may be creating the tables
            if attempt == 10:
                raise
            time.sleep(0.2 * attempt)
    try:
        yield queue
    finally:
        if (engine := getattr(opened, "engine", None)) is not None:
            engine.dispose()


def _open_storage(storage: str) -> Any:
    """Open a storage; SQLite takes the write lock at once, lest two processes both read that a run is waiting."""
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy import event
    from sqlalchemy.exc import ArgumentError

    if "://" not in storage:
        Path(storage).parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(storage))
    if not storage.startswith("sqlite"):
        try:
            return RDBStorage(storage)
        except (ArgumentError, ImportError) as error:  # because the kind of database, or its driver, is unknown
            reason = str(error).splitlines()[0].rstrip(".")
            raise ValueError(
                f"storage must be a database URL, such as postgresql://user:password@host/name, or the path of a "
                f"journal file, got {storage!r}: {reason}."
            ) from error
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

    Optuna decides which process gets a waiting trial. It cannot say which jobs belong to the queue, whether a job is
    there already, or which trial to take: ``enqueue_trial`` in each process enqueues a job once per process, and
    ``ask`` invents a trial where none is waiting. So one process at a time enqueues the next jobs, under a lock, and
    each process starts a waiting trial of its own jobs.

    A process writes a heartbeat every few seconds while it executes a run. A process whose heartbeat is stale for a
    minute counts as dead, and its run is executed by another one. Processes watch whether the heartbeat *changes*, so
    the clocks of two machines need not agree. Where two processes enqueue the same run, the lower trial number counts.

    Args:
        study: The study.
        storage: The study's storage.
        retry_failed: Whether failed runs are executed again.
    """

    def __init__(self, study: Study, storage: BaseStorage, retry_failed: bool = False) -> None:
        self.study = study
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(study.study_name)
        self._retry = {trial.number for trial in self.trials() if trial.state.name == "FAIL"} if retry_failed else set()
        self._seen: dict[Any, float] = {}

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

    def claim(self, jobs: Iterable[Job]) -> Trial | None:
        """Claim the first job that no process has claimed; return None if all are claimed or finished."""
        jobs = list(jobs)
        while True:
            current = self.current()
            waiting = [t for job in jobs if (t := current.get(job.key)) is not None and t.state.name == "WAITING"]
            missing = len(waiting) < _AHEAD // 2 and any(job.key not in current for job in jobs)
            if not missing and not waiting:
                return None
            enqueued = missing and self._enqueue(jobs)
            for trial in [*waiting[:1], *random.sample(waiting[1:], max(len(waiting) - 1, 0))]:
                if (claimed := self._start(trial)) is not None:
                    return claimed
            if not enqueued:  # because others are faster: they fill the queue, or have claimed what was waiting
                time.sleep(_POLL * 2 * random.random())

    def _start(self, waiting: FrozenTrial) -> Trial | None:
        """Claim this trial; return None if another process has claimed it."""
        import optuna
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, waiting.number)
        with suppress(UpdateFinishedTrialError):
            if self._storage.set_trial_state_values(trial_id, TrialState.RUNNING):
                trial = optuna.Trial(self.study, trial_id)
                trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
                return trial
        return None

    def _enqueue(self, jobs: Iterable[Job]) -> bool:
        """Enqueue the next jobs that are missing; return False if another process is enqueuing.

        The lock is a second study, as its name is unique in the storage. A process that loses its lock, taken for dead,
        may enqueue a run twice, which :meth:`current` resolves.
        """
        import optuna
        from optuna.exceptions import DuplicatedStudyError

        name = f"{self.study.study_name} (lock)"
        try:
            lock = optuna.create_study(storage=self._storage, study_name=name)
        except DuplicatedStudyError:
            self._delete_stale_lock(name)
            return False
        try:
            with self.heartbeat(lock):
                there = self.current()
                for job in [job for job in jobs if job.key not in there][:_AHEAD]:
                    self.study.enqueue_trial(job.params, user_attrs={"cell": job.cell, "seed": job.seed})
        finally:
            with suppress(KeyError):  # because another process may have found the heartbeat stale
                optuna.delete_study(study_name=name, storage=self._storage)
        return True

    def _delete_stale_lock(self, name: str) -> None:
        import optuna

        with suppress(KeyError):  # because the lock may be released at any time
            lock = optuna.load_study(study_name=name, storage=self._storage)
            if self._is_stale(("lock", self._storage.get_study_id_from_name(name), lock.user_attrs.get("alive"))):
                optuna.delete_study(study_name=name, storage=self._storage)

    def _is_stale(self, heartbeat: tuple[Any, ...]) -> bool:
        """Return True if this process has seen the same heartbeat for too long."""
        now = time.monotonic()
        return now - self._seen.setdefault(heartbeat, now) >= _GRACE

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
        for trial in self.running():
            if self._is_stale(("trial", trial.number, trial.user_attrs.get("alive"))):
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
