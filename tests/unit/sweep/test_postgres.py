"""A sweep and its queue on a PostgreSQL server of the test's own, and on a journal: one of three workers is killed."""

from __future__ import annotations

import csv
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from kd_lightning.cli import main
from kd_lightning.sweep import queue
from kd_lightning.sweep.queue import Job, open_queue

pytestmark = pytest.mark.slow

JOBS = [Job(f"cell {cell}", seed) for seed in range(3) for cell in range(5)]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a PostgreSQL server on the loopback, which runs as a user of its own."""
    if shutil.which("initdb") is None or shutil.which("postgres") is None:
        pytest.skip("PostgreSQL's initdb and postgres are not on the PATH")
    pytest.importorskip("psycopg2", reason="the driver psycopg2 is not installed")
    folder = Path(tempfile.mkdtemp(prefix="kd-pg-"))  # which the server's user may enter, unlike pytest's
    options: dict[str, Any] = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        pwd = pytest.importorskip("pwd")
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("root may not run PostgreSQL, and there is no user postgres")
        os.chown(folder, user.pw_uid, user.pw_gid)
        options |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = ["initdb", "-D", "data", "-U", "sweep", "-A", "trust", "--no-sync"]
    subprocess.run(made, check=True, timeout=60, **options)
    command = ["postgres", "-D", "data", "-h", "127.0.0.1", "-p", str(port), "-k", str(folder), "-F"]
    process = subprocess.Popen(command, **options)
    try:
        _wait_for(port, process)
        yield f"postgresql+psycopg2://sweep@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)  # its fast shutdown
        process.wait(30)
        shutil.rmtree(folder)


def _wait_for(port: int, process: subprocess.Popen[Any]) -> None:
    import psycopg2

    for _ in range(300):
        assert process.poll() is None, "PostgreSQL did not start"
        try:
            psycopg2.connect(host="127.0.0.1", port=port, user="sweep", dbname="postgres").close()
        except psycopg2.OperationalError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError("PostgreSQL does not accept connections")


class KillsOne(Callback):
    """Kills the first process that ends an epoch in a folder."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            Path("killed").touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


def work(storage: str, doomed: bool) -> None:
    """Claim and finish until no run is left, as each process of a sweep does; die with a run in hand if doomed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with open_queue(storage, "sweep", "maximize") as runs:
        while (trial := runs.claim(JOBS)) is not None or runs.running():
            if trial is None:
                runs.give_up_dead(lambda text: None)
                time.sleep(0.1)
                continue
            with runs.heartbeat(trial):
                if doomed:
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(0.05)
                assert runs.finish(trial.number, "COMPLETE", 1.0)


@pytest.fixture(params=["postgresql", "journal"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A storage, whose processes count as dead after few seconds."""
    monkeypatch.setattr(queue, "_GRACE", 4.0)
    monkeypatch.setattr(queue, "_BEAT", 0.5)
    return request.getfixturevalue("server") if request.param == "postgresql" else str(tmp_path / "journal.log")


def statuses(target: Callable[..., None], *arguments: tuple[Any, ...]) -> list[int | None]:
    """Run a function in one process for each tuple of arguments, and return their exit statuses."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=target, args=each) for each in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(100)
    return [worker.exitcode for worker in workers]


def test_three_workers_one_of_which_is_killed(storage: str) -> None:
    assert statuses(work, *((storage, number == 0) for number in range(3))) == [-signal.SIGKILL, 0, 0]
    with open_queue(storage, "sweep", "maximize") as runs:
        trials = runs.trials()
    done = [(t.user_attrs["cell"], t.user_attrs["seed"]) for t in trials if t.state.name == "COMPLETE"]
    assert sorted(done) == sorted(job.key for job in JOBS)  # none lost, none twice
    assert [trial.state.name for trial in trials].count("FAIL") == 1  # that of the killed worker


def test_three_commands_one_of_which_is_killed(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parents[3]
    for name in ("configs", "tests"):
        (tmp_path / name).symlink_to(root / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kd-lightning"])
    command = [
        "sweep", "--config", "configs/digits.yaml", "--trainer.max_epochs=3", "--temperatures", "1", "4",
        "--kd-weights", ".9", "--seeds", "2", "--storage", storage, "--study-name", "commands",
        f"--trainer.callbacks+={__name__}.KillsOne",
    ]  # fmt: skip
    assert sorted(map(str, statuses(main, *[(command,)] * 3))) == ["-9", "0", "0"]
    with open_queue(storage, "commands", "maximize") as runs:
        trials = runs.trials()
    done = [(t.user_attrs["cell"], t.user_attrs["seed"]) for t in trials if t.state.name == "COMPLETE"]
    assert len(done) == len(set(done)) == 6  # none lost, none twice
    with Path("sweep", "results.csv").open(newline="") as file:
        assert [row["state"] for row in csv.DictReader(file)] == ["complete"] * 6
    printed = capfd.readouterr().out
    assert printed.count("has had no heartbeat for 4 s: executed again") >= 1
    assert printed.count("best by val_acc: ") == 2  # both tell the same
