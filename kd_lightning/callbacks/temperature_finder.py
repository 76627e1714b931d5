"""Searching the temperature before training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from tqdm.auto import tqdm
from typing_extensions import override

from kd_lightning._lightning import data_sources
from kd_lightning.callbacks.common import (
    check_has_validation,
    find_distiller,
    find_holder,
    mean_over_ranks,
    read_metric,
)
from kd_lightning.callbacks.snapshot import Snapshot
from kd_lightning.callbacks.trial import TrialWatch, short_run
from kd_lightning.distiller import Distiller
from kd_lightning.modules.between_ranks import gather
from kd_lightning.modules.readings import naming_callbacks
from kd_lightning.ranking import (
    Lead,
    Mode,
    Scored,
    align,
    candidate_name,
    check_counts,
    check_monitor,
    checked_temperatures,
    checked_weights,
    rank,
)
from kd_lightning.schedules import as_schedule
from kd_lightning.temperature import ConstantTemperature, TemperaturePolicy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        TypeError: If an argument is of another type, or if the run has no Distiller.
        MisconfigurationException: If the run has no validation.

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
        self.candidates = checked_temperatures("candidates", candidates)
        self.kd_weights = None if kd_weights is None else checked_weights("kd_weights", kd_weights)
        check_counts(steps=steps, seeds=seeds)
        check_monitor(monitor, mode, "TemperatureFinder")
        if plot_path is not None and not isinstance(plot_path, (str, Path)):
            raise TypeError(f"plot_path must be the path of a file, or None, got {plot_path!r}.")
        self.steps = steps
        self.monitor = monitor
        self.mode: Mode = mode
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
        distiller = find_distiller(trainer, pl_module)
        check_has_validation(trainer, self)
        self._check(trainer, distiller.temperature)
        if trainer.ckpt_path is not None or trainer.global_step > 0:
            if self.best is not None:
                self._set(self.best, pl_module, distiller, multiplier=False)  # the checkpoint holds the multiplier
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
            self._set(self.best, pl_module, distiller)
        if self.plot_path is not None:
            # on every rank, because log_dir is a collective
            path = Path(trainer.log_dir or trainer.default_root_dir) / self.plot_path
            if trainer.is_global_zero:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.plot().savefig(path, dpi=150)
            rank_zero_info(f"Plot: {path}")
        if self.find_only:
            trainer.limit_train_batches = trainer.num_sanity_val_steps = 0

    def search(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try all candidates, fill :attr:`results`, and restore the run's state."""
        holder, distiller = find_holder(trainer, pl_module), find_distiller(trainer, pl_module)
        distiller.keeps_output = True
        weights = [None] if self.kd_weights is None else self.kd_weights
        self.results = [Trial(candidate, weight) for weight in weights for candidate in self.candidates]
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        callbacks = [holder] if isinstance(holder, Callback) else []
        own = [vars(distiller), *map(vars, callbacks)]
        kept = Snapshot(pl_module, trainer.optimizers, schedulers, scaler, data_sources(trainer), *own)
        bar = tqdm(
            total=len(self.results) * self.seeds * self.steps,
            desc="Finding the temperature",
            disable=trainer.progress_bar_callback is None or not trainer.is_global_zero,
        )
        with bar:
            for trial in self.results:
                for seed in range(self.seeds):
                    bar.set_postfix_str(f"{trial.name(self._unit)}, seed {seed}")
                    watch = TrialWatch(self.steps, bar.update)
                    try:
                        with short_run(trainer, [*naming_callbacks(trainer), *callbacks, watch], seed):
                            self._set(trial, pl_module, distiller)
                            trainer.fit_loop.run()
                            score = read_metric(trainer, self.monitor, self)
                    finally:
                        kept.restore()
                    trial.scores.append(mean_over_ranks(gather(trainer, score)))
                    trial.temperature = mean_over_ranks(gather(trainer, watch.temperature))

    def _check(self, trainer: Trainer, policy: TemperaturePolicy) -> None:
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

    def _set(self, trial: Trial, module: LightningModule, distiller: Distiller, multiplier: bool = True) -> None:
        policy, owns = distiller.temperature, any(child is distiller for child in module.children())
        hparams = module.hparams if owns else {}  # from which load_from_checkpoint rebuilds the module
        if isinstance(policy, ConstantTemperature):
            policy.value = trial.candidate
            if multiplier:
                policy.multiplier.fill_(1.0)
            if isinstance(hparams.get("temperature"), (int, float)):
                hparams["temperature"] = trial.candidate
        elif multiplier:
            policy.multiplier.mul_(trial.candidate)
        if trial.kd_weight is not None:
            distiller.kd_weight = as_schedule(trial.kd_weight)
            if isinstance(hparams.get("kd_weight"), (int, float)):
                hparams["kd_weight"] = trial.kd_weight

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"results": [asdict(trial) for trial in self.results]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.results = [Trial(**trial) for trial in state_dict.get("results", [])]
