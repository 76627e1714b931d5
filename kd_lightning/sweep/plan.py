"""The plan of a sweep: its cells, its jobs, and the settings that must not change between two starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_lightning.ranking import Mode
from kd_lightning.sweep.queue import Job
from kd_lightning.sweep.run import Setting

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

BASELINE = "no teacher"


@dataclass(frozen=True)
class Plan:
    """The arguments of a sweep.

    Attributes:
        config: The resolved configuration.
        folder: The sweep's folder.
        monitor: The validation metric.
        mode: ``"max"`` if larger is better, ``"min"`` if smaller.
        task_weight: The task term's weight in every cell; None for 1 − kd_weight.
        multiply: Whether the temperatures multiply the configuration's policy.
        temperatures: The grid's temperatures, or the range of a sampler.
        kd_weights: The grid's weights, or the range of a sampler.
        seeds: The seeds of each cell.
        baseline: Whether the student is trained without the teacher too.
        suggestions: Number of cells that the sampler suggests; None for the grid.
    """

    config: dict[str, Any]
    folder: Path
    monitor: str
    mode: Mode
    task_weight: float | None
    multiply: bool
    temperatures: list[float]
    kd_weights: list[float]
    seeds: range
    baseline: bool
    suggestions: int | None

    @property
    def cells(self) -> list[str]:
        """Return the cells' names, the baseline last."""
        if self.suggestions is None:
            cells = list(self._grid())
        else:
            cells = [f"suggestion {number}" for number in range(1, self.suggestions + 1)]
        return [*cells, *([BASELINE] if self.baseline else [])]

    def jobs(self, trials: Iterable[FrozenTrial]) -> list[Job]:
        """Return all jobs, seed by seed; a suggested cell has only its first seed until that seed has been started."""
        known = {**self._grid(), BASELINE: {}}
        for trial in trials:
            if len(trial.params) == 2:
                known.setdefault(trial.user_attrs.get("cell", ""), dict(trial.params))
        return [
            Job(cell, seed, known.get(cell, {}))
            for seed in self.seeds
            for cell in self.cells
            if cell in known or seed == self.seeds[0]
        ]

    def suggest(self, trial: Trial) -> None:
        """Let the study set temperature and weight of a trial that is not the baseline's."""
        if trial.user_attrs["cell"] != BASELINE:
            trial.suggest_float("temperature", min(self.temperatures), max(self.temperatures), log=True)
            trial.suggest_float("kd_weight", min(self.kd_weights), max(self.kd_weights))

    def setting(self, trial: Trial | FrozenTrial) -> Setting:
        """Return the changes that the trial's run makes to the configuration."""
        seed = trial.user_attrs["seed"]
        if trial.user_attrs["cell"] == BASELINE:
            return Setting(None, 0.0, 1.0, seed)
        temperature, kd_weight = trial.params["temperature"], trial.params["kd_weight"]
        task_weight = 1.0 - kd_weight if self.task_weight is None else self.task_weight
        return Setting(temperature, kd_weight, round(task_weight, 12), seed, self.multiply)

    def _grid(self) -> dict[str, dict[str, float]]:
        return {
            f"temperature {t!r}, kd_weight {w!r}": {"temperature": t, "kd_weight": w}
            for t in self.temperatures
            for w in self.kd_weights
        }


def comparable(config: dict[str, Any], multiply: bool, **others: Any) -> dict[str, Any]:
    """Return what must not change between two starts of a sweep, as dotted names and their values.

    A policy that the temperatures ``multiply`` must not change either.
    """
    kept = json.loads(json.dumps(config))
    for name in ("logger", "default_root_dir", "enable_progress_bar", "enable_model_summary"):
        kept["trainer"].pop(name, None)
    for name in ("kd_weight", "task_weight", *(() if multiply else ("temperature",))):
        kept["model"]["init_args"].pop(name, None)
    return _flat({**others, "multiply": multiply, **kept})


def refuse_changes(study: Study, settings: dict[str, Any]) -> None:
    """Store the settings and their fingerprint in a new study, and compare them with those of an existing one."""
    before = study.user_attrs.get("settings")
    if before is None:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        study.set_user_attr("settings", settings)
        study.set_user_attr("fingerprint", digest)
    elif before != settings:
        names = sorted(name for name in {*before, *settings} if before.get(name, ...) != settings.get(name, ...))
        changes = [f"{name} {before.get(name, 'not set')} → {settings.get(name, 'not set')}" for name in names]
        raise ValueError(
            f"the study {study.study_name!r} was started with another configuration, and its runs could not be "
            f"compared: {'; '.join(changes)}. Go on with the former one, or start another sweep: --output, or "
            "--study-name."
        )


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else None
    if not items:
        return {prefix: config}
    flat: dict[str, Any] = {}
    for name, value in items:
        flat |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return flat
