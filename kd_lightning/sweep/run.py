"""A single run of a sweep: train or test a configuration with its temperature, weights and seed."""

from __future__ import annotations

import copy
import gc
import json
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from typing_extensions import override

from kd_lightning.configuration.parser import KDLightningCLI, find_checkpoints
from kd_lightning.modules.distillation import DistillationModule
from kd_lightning.modules.readings import metric_name, naming_callbacks

PARTS = ("seed_everything", "num_threads", "trainer", "model", "data")


class Parts(KDLightningCLI):
    """The model, data and trainer of a configuration, without a subcommand."""

    model: DistillationModule

    def __init__(self, config: Mapping[str, Any] | Sequence[str]) -> None:
        super().__init__(
            args=config if isinstance(config, dict) else list(config),  # pyright: ignore[reportArgumentType]
            run=False,
            save_config_callback=None,
            seed_everything_default=42,
            auto_configure_optimizers=False,
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.config = parser.parse_object(args) if isinstance(args, dict) else parser.parse_args(args)  # pyright: ignore
        find_checkpoints(self.config, [] if self.written is None else self.written.files)


@dataclass(frozen=True)
class Setting:
    """The changes that a run makes to the configuration.

    Attributes:
        temperature: The temperature; None for the configuration's own.
        kd_weight: Weight of the distillation term; 0 in the baseline.
        task_weight: Weight of the task term.
        seed: Seed of weights, data order and all other randomness except the split of the data.
        multiply: Whether the temperature multiplies the configuration's policy instead of replacing it.
    """

    temperature: float | None
    kd_weight: float
    task_weight: float
    seed: int
    multiply: bool = False

    def build(self, config: dict[str, Any], folder: Path, logs: bool) -> Parts:
        """Build the freshly seeded model, data and trainer of the run, without progress bar and with its own folder."""
        config = copy.deepcopy(config)
        config["seed_everything"] = self.seed
        arguments = config["model"]["init_args"]
        arguments |= {"kd_weight": self.kd_weight, "task_weight": self.task_weight}
        if self.temperature is not None and not self.multiply:
            arguments["temperature"] = self.temperature
        logger = {"save_dir": str(folder), "name": "", "version": ""}
        config["trainer"] |= {
            "logger": logs and {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": logger},
            "default_root_dir": str(folder),
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        parts = Parts(config)
        if self.temperature is not None and self.multiply:
            parts.model.distiller.temperature.multiplier.fill_(self.temperature)
        return parts


def resolve(config: str | Path | Sequence[str | Path] | Mapping[str, Any]) -> tuple[dict[str, Any], Parts]:
    """Resolve a configuration to primitives with all defaults, and build its parts."""
    if isinstance(config, Mapping):
        if "model" not in config:
            raise ValueError(f"a sweep's configuration has a model, got the sections {', '.join(config) or 'none'}.")
        parts = Parts({name: config[name] for name in PARTS if name in config})
    else:
        files = [config] if isinstance(config, (str, Path)) else config
        if not isinstance(files, Sequence) or not files or not all(isinstance(file, (str, Path)) for file in files):
            raise TypeError(f"config must be the path of a YAML file, several of them, or a mapping, got {config!r}.")
        for file in files:
            if not Path(file).is_file():
                raise FileNotFoundError(f"there is no configuration at {str(file)!r} (from the folder {Path.cwd()}).")
        parts = Parts([part for file in files for part in ("--config", str(file))])
    if not isinstance(parts.model, DistillationModule):
        raise TypeError(f"a sweep needs the configuration of a DistillationModule, got {type(parts.model).__name__}.")
    if parts.trainer.world_size > 1:
        raise ValueError(
            f"each run of a sweep has one device, but the configuration asks for {parts.trainer.world_size}: set "
            "--trainer.devices=1 and start the same command once for each device (CUDA_VISIBLE_DEVICES=0 …)."
        )
    resolved = {name: part for name, part in parts.config.as_dict().items() if name in PARTS}
    return json.loads(json.dumps(resolved, default=str)), parts


@dataclass(frozen=True)
class Outcome:
    """The end of a run.

    Attributes:
        score: The best validation value; None if the run failed.
        epoch: Its epoch.
        seconds: Duration in seconds.
        pruned_at: Number of the validation at which the run was pruned; 0 if it was not.
        reason: The error of a failed run.
    """

    score: float | None = None
    epoch: int | None = None
    seconds: float = 0.0
    pruned_at: int = 0
    reason: str = ""

    @property
    def state(self) -> str:
        """Return the state of the run's trial."""
        return "FAIL" if self.reason else "PRUNED" if self.pruned_at else "COMPLETE"

    def describe(self, monitor: str) -> str:
        """Return the outcome in words."""
        if self.reason:
            return f"failed: {self.reason}"
        pruned = f"pruned at validation {self.pruned_at}"
        return pruned if self.pruned_at else f"{monitor} {self.score:.4f} at epoch {self.epoch}"


@dataclass
class Validations(Callback):
    """A record of a run's validations that prunes the run, and stops it where a value is not finite.

    Args:
        monitor: The metric.
        report: Function of a value and its number that returns whether to prune the run.
    """

    monitor: str
    report: Callable[[float, int], bool] = lambda value, step: False
    history: list[tuple[int, float]] = field(default_factory=list)
    pruned: bool = False

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            raise LookupError(
                f"validation did not log {self.monitor!r}; it logged {', '.join(sorted(trainer.callback_metrics))}."
            )
        self.check_finite(trainer)
        value = float(trainer.callback_metrics[self.monitor])
        self.history.append((trainer.current_epoch, value))
        if self.report(value, len(self.history)):
            self.pruned = trainer.should_stop = True

    def check_finite(self, trainer: Trainer) -> None:
        """Raise ArithmeticError if the metric or the training loss is not finite."""
        for name in (self.monitor, metric_name(trainer, "train", "loss")):
            value = trainer.callback_metrics.get(name)
            if value is not None and not math.isfinite(float(value)):
                raise ArithmeticError(f"{name} is {float(value)} after epoch {trainer.current_epoch}")


def train(config: dict[str, Any], setting: Setting, folder: Path, watch: Validations, mode: str) -> tuple[float, int]:
    """Train a run, keep the weights of its best validation, and return that validation's value and epoch."""
    parts = setting.build(config, folder, logs=True)
    trainer: Any = parts.trainer
    best = ModelCheckpoint(
        folder / "checkpoints", "best", watch.monitor, mode=mode, save_weights_only=True, enable_version_counter=False
    )
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, Checkpoint)] + [watch, best]
    trainer.fit(parts.model, datamodule=parts.datamodule)
    watch.check_finite(trainer)
    if not watch.history or best.best_model_score is None:
        raise LookupError(
            f"the run ended without a validation, so there is no {watch.monitor}: give validation data, and let "
            "trainer.check_val_every_n_epoch be no more than max_epochs."
        )
    return best_of(watch.history, mode)


def best_of(history: Sequence[tuple[int, float]], mode: str) -> tuple[float, int]:
    """Return the best value of epochs and values, and its first epoch."""
    score = (max if mode == "max" else min)(value for _, value in history)
    return score, next(epoch for epoch, value in history if value == score)


def attempt(config: dict[str, Any], setting: Setting, folder: Path, watch: Validations, mode: str) -> Outcome:
    """Train a run, keep the weights of its best validation, and return its outcome, which may be an error.

    A metric that validation does not log is raised as a LookupError, because every run would fail alike.
    """
    began = time.monotonic()
    try:
        score, epoch = train(config, setting, folder, watch, mode)
    except Exception as error:
        if isinstance(error, LookupError) and not watch.history and watch.monitor in str(error):
            raise
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text("".join(traceback.format_exception(error)))
        first = (str(error).strip().splitlines() or [""])[0]
        return Outcome(seconds=time.monotonic() - began, reason=f"{type(error).__name__}: {first}")
    return Outcome(score, epoch, time.monotonic() - began, len(watch.history) if watch.pruned else 0)


def free_memory() -> None:
    """Free the memory of a run that has ended."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(config: dict[str, Any], setting: Setting, folder: Path) -> dict[str, float]:
    """Measure the run's best weights on the test set."""
    parts = setting.build(config, folder, logs=False)
    trainer: Any = parts.trainer
    trainer.callbacks = naming_callbacks(trainer)
    results = trainer.test(
        parts.model, datamodule=parts.datamodule, ckpt_path=str(folder / "checkpoints" / "best.ckpt"), verbose=False
    )
    return {name: float(value) for part in results for name, value in part.items()}
