"""A search for the temperature before training."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from tqdm.auto import tqdm
from typing_extensions import override

from kd_lightning.callbacks.common import (
    DistillationHolder,
    find_holder,
    mean_over_ranks,
    read_metric,
)
from kd_lightning.callbacks.snapshot import Snapshot
from kd_lightning.modules.non_finite import NonFiniteHandler
from kd_lightning.modules.replicas import gather
from kd_lightning.ranking import (
    Lead,
    Mode,
    Scored,
    align,
    candidate_name,
    check_counts,
    check_monitor,
    check_temperatures,
    check_weights,
    rank,
)
from kd_lightning.schedules import as_schedule
from kd_lightning.temperature import ConstantTemperature

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TemperatureFinder", "Trial"]

_SEED_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")


@dataclass
class Trial(Scored):
    """The scores of one candidate.

    Attributes:
        candidate: The temperature, or the multiplier of a policy that is not constant.
        kd_weight: The weight it was tried with; None for the run's own.
        temperature: The student's mean temperature in the last step.
        scores: The monitored metric, one value per seed; NaN where training broke down.
    """

    candidate: float
    kd_weight: float | None
    temperature: float = math.nan
    scores: list[float] = field(default_factory=list)

    def name(self, unit: str) -> str:
        """Return the trial's name, whose candidate is of a ``"temperature"`` or a ``"multiplier"``."""
        return candidate_name(self.candidate, self.kd_weight, unit)


