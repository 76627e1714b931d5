from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from kd_lightning.sweep import queue
from kd_lightning.sweep.queue import Job, RunQueue, open_study

pytestmark = pytest.mark.slow

JOBS = [Job(f"cell {cell}", seed) for seed in range(3) for cell in range(4)]


@pytest.fixture(params=["sqlite", "journal"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'sweep.db'}" if request.param == "sqlite" else str(tmp_path / "journal.log")


@pytest.fixture
def runs(storage: str) -> Iterator[RunQueue]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with open_study(storage, "sweep", "maximize", None, None) as study:
        yield RunQueue(study)


def work(storage: str, found: Any) -> None:
    """Open the study, enqueue all jobs, and finish those that can be claimed, as each process of a sweep does."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with open_study(storage, "sweep", "maximize", None, None) as study:
        runs = RunQueue(study)
        runs.put(JOBS)
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
    with open_study(storage, "sweep", "maximize", None, None) as study:
        assert optuna.get_all_study_names(study._storage) == ["sweep"]
        return sum("cell" in trial.user_attrs for trial in study.get_trials())


def test_one_process_at_a_time_enqueues(storage: str) -> None:
    """Processes that check at the same moment, each of which enqueued all jobs without a lock."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=put, args=(storage, barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert put_in(storage) == len(JOBS)


def put(storage: str, barrier: Any) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with open_study(storage, "sweep", "maximize", None, None) as study:
        barrier.wait(60)
        RunQueue(study).put(JOBS)


def test_the_lock_of_a_dead_process_is_deleted(storage: str, runs: RunQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "_GRACE", 0.5)
    optuna.create_study(storage=runs.study._storage, study_name="sweep (lock)").set_user_attr("alive", 3)
    runs.put(JOBS)
    assert put_in(storage) == len(JOBS)


def test_a_dead_process_is_found_by_its_silence(runs: RunQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "_GRACE", 0.6)
    monkeypatch.setattr(queue, "_BEAT", 0.1)
    runs.put(JOBS[:2])
    dead, alive = runs.claim(JOBS), runs.claim(JOBS)
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
    runs.put(JOBS[:2])
    again = runs.claim(JOBS)
    assert again is not None
    assert again.user_attrs["cell"] == JOBS[0].cell
    assert not runs.finish(dead.number, "COMPLETE", 1.0)  # back from the dead: too late
    assert runs.finish(again.number, "COMPLETE", 1.0)


def test_failed_runs_are_kept_and_interrupted_ones_are_not(runs: RunQueue) -> None:
    runs.put(JOBS[:2])
    failed, interrupted = runs.claim(JOBS), runs.claim(JOBS)
    assert failed is not None
    assert interrupted is not None
    failed.set_user_attr("reason", "ValueError: no")
    runs.finish(failed.number, "FAIL")
    runs.give_up(interrupted.number)
    runs.put(JOBS[:2])
    again = runs.claim(JOBS)
    assert again is not None
    assert again.user_attrs["cell"] == JOBS[1].cell
    assert runs.claim(JOBS) is None
    retrying = RunQueue(runs.study, retry_failed=True)
    retrying.put(JOBS[:2])
    retried = retrying.claim(JOBS)
    assert retried is not None
    assert retried.user_attrs["cell"] == JOBS[0].cell


def test_jobs_of_another_command_stay_waiting_or_come_back(runs: RunQueue) -> None:
    runs.put(JOBS[:3])
    only = runs.claim(JOBS[2:3])
    assert only is not None
    assert only.user_attrs["cell"] == JOBS[2].cell
    runs.put(JOBS[:3])
    cells = [trial.user_attrs["cell"] for trial in (runs.claim(JOBS), runs.claim(JOBS)) if trial is not None]
    assert cells == [JOBS[0].cell, JOBS[1].cell]
