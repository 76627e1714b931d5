"""Resuming from the command line: the checkpoint to continue from, among those of earlier runs of the same logger."""

from __future__ import annotations

import os
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from kd_lightning.configuration.written import CommandLineError
from kd_lightning.modules.checkpoint_settings import read_checkpoint


def check_one_start(resume: str | None, ckpt_path: str | None) -> None:
    """Raise if both ``--resume`` and ``--ckpt_path`` name the checkpoint to start from."""
    if resume is not None and ckpt_path is not None:
        raise CommandLineError(
            f"--resume {resume} finds the checkpoint by itself, but --ckpt_path {ckpt_path} names one as well. Leave "
            "one of them out."
        )


def checkpoint_to_resume(trainer: Trainer, resume: str | None, ckpt_path: str | None) -> str | None:
    """Return the checkpoint that ``fit`` starts from, or None for a fresh start.

    ``--ckpt_path last`` of Lightning looks in the new run's folder, which is empty at this point.
    """
    check_one_start(resume, ckpt_path)
    if resume is None and ckpt_path != "last":
        return ckpt_path
    found = newest_checkpoint(trainer)
    if found is None and resume is None:
        raise _nothing_found("last", trainer, "use --resume auto, which starts afresh where there is none")
    if found is None:
        rank_zero_info("--resume auto: no checkpoint of an earlier run, a fresh start.")
        return None
    rank_zero_info(f"Resuming from {found}, after {_steps(found)} optimizer steps.")
    return str(found)


def checkpoint_to_measure(trainer: Trainer, which: str) -> str:
    """Return the newest run's last checkpoint, or the best of those that it kept.

    Lightning finds neither but in the process that trained.
    """
    found = newest_checkpoint(trainer)
    if found is not None and which == "best":
        states = [state for state in read_checkpoint(found).get("callbacks", {}).values() if isinstance(state, dict)]
        states.sort(key=lambda state: state.get("monitor") is None)  # one without a monitor names the newest
        named = [Path(path) for state in states if (path := state.get("best_model_path"))]
        found = next(
            (path for path in (*named, *(found.with_name(path.name) for path in named)) if path.exists()), None
        )
    if found is None:
        raise _nothing_found(which, trainer, "train first, with a ModelCheckpoint")
    rank_zero_info(f"Measuring {found}.")
    return str(found)


def warn_of_restarts() -> None:
    """Warn if torchrun is to restart workers that would find the addresses of dead ones.

    torch, up to 2.15 at least, starts them with the store of the former workers (pytorch issue 135712). A worker that
    reads an address before its owner has written it anew connects to a dead process: an error, or a wait without end.
    A single worker reads no other's address.
    """
    environment = os.environ
    restarts, ranks = (int(environment.get(name, 0)) for name in ("TORCHELASTIC_MAX_RESTARTS", "WORLD_SIZE"))
    if restarts and ranks > 1 and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        rank_zero_warn(
            f"torchrun may fail to restart this run after a failure: with --max-restarts {restarts}, new workers look "
            "for the dead ones' addresses, and fail or hang. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's "
            "environment, and start it with --rdzv-backend c10d or --standalone."
        )


def _nothing_found(which: str, trainer: Trainer, way_out: str) -> CommandLineError:
    folders = " or ".join(str(folder) for folder in _run_folders(trainer))
    kind = "best checkpoint" if which == "best" else "checkpoint"
    return CommandLineError(
        f"--ckpt_path {which}: there is no {kind} of an earlier run in {folders}. Name the file, or {way_out}."
    )


def newest_checkpoint(trainer: Trainer) -> Path | None:
    """Return the checkpoint of the most steps in the latest run of this trainer's logger that has a readable one.

    A file that a killed process left half-written is passed over. What Lightning writes to the trainer's
    ``default_root_dir`` when SLURM announces a preemption, ``hpc_ckpt_1.ckpt``, counts as a run of its own.
    """
    folders: dict[Path, list[Path]] = {}
    for root in _run_folders(trainer):
        for path in root.rglob("*.ckpt"):
            folders.setdefault(path.parent, []).append(path)
    if preempted := list(Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt")):
        folders.setdefault(Path(trainer.default_root_dir), preempted)
    latest = sorted(folders.values(), key=lambda paths: max(path.stat().st_mtime_ns for path in paths), reverse=True)
    for paths in latest:
        steps = {path: _steps(path) for path in paths}
        if readable := [path for path in paths if steps[path] >= 0]:
            return max(readable, key=lambda path: (steps[path], path.stat().st_mtime_ns))
    return None


def _run_folders(trainer: Trainer) -> list[Path]:
    """Return the folders that hold the checkpoints of the trainer's runs."""
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    given = [Path(callback.dirpath) for callback in callbacks if callback.dirpath is not None]
    if given:
        return list(dict.fromkeys(given))
    if not trainer.loggers:
        return [Path(trainer.default_root_dir) / "checkpoints"]
    logger = trainer.loggers[0]
    return [Path(logger.save_dir or trainer.default_root_dir) / str(logger.name)]


def _steps(path: Path) -> int:
    """Return the optimiser steps of a checkpoint, −1 where the file cannot be read."""
    try:
        return int(read_checkpoint(path / "meta.pt" if path.is_dir() else path)["global_step"])
    except Exception:  # torch, pickle and zipfile each have errors of their own for a damaged file
        return -1
