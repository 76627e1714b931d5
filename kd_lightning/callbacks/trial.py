"""A trial of a search: a short, silent run of a trainer's own fit loop."""

from __future__ import annotations

import copy
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from kd_lightning._lightning import forget_run
from kd_lightning.callbacks.common import find_distiller
from kd_lightning.modules.non_finite import NonFiniteHandler

_LOGGERS = ("lightning.pytorch", "lightning.fabric")
_SEED_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")


class TrialWatch(NonFiniteHandler):
    """A callback that ends a trial after its steps and keeps the last temperature; a trial may diverge.

    Args:
        steps: Optimiser steps of the trial.
        advance: Function of the optimiser steps since the last call.
    """

    def __init__(self, steps: int, advance: Callable[[int], Any]) -> None:
        self.steps = steps
        self.temperature = math.nan
        self._advance = advance
        self._done = 0

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self._advance(trainer.global_step - self._done)
        self._done = trainer.global_step
        if trainer.global_step >= self.steps:
            trainer.should_stop = True
        if trainer.should_stop or trainer.is_last_batch:
            output = find_distiller(trainer, pl_module).last_output
            if output is not None:
                self.temperature = output.readings()["temperature_student"].item()


@contextmanager
def short_run(trainer: Trainer, callbacks: Sequence[Callback], seed: int) -> Iterator[None]:
    """Prepare a trainer for a trial, and restore its loop, loggers, callbacks and random state afterwards.

    Lightning's learning rate finder does the same. Weights, optimisers and data are not restored.
    Run the trainer's ``fit_loop`` in the context, from ``on_fit_start``. Seed 0 keeps the run's own random state.
    """
    loop = trainer.fit_loop
    changes: list[tuple[Any, str, Any]] = [
        (trainer, "callbacks", list(callbacks)),
        (trainer, "loggers", [DummyLogger()] if trainer.loggers else []),
        (trainer, "check_val_every_n_epoch", trainer.check_val_every_n_epoch and 1),  # so that a trial validates
        (trainer, "should_stop", False),
        (trainer.state, "stage", trainer.state.stage),
        (loop, "min_epochs", 0),
        (loop.epoch_loop, "min_steps", None),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    progress = copy.deepcopy(loop.state_dict())
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        with quiet(), isolate_rng():
            if seed > 0:
                workers = bool(int(os.environ.get("PL_SEED_WORKERS") or 0))
                seed_everything(seed, workers=workers, verbose=False)
            yield
    finally:
        loop.teardown()
        for owner, name, value in before:
            setattr(owner, name, value)
        loop.load_state_dict(progress)
        forget_run(trainer)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's messages and warnings, and restore the seeds in the environment at the end."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    environment = {name: os.environ.get(name) for name in _SEED_VARIABLES}
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")  # this library's own warnings stay
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
