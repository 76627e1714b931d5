"""Runs of several nodes on the loopback: torchrun, SLURM's variables, a killed rank, and preemption."""

from __future__ import annotations

import csv
import os
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from kd_lightning.cli import main
from kd_lightning.configuration.resume import warn_of_restarts

ROOT = Path(__file__).parents[2]
STEPS = 9  # three epochs of three steps
RUN = [
    "fit", "--config", "configs/digits.yaml", "--resume", "auto", "--trainer.max_epochs", "3",
    "--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary",
    "false", "--trainer.callbacks.save_last", "true", "--trainer.callbacks.every_n_epochs", "1",
    "--trainer.callbacks.monitor", "null",
]  # fmt: skip
TWO_NODES = ["--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", "ddp"]
TWO_NODES += ["--data.batch_size", "11"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


class Signals(Callback):
    """Sends signals to its own process before a step, once in a folder.

    Args:
        signals: The signals.
        step: The step.
        ranks: The ranks that get them.
    """

    def __init__(self, signals: list[int], step: int, ranks: list[int]) -> None:
        self.signals, self.step, self.ranks = signals, step, ranks

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        sent = Path(f"sent-{trainer.global_rank}")
        if trainer.global_step == self.step and trainer.global_rank in self.ranks and not sent.exists():
            sent.touch()
            for number in self.signals:
                os.kill(os.getpid(), number)


def sending(*signals: int, step: int, ranks: list[int]) -> list[str]:
    """Return the options that add :class:`Signals` to a run."""
    option = "--trainer.callbacks"
    settings = {"signals": [int(number) for number in signals], "step": step, "ranks": ranks}
    return [f"{option}+={__name__}.Signals", *(f"{option}.{name}={value}" for name, value in settings.items())]


def a_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def trace(folder: Path = Path()) -> list[dict[int, float]]:
    """Return the temperature of each step, by run."""
    runs = []
    for version in sorted(folder.glob("logs/digits/version_*")):
        with (version / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["temperature_student"]]
        runs.append({int(row["step"]): float(row["temperature_student"]) for row in rows})
    return runs


def weights(version: int, folder: Path = Path()) -> dict[str, torch.Tensor]:
    file = folder / f"logs/digits/version_{version}/checkpoints/last.ckpt"
    state = torch.load(file, weights_only=True)
    assert state["global_step"] == STEPS
    return state["state_dict"]


def assert_continued(uninterrupted: Path) -> None:
    """Require that the second run went on from the end of the first epoch, and has the bits of an uninterrupted one."""
    (whole,), (_, resumed) = trace(uninterrupted), trace()
    assert resumed == {step: value for step, value in whole.items() if step >= 3}
    for name, weight in weights(0, uninterrupted).items():
        assert torch.equal(weights(1)[name], weight), name


def fork(arguments: list[str], environment: dict[str, str]) -> int:
    """Run the command in a fork with further variables of the environment, and return its process."""
    if child := os.fork():
        return child
    os.environ.update(environment)
    status: Any = 1
    try:
        main(arguments)
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status if isinstance(status, int) else 1)


def srun(*more: str) -> list[int]:
    """Run two tasks on two nodes as SLURM's srun starts them, and return their statuses."""
    port = a_port()
    tasks = [
        fork(
            [*RUN, *TWO_NODES, *more],
            {
                "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "kd", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1",
                "SLURM_NNODES": "2", "SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank), "SLURM_LOCALID": "0",
                "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": port,
            },
        )
        for rank in (0, 1)
    ]  # fmt: skip
    return [os.waitstatus_to_exitcode(os.waitpid(task, 0)[1]) for task in tasks]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a ``scontrol`` that records its arguments."""
    for name in ("configs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@" >> scontrol.log\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def torchrun(folder: Path, *more: str, restarts: int = 0) -> None:
    """Run the command under two agents of torchrun, and require that both succeed."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend",
        "c10d", "--rdzv-id", "kd", "--rdzv-endpoint", f"127.0.0.1:{a_port()}", "--local-addr", "127.0.0.1",
        "--max-restarts", str(restarts), "-m", "kd_lightning", *RUN, *TWO_NODES, *more,
    ]  # fmt: skip
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agents = [subprocess.Popen(command, cwd=folder, env=environment, **pipes) for _ in (0, 1)]
    try:
        told = "".join(agent.communicate(timeout=120)[0][-3000:] for agent in agents)
    finally:
        for agent in agents:
            with suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)  # with its workers, which a timeout would leave behind
    assert [agent.returncode for agent in agents] == [0, 0], told


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two agents of torchrun that nothing interrupts."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "configs").symlink_to(ROOT / "configs")
    torchrun(folder)
    return folder


