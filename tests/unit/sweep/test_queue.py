from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from kd_lightning.sweep import queue
from kd_lightning.sweep.queue import Job, RunQueue, open_queue

pytestmark = pytest.mark.slow

JOBS = [Job(f"cell {cell}", seed) for seed in range(3) for cell in range(4)]


@pytest.fixture(params=["sqlite", "journal"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'sweep.db'}" if request.param == "sqlite" else str(tmp_path / "journal.log")


@pytest.fixture
def runs(storage: str) -> Iterator[RunQueue]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with open_queue(storage, "sweep", "maximize") as runs:
        yield runs


def work(storage: str, found: Any) -> None:
    """Open the study, enqueue all jobs, and finish those that can be claimed, as each process of a sweep does."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with open_queue(storage, "sweep", "maximize") as runs:
        while (trial := runs.claim(JOBS)) is not None:
            found.put((trial.user_attrs["cell"], trial.user_attrs["seed"]))
            time.sleep(0.01)
            assert runs.finish(trial.number, "COMPLETE", 1.0)
        found.put(None)


def test_processes_that_start_together_share_the_jobs(storage: str) -> None:
    context = multiprocessing.get_context("fork")
    found: Any = context.Queue()
    processes = [context.Process(target=work, args=(storage, found)) for _ in range(3)]
    for process in processes:
        process.start()
    done, ended = [], 0
    while ended < len(processes):
        key = found.get(timeout=120)
        ended += key is None
        done += [] if key is None else [key]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(done) == sorted((job.cell, job.seed) for job in JOBS)  # each once
    assert put_in(storage) == len(JOBS)


def put_in(storage: str) -> int:
    """Count the trials that were enqueued, and check that no lock is left."""
    with open_queue(storage, "sweep", "maximize") as runs:
        assert optuna.get_all_study_names(runs.study._storage) == ["sweep"]
        return sum("cell" in trial.user_attrs for trial in runs.trials())


def test_one_process_at_a_time_enqueues(storage: str) -> None:
    """Processes that look at the same moment, each of which enqueued all jobs without a lock."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=claim, args=(storage, barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert put_in(storage) == len(JOBS)


def claim(storage: str, barrier: Any) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with open_queue(storage, "sweep", "maximize") as runs:
        barrier.wait(60)
        assert runs.claim(JOBS) is not None


def test_few_jobs_wait_at_a_time(runs: RunQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage reads every waiting trial at each claim, so that 1,000 of them cost a second."""
    monkeypatch.setattr(queue, "_AHEAD", 4)
    done = []
    while (trial := runs.claim(JOBS)) is not None:
        assert sum(trial.state.name == "WAITING" for trial in runs.trials()) <= 4
        done.append((trial.user_attrs["cell"], trial.user_attrs["seed"]))
        runs.finish(trial.number, "COMPLETE", 1.0)
    assert done == [job.key for job in JOBS]


def test_the_lock_of_a_dead_process_is_deleted(storage: str, runs: RunQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "_GRACE", 0.5)
    optuna.create_study(storage=runs.study._storage, study_name="sweep (lock)").set_user_attr("alive", 3)
    assert runs.claim(JOBS) is not None
    assert put_in(storage) == len(JOBS)


def test_a_dead_process_is_found_by_its_silence(runs: RunQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "_GRACE", 0.6)
    monkeypatch.setattr(queue, "_BEAT", 0.1)
    dead, alive = runs.claim(JOBS[:2]), runs.claim(JOBS[:2])
    assert dead is not None
    assert alive is not None
    said: list[str] = []
    with runs.heartbeat(alive):
        for _ in range(10):
            runs.give_up_dead(said.append)
            time.sleep(0.1)
    assert len(said) == 1
    assert f"run {dead.number} " in said[0]
    assert [trial.number for trial in runs.running()] == [alive.number]
    again = runs.claim(JOBS[:2])
    assert again is not None
    assert again.user_attrs["cell"] == JOBS[0].cell
    assert not runs.finish(dead.number, "COMPLETE", 1.0)  # back from the dead: too late
    assert runs.finish(again.number, "COMPLETE", 1.0)


def test_failed_runs_are_kept_and_interrupted_ones_are_not(runs: RunQueue) -> None:
    failed, interrupted = runs.claim(JOBS[:2]), runs.claim(JOBS[:2])
    assert failed is not None
    assert interrupted is not None
    failed.set_user_attr("reason", "ValueError: no")
    runs.finish(failed.number, "FAIL")
    runs.give_up(interrupted.number)
    again = runs.claim(JOBS[:2])
    assert again is not None
    assert again.user_attrs["cell"] == JOBS[1].cell
    assert runs.claim(JOBS[:2]) is None
    retrying = RunQueue(runs.study, runs.study._storage, retry_failed=True)
    retried = retrying.claim(JOBS[:2])
    assert retried is not None
    assert retried.user_attrs["cell"] == JOBS[0].cell


def test_jobs_of_another_command_stay_waiting(runs: RunQueue) -> None:
    first = runs.claim(JOBS[:3])
    other = runs.claim(JOBS[2:4])
    assert first is not None
    assert other is not None
    assert [trial.user_attrs["cell"] for trial in (first, other)] == [JOBS[0].cell, JOBS[2].cell]
    cells = [trial.user_attrs["cell"] for trial in (runs.claim(JOBS[:3]), runs.claim(JOBS[:4])) if trial is not None]
    assert cells == [JOBS[1].cell, JOBS[3].cell]
    assert runs.claim(JOBS[:4]) is None