class TemperatureFinder(Callback):
    """A search that tries temperatures on validation data before training, and starts training with the best.

    At the start of ``fit`` each candidate trains ``steps`` optimiser steps from the same weights, optimiser, data order
    and random numbers, and is scored by ``monitor``. Then weights, optimiser, schedulers, random states, loaders,
    loggers, counters, callbacks, the policy's buffers and metrics are restored bit for bit. A run after the finder
    equals a run that was started with the suggested temperature.

    *Candidates* are temperatures for a :class:`ConstantTemperature` (``temperature: 4.0``), whose value is set. For any
    other policy they are multipliers of the policy's own temperatures, 1 being the policy as it is, and the policy's
    ``multiplier`` is set: give ``candidates=(0.25, 0.5, 1, 2, 4)``. Schedules run as in the whole run, of which the
    first ``steps`` steps are seen.

    *How noisy is the ranking?* Each candidate is trained once per seed: the first has the run's own random state, the
    others draw other data orders and dropout masks, the same for all candidates. The table shows the spread, in how
    many seeds each candidate was the best, and whether the lead over the second is more than noise. Weights start the
    same in all of them. A short search favours what learns fast, which need not be what ends best.

    Not restored: attributes that hold objects of other classes than torch's and Lightning's, the state of data sets and
    loader workers, files that the module's hooks write. Hooks of the other callbacks do not run during the search. The
    search needs memory for a second copy of weights and optimiser state.

    Args:
        candidates: Temperatures, or multipliers, one or more.
        steps: Optimiser steps per candidate and seed.
        monitor: A metric that is logged in validation; not one of the test set, and not ``val_loss`` or
            ``val_kd_loss``, which change with the temperature itself.
        mode: ``"max"`` if larger is better, ``"min"`` if smaller.
        kd_weights: Try each temperature with each of these weights too.
        seeds: Number of seeds that each candidate is trained with; 1 gives no estimate of the noise.
        plot_path: File of the plot, relative to the run's log folder; None for no plot.
        find_only: End after the search, without training.

    Raises:
        ValueError: If an argument is out of range or the metric cannot choose a temperature; at fit, if a candidate
            lies outside the policy's bounds, or validation uses the test set.
        RuntimeError: If the metric was not logged.
        TypeError: If the run has no Distiller.

    State: the results. A resumed run skips the search and takes the temperature found before.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> finder = TemperatureFinder(candidates=(2, 4, 8), steps=100, monitor="val_acc", seeds=3)
        >>> trainer = Trainer(callbacks=[finder], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        candidates: Sequence[float] = (1, 2, 4, 8, 16),
        steps: int = 200,
        monitor: str = "val_acc",
        mode: Mode = "max",
        kd_weights: Sequence[float] | None = None,
        seeds: int = 3,
        plot_path: str | None = None,
        find_only: bool = False,
    ) -> None:
        super().__init__()
        check_temperatures("candidates", tuple(candidates))
        if kd_weights is not None:
            check_weights("kd_weights", tuple(kd_weights))
        check_counts(steps=steps, seeds=seeds)
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be one of 'min', 'max', got {mode!r}.")
        check_monitor(monitor, "TemperatureFinder")
        self.candidates = [float(candidate) for candidate in candidates]
        self.steps = steps
        self.monitor = monitor
        self.mode: Mode = mode
        self.kd_weights = None if kd_weights is None else [float(weight) for weight in kd_weights]
        self.seeds = seeds
        self.plot_path = plot_path
        self.find_only = find_only
        self.results: list[Trial] = []
        self._unit = "temperature"

    # ---- results ----------------------------------------------------------------------------------------------------

    @property
    def ranking(self) -> list[Trial]:
        """Return the trials whose scores are finite, the best first."""
        return rank(self.results, self.mode)

    @property
    def best(self) -> Trial | None:
        """Return the trial with the best mean score; None before the search, or if no mean is finite."""
        return next(iter(self.ranking), None)

    def suggestion(self) -> float | None:
        """Return the best candidate: a temperature, or the multiplier of a policy that is not constant."""
        return None if self.best is None else self.best.candidate

    def plot(self) -> Figure:
        """Draw the scores over the candidates: each seed, the mean and the spread.

        Raises:
            RuntimeError: If the search has not run yet.
        """
        from kd_lightning.plotting import plot_temperature_finder

        if not self.results:
            raise RuntimeError("there is nothing to plot before the search: run trainer.fit first.")
        trials = [(trial.candidate, trial.kd_weight, trial.scores) for trial in self.results]
        return plot_temperature_finder(trials, self.monitor, self.suggestion(), unit=self._unit)

    def table(self) -> str:
        """Return the results as aligned text, followed by the suggestion and its lead.

        A spread over the seeds has columns only if there are several seeds.
        """
        choose = max if self.mode == "max" else min
        by_seed = zip(*(trial.scores for trial in self.results), strict=True)
        tops = [choose((score for score in scores if math.isfinite(score)), default=None) for scores in by_seed]
        several, weighted = len(tops) > 1, self.kd_weights is not None
        rows = [[self._unit, *["kd_weight"] * weighted, "T at the end", self.monitor]]
        rows[0] += ["std", "lowest", "highest", "best in"] * several
        for trial in self.results:
            weight = [] if trial.kd_weight is None else [f"{trial.kd_weight:g}"]
            row = [f"{trial.candidate:g}", *weight, f"{trial.temperature:.4g}", f"{trial.mean:.4f}"]
            if several:
                wins = sum(score == top for score, top in zip(trial.scores, tops, strict=True))
                finite = [score for score in trial.scores if math.isfinite(score)]
                spread = (trial.std, min(finite), max(finite)) if len(finite) == len(tops) else (None, None, None)
                row += ["–" if number is None else f"{number:.4f}" for number in spread]
                row.append(f"{wins} of {len(tops)}")
            rows.append(row)
        return "\n".join([*align(rows), self._verdict()])

    def _verdict(self) -> str:
        ranking = self.ranking
        if not ranking:
            return f"no candidate has a finite {self.monitor}: nothing is suggested"
        names = [trial.name(self._unit) for trial in ranking]
        if len(ranking) == 1:
            return f"suggestion: {names[0]}"
        lead = Lead.of(ranking[0].scores, ranking[1].scores, self.mode)
        return f"suggestion: {names[0]}; {lead.describe(names[1])}"

    # ---- the search -------------------------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        holder = find_holder(trainer, pl_module)
        self._check(trainer, holder)
        if trainer.ckpt_path is not None or trainer.global_step > 0:
            if self.best is not None:
                self._set(self.best, holder, multiplier=False)  # because the checkpoint holds the multiplier
            rank_zero_info(
                "TemperatureFinder searches nothing in a resumed run"
                + ("." if self.best is None else f": {self.best.name(self._unit)}, as found before.")
            )
            return
        self.search(trainer, pl_module)
        rank_zero_only(print)(self.table())
        if self.best is None:
            rank_zero_warn(f"no candidate has a finite {self.monitor}: TemperatureFinder leaves the temperature alone.")
        else:
            self._set(self.best, holder)
        if self.plot_path is not None:
            path = (
                Path(trainer.log_dir or trainer.default_root_dir) / self.plot_path
            )  # on every rank, because log_dir is a collective
            if trainer.is_global_zero:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.plot().savefig(path, dpi=150)
            rank_zero_info(f"Plot: {path}")
        if self.find_only:
            trainer.fit_loop.max_epochs = trainer.num_sanity_val_steps = 0

    def search(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try all candidates, fill :attr:`results`, and restore the run's state."""
        holder = find_holder(trainer, pl_module)
        weights = [None] if self.kd_weights is None else self.kd_weights
        self.results = [Trial(candidate, weight) for weight in weights for candidate in self.candidates]
        bar = tqdm(
            total=len(self.results) * self.seeds * self.steps,
            desc="Finding the temperature",
            disable=trainer.progress_bar_callback is None or not trainer.is_global_zero,
        )
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        loop = trainer.fit_loop
        sources = [loop._data_source.instance, loop.epoch_loop.val_loop._data_source.instance]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        others = [vars(holder)] if isinstance(holder, Callback) else []
        kept = Snapshot(pl_module, trainer.optimizers, schedulers, scaler, sources, others, vars(holder.distiller))
        with bar:
            for trial in self.results:
                for seed in range(self.seeds):
                    stop = _StopAfter(self.steps, bar)
                    try:
                        with _aside(trainer, holder, stop), isolate_rng(), _seeded(seed):
                            self._set(trial, holder)
                            trainer.fit_loop.run()
                            score = read_metric(trainer, self.monitor, self)
                            trainer.fit_loop.teardown()
                    finally:
                        kept.restore()
                    trial.scores.append(mean_over_ranks(gather(trainer, score)))
                    trial.temperature = mean_over_ranks(gather(trainer, stop.temperature))

    def _check(self, trainer: Trainer, holder: DistillationHolder) -> None:
        policy = holder.distiller.temperature
        if isinstance(policy, ConstantTemperature):
            outside = [c for c in self.candidates if not policy.min_temperature <= c <= policy.max_temperature]
            if outside:
                raise ValueError(
                    f"candidates must lie within the policy's bounds [{policy.min_temperature:g}, "
                    f"{policy.max_temperature:g}], got {', '.join(f'{c:g}' for c in outside)}."
                )
        else:
            self._unit = "multiplier"
        datamodule = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]  (set by a connector)
        held = {} if datamodule is None else vars(datamodule)
        tests = [value for name, value in held.items() if name.lstrip("_").startswith("test") and value is not None]
        if any(value is test for name, value in held.items() if name.lstrip("_").startswith("val") for test in tests):
            raise ValueError(
                f"{type(datamodule).__name__} validates on its test set, and TemperatureFinder does not choose on "
                "that. Take validation data out of the training part."
            )

    def _set(self, trial: Trial, holder: DistillationHolder, multiplier: bool = True) -> None:
        distiller, policy = holder.distiller, holder.distiller.temperature
        if isinstance(policy, ConstantTemperature):
            policy.value = trial.candidate
            if multiplier:
                policy.multiplier.fill_(1.0)
            _update_hparam(holder, "temperature", trial.candidate)
        elif multiplier:
            policy.multiplier.mul_(trial.candidate)
        if trial.kd_weight is not None:
            distiller.kd_weight = as_schedule(trial.kd_weight)
            _update_hparam(holder, "kd_weight", trial.kd_weight)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"results": [asdict(trial) for trial in self.results]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.results = [Trial(**trial) for trial in state_dict.get("results", [])]


