"""Measure the queue of a sweep: workers that claim and finish jobs, some of which are killed while they hold one.

    python benchmarks/sweep_queue.py --storage postgresql+psycopg2://user@127.0.0.1/sweep --workers 64 --jobs 1000 \\
        --kill 8 --seconds 20
    python benchmarks/sweep_queue.py --storage out/journal.log --workers 8 --jobs 200

Prints wall time per job, and the median and the 95th percentile of the time of one claim. A job sleeps for about
``--seconds``; 0 is the queue's own throughput. Fails if a job is lost or finished twice.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import time
from typing import Any

import optuna

from kd_lightning.sweep import queue
from kd_lightning.sweep.queue import Job, open_queue


def work(storage: str, jobs: list[Job], seconds: float, doomed: bool, start: Any, found: Any) -> None:
    """Claim and finish until none is left, as each process of a sweep does."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    start.wait()
    with open_queue(storage, "stress", "maximize") as runs:
        while True:
            before = time.perf_counter()
            trial = runs.claim(jobs)
            if trial is None:
                if not runs.running():
                    break
                runs.give_up_dead(lambda text: None)
                time.sleep(0.2)
                continue
            with runs.heartbeat(trial):
                took = time.perf_counter() - before
                found.put(took)
                if doomed:
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(seconds * random.uniform(0.5, 1.5))
                runs.finish(trial.number, "COMPLETE", 1.0)
    found.put(None)


def main() -> None:
    """Run the workers and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", required=True)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--kill", type=int, default=0, help="workers that are killed while they hold their first job")
    parser.add_argument("--grace", type=float, default=5.0, help="seconds until a silent worker counts as dead")
    args = parser.parse_args()
    queue._GRACE, queue._BEAT = args.grace, min(queue._BEAT, args.grace / 4)
    jobs = [Job(f"cell {i // 5}", i % 5) for i in range(args.jobs)]
    context = multiprocessing.get_context("fork")
    found, start = context.SimpleQueue(), context.Event()
    workers = [
        context.Process(target=work, args=(args.storage, jobs, args.seconds, i < args.kill, start, found))
        for i in range(args.workers)
    ]
    for worker in workers:
        worker.start()
    start.set()
    began, claims, ended = time.perf_counter(), [], 0
    while ended < args.workers - args.kill:
        took = found.get()
        ended += took is None
        claims += [] if took is None else [took]
    took = time.perf_counter() - began
    with open_queue(args.storage, "stress", "maximize") as runs:
        states = [trial.state.name for trial in runs.trials()]
        trials = [trial for trial in runs.trials() if trial.state.name == "COMPLETE"]
    keys = [(t.user_attrs["cell"], t.user_attrs["seed"]) for t in trials]
    print(
        f"{args.workers} workers, {args.jobs} jobs, {args.kill} killed: {took:.1f} s, "
        f"{took / args.jobs * 1000:.0f} ms a job"
    )
    claims.sort()
    print(
        f"claim: median {claims[len(claims) // 2] * 1000:.0f} ms, 95 % {claims[int(len(claims) * 0.95)] * 1000:.0f} ms"
    )
    print(f"complete {len(keys)}, distinct {len(set(keys))}, given up {states.count('FAIL')}")
    assert sorted(set(keys)) == sorted(job.key for job in jobs), "a job was lost"
    assert len(keys) == len(set(keys)), "a job was finished twice"


if __name__ == "__main__":
    main()
