"""Who runs what: a study whose runs several processes share, none of them twice."""

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

_BEAT = 5.0  # seconds between two signs of life of a run
_GRACE = 60.0  # seconds without one after which its process counts as dead


@dataclass(frozen=True)
class Job:
    """One run to do: a cell of the grid (None: the baseline, "…": whatever the sampler suggests) with one seed."""

    cell: str
    seed: int
    params: dict[str, float] = field(default_factory=dict, compare=False)


@contextmanager
def open_study(storage: str, name: str, direction: str, sampler: Any, pruner: Any) -> Iterator[Study]:
    """Open or create a study, and close it. ``storage``: a URL of a database, or the path of a journal file."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    options: dict[str, Any] = {"direction": direction, "sampler": sampler, "pruner": pruner, "load_if_exists": True}
    attempt, opened, study = 0, None, None
    while study is None:
        try:
            opened = _open_storage(storage)
            study = optuna.create_study(storage=opened, study_name=name, **options)
        except (SQLAlchemyError, sqlite3.OperationalError):  # another process makes the tables at this moment
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
    """SQLite's transactions take the write lock at once: else two processes could both read that a run is free."""
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
    opened.engine.dispose()  # the connections of before
    return opened


def _set_up(connection: Any) -> None:
    """We begin transactions ourselves; and a commit does not wait for the disk, which a crash of a process survives."""
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


class RunQueue:
    """Runs as trials of a study: waiting, claimed by one process, finished.

    A process that runs a trial gives a sign of life every few seconds; one without a sign for a minute is dead, and its
    run is given to another. The watcher sees whether the sign *changes*, so that the clocks of two machines need not
    agree. Where two processes put in the same run, the one with the lower number counts.

    Args:
        study: The study.
        retry_failed: Whether runs that failed are done again.
    """

    def __init__(self, study: Study, retry_failed: bool = False) -> None:
        self.study = study
        self._retry = {trial.number for trial in self.trials() if trial.state.name == "FAIL"} if retry_failed else set()
        self._seen: dict[tuple[int, Any], float] = {}

    def trials(self) -> list[FrozenTrial]:
        """All trials, as they are now."""
        return self.study.get_trials(deepcopy=False)

    def current(self) -> dict[tuple[str, int], FrozenTrial]:
        """For each cell and seed the trial that counts: given up and repeated ones are left out."""
        found: dict[tuple[str, int], FrozenTrial] = {}
        for trial in self.trials():
            cell, seed = trial.user_attrs.get("cell"), trial.user_attrs.get("seed")
            given_up = trial.state.name == "FAIL" and "reason" not in trial.user_attrs
            if cell is not None and seed is not None and not given_up and trial.number not in self._retry:
                found.setdefault((cell, seed), trial)
        return found

    def put(self, jobs: Iterable[Job]) -> None:
        """Put in the jobs that nobody has put in."""
        there = self.current()
        for job in jobs:
            if (job.cell, job.seed) not in there:
                self.study.enqueue_trial(job.params, user_attrs={"cell": job.cell, "seed": job.seed})

    def claim(self, jobs: Iterable[Job]) -> Trial | None:
        """Take the next waiting job of these; None if there is none."""
        wanted = {(job.cell, job.seed) for job in jobs}
        while any(key in wanted and trial.state.name == "WAITING" for key, trial in self.current().items()):
            trial = self.study.ask()
            key = (trial.user_attrs.get("cell"), trial.user_attrs.get("seed"))
            owner = self.current().get(key)  # pyright: ignore[reportArgumentType]
            if key in wanted and owner is not None and owner.number == trial.number:
                trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
                return trial
            self.give_up(trial.number)  # somebody else's, or one that ask() made because nothing was waiting
        return None

    def running(self) -> list[FrozenTrial]:
        """The runs that a process has claimed and not finished."""
        return [trial for trial in self.current().values() if trial.state.name == "RUNNING"]

    @contextmanager
    def signs_of_life(self, trial: Trial) -> Iterator[None]:
        """While this lasts, other processes see that the trial is being run."""
        stop = threading.Event()

        def beat() -> None:
            count = 0
            while not stop.wait(_BEAT):
                count += 1
                with suppress(Exception):  # a database that is busy, a trial that was given up: the next one will do
                    trial.set_user_attr("alive", count)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def give_up_dead(self, say: Callable[[str], None]) -> None:
        """Give up the runs of processes without a sign of life."""
        now = time.monotonic()
        for trial in self.running():
            sign = (trial.number, trial.user_attrs.get("alive"))
            if now - self._seen.setdefault(sign, now) >= _GRACE:
                worker = trial.user_attrs.get("worker", "unknown")
                say(f"run {trial.number} of process {worker} has shown no sign of life for {_GRACE:g} s: done again")
                self.give_up(trial.number)

    def give_up(self, number: int) -> None:
        """Let somebody else have this run."""
        self.finish(number, "FAIL")

    def finish(self, number: int, state: str, value: float | None = None) -> bool:
        """Record the end of a run; False if somebody else has ended it already."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            self.study.tell(number, value, state=TrialState[state])
        except (ValueError, UpdateFinishedTrialError):
            return False
        return True