class _StopAfter(NonFiniteHandler):
    """A callback that ends a trial, and keeps the last temperature; a trial may diverge, and its score says so."""

    def __init__(self, steps: int, bar: tqdm[Any]) -> None:
        self.steps = steps
        self.bar = bar
        self.temperature = math.nan
        self._done = 0

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self.bar.update(trainer.global_step - self._done)
        self._done = trainer.global_step
        if trainer.global_step >= self.steps:
            trainer.should_stop = True
        if trainer.should_stop or trainer.is_last_batch:
            output = find_holder(trainer, pl_module).last_output
            if output is not None:
                self.temperature = output.readings()["temperature_student"].item()


@contextmanager
def _aside(trainer: Trainer, holder: DistillationHolder, stop: _StopAfter) -> Iterator[None]:
    """Give a trial loops, loggers and callbacks of its own, so that the run's are not affected."""
    kept, stage = dict(vars(trainer)), trainer.state.stage
    run = trainer.fit_loop
    loop = _FitLoop(trainer, min_epochs=0, max_epochs=run.max_epochs)
    loop.epoch_loop = _TrainingEpochLoop(trainer, max_steps=run.max_steps)  # schedules are those of the whole run
    loop._data_source = run._data_source
    loop.epoch_loop.val_loop._data_source = run.epoch_loop.val_loop._data_source
    trainer.fit_loop = loop
    trainer.loggers = [DummyLogger()] if trainer.loggers else []
    trainer._logger_connector = _LoggerConnector(trainer)
    trainer.callbacks = [*([holder] if isinstance(holder, Callback) else []), stop]  # pyright: ignore
    if trainer.check_val_every_n_epoch is not None:  # a trial ends with a validation, wherever it ends
        trainer.check_val_every_n_epoch = 1
    try:
        yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(kept)
        trainer.state.stage = stage


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed random numbers and distributed samplers; seed 0 keeps the run's own random state."""
    kept = {name: os.environ.get(name) for name in _SEED_VARIABLES}
    if seed > 0:
        seed_everything(seed, workers=bool(int(kept["PL_SEED_WORKERS"] or 0)), verbose=False)
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _update_hparam(holder: DistillationHolder, name: str, value: float) -> None:
    """Update a numeric hyper-parameter, from which ``load_from_checkpoint`` rebuilds the module."""
    if isinstance(holder, LightningModule) and isinstance(holder.hparams.get(name), (int, float)):
        holder.hparams[name] = value