def test_two_agents_of_torchrun_are_one_run(uninterrupted: Path) -> None:
    (whole,) = trace(uninterrupted)
    assert whole.keys() == set(range(STEPS))
    assert weights(0, uninterrupted)


@pytest.mark.usefixtures("folder")
def test_a_killed_rank_ends_the_run_and_the_same_command_continues_it(uninterrupted: Path) -> None:
    killed = sending(signal.SIGKILL, step=4, ranks=[1])
    assert srun(*killed) == [1, -signal.SIGKILL]
    assert srun(*killed) == [0, 0]
    assert_continued(uninterrupted)


def test_torchrun_restarts_a_killed_rank(uninterrupted: Path, folder: Path) -> None:
    torchrun(folder, *sending(signal.SIGKILL, step=4, ranks=[1]), restarts=1)
    assert_continued(uninterrupted)


@pytest.mark.usefixtures("folder")
def test_slurm_announces_a_preemption(uninterrupted: Path) -> None:
    """SIGUSR1 writes a checkpoint and requeues the job, whose tasks then get SIGTERM."""
    announced = sending(signal.SIGUSR1, signal.SIGTERM, step=4, ranks=[0, 1])
    assert srun(*announced) == [143, 143]
    assert Path("scontrol.log").read_text() == "requeue 4711\n"
    assert srun(*announced) == [0, 0]  # as the requeued job does
    (whole,), (_, resumed) = trace(uninterrupted), trace()
    # values alone, because Lightning 2.6 logs one step more after a checkpoint that is written within a step
    assert list(resumed.values()) == list(whole.values())[4:]
    weights(1)


@pytest.mark.usefixtures("folder")
def test_sigterm_without_slurm_writes_a_checkpoint_and_is_a_failure() -> None:
    command = [*RUN, "--trainer.callbacks.save_on_exception", "true", *sending(signal.SIGTERM, step=4, ranks=[0])]
    assert os.waitstatus_to_exitcode(os.waitpid(fork(command, {}), 0)[1]) == 143
    assert os.waitstatus_to_exitcode(os.waitpid(fork(command, {}), 0)[1]) == 0
    first, second = trace()
    assert min(second) == max(first) + 1 == 5
    assert {**first, **second}.keys() == set(range(STEPS))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("job", sorted((ROOT / "configs" / "slurm").iterdir()), ids=lambda job: job.name)
def test_jobs_for_slurm_have_a_command_that_is_understood(job: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    Path("srun").chmod(0o755)
    slurm = [
        "NNODES=2",
        "NTASKS_PER_NODE=8",
        "ARRAY_TASK_COUNT=8",
        "ARRAY_TASK_ID=3",
        "JOB_ID=4711",
        f"JOB_NAME={job.stem}",
    ]
    environment = os.environ | dict(f"SLURM_{variable}".split("=") for variable in slurm)
    subprocess.run(["bash", "-eu", str(job)], check=True, env=environment)
    program, *arguments = capfd.readouterr().out.splitlines()
    assert program == "kd-lightning"
    Path("srun").unlink()  # because Lightning warns of one that is not used
    if job.stem == "fit":  # a step, because Lightning alone finds that two callbacks have the same settings
        here = {"num_nodes": "1", "devices": "1", "strategy": "auto", "fast_dev_run": "true"}
        main([*arguments, *(f"--trainer.{name}={value}" for name, value in here.items())])
        return
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert not stop.value.code


@pytest.mark.parametrize(("restarts", "shared", "world"), [("0", "True", "2"), ("3", "False", "2"), ("3", "True", "1")])
def test_restarts_that_work_are_not_warned_of(
    restarts: str, shared: str, world: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    warn_of_restarts()


@pytest.mark.usefixtures("folder")
def test_restarts_with_the_store_of_the_dead_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match=r"with --max-restarts 3, .* Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in"):
        main([*RUN, "--trainer.fast_dev_run", "true"])
