"""Logging and drawing the temperature of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from kd_lightning._lightning import accumulates, callbacks_of, logged_step, updates_logs
from kd_lightning.callbacks.common import check_validates, find_distiller, is_validation_check, read_metric
from kd_lightning.callbacks.gradient_share import gradient_share
from kd_lightning.distiller import DistillationOutput
from kd_lightning.modules.readings import TemperatureLogger, metric_name
from kd_lightning.ranking import check_counts
from kd_lightning.temperature import ConstantTemperature


class TemperatureMonitor(TemperatureLogger):
    r"""A callback that logs and draws the temperature, as ``LearningRateMonitor`` logs the learning rate.

    It writes to the trainer's loggers and ``callback_metrics``:

    * ``temperature_student``, ``temperature_teacher``: means over batch and terms; with ``_min`` and ``_max`` if the
      policy returns more than one number;
    * ``temperature_multiplier``, which callbacks move;
    * ``effective_kd_weight``, :math:`w_{kd} \cdot \text{scale}`, the figure to compare between runs;
    * ``entropy_student``, ``entropy_teacher``: in nats, at their temperatures;
    * ``kd_gradient_share``, on request: :math:`\|g_{kd}\| / (\|g_{kd}\| + \|g_{task}\|)` with the gradients of the two
      weighted terms.

    Without a monitor, DistillationModule logs the same names. Only logged steps compute values, with one transfer to
    the host. With several processes the values are those of rank 0's batch.

    Args:
        logging_interval: ``"step"``: every ``log_every_n_steps`` of the trainer, and an epoch's last step; ``"epoch"``:
            an epoch's last step; None: ``"epoch"`` for a constant temperature, else ``"step"``.
        histogram: Whether to log the distribution of per-sample temperatures, if a logger draws it as TensorBoard's.
        gradient_share_every_n_steps: Optimiser steps between measurements of ``kd_gradient_share``, each of which takes
            two further backward passes and changes training by rounding only. None: never.
        plot: Whether to write ``temperature.png`` into the log folder when training ends: T over the steps, with the
            monitored metric beneath, and the moves of AdaptiveTemperature with their reasons.
        monitor: The metric to draw with ``plot``. None: ``val_acc``, if it is logged.
        prog_bar: Whether to show ``temperature_student`` of the last logged step on the progress bar.

    Raises:
        ValueError: If an argument is outside its range, or if ``monitor`` is given without ``plot``.
        RuntimeError: If ``monitor`` is not logged in validation; the message names the logged metrics.
        MisconfigurationException: If the trainer has no logger and nothing is to be drawn.
        ImportError: Before training, if matplotlib is not installed and ``plot`` is set.
        TypeError: If the run has no Distiller.

    State: with ``plot``, the values recorded so far, so that a resumed run's figure is complete.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = TemperatureMonitor(logging_interval="step", gradient_share_every_n_steps=50, plot=True)
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        logging_interval: Literal["step", "epoch"] | None = None,
        histogram: bool = False,
        gradient_share_every_n_steps: int | None = None,
        plot: bool = False,
        monitor: str | None = None,
        prog_bar: bool = False,
    ) -> None:
        super().__init__()
        if logging_interval not in ("step", "epoch", None):
            raise ValueError(f"logging_interval must be 'step', 'epoch' or None, got {logging_interval!r}.")
        if gradient_share_every_n_steps is not None:
            check_counts(gradient_share_every_n_steps=gradient_share_every_n_steps)
        if monitor is not None and not plot:
            raise ValueError(f"monitor={monitor!r} is the metric that the plot draws, but plot=False. Set plot=True.")
        self.logging_interval = logging_interval
        self.histogram = histogram
        self.gradient_share_every_n_steps = gradient_share_every_n_steps
        self.plot = plot
        self.monitor = monitor
        self.prog_bar = prog_bar
        self.history: list[list[float]] = []
        """Rows of step, and the student's and the teacher's mean, smallest and largest temperature."""
        self.metric_history: list[list[float]] = []
        """Rows of step and monitored metric."""
        self._share: Tensor | None = None
        self._every_step = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is not None:
            check_validates(trainer, self)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        distiller = find_distiller(trainer, pl_module)
        distiller.keeps_output = True
        policy = distiller.temperature
        self._every_step = (
            not isinstance(policy, ConstantTemperature)
            if self.logging_interval is None
            else self.logging_interval == "step"
        )
        if self.plot:
            import matplotlib  # noqa: F401  (to report its absence before training)
        elif not trainer.loggers and not self.prog_bar:
            raise MisconfigurationException(
                "TemperatureMonitor has nowhere to log to: the Trainer has no logger. Give it one, or set plot=True."
            )
        if self.histogram and not _histogram_writers(trainer):
            rank_zero_warn("TemperatureMonitor(histogram=True): no logger here draws histograms. TensorBoard's does.")

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        every = self.gradient_share_every_n_steps
        if every is not None and (trainer.global_step + 1) % every == 0:
            output = find_distiller(trainer, pl_module).last_output
            if output is not None:
                parameters = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
                self._share = gradient_share(output, parameters)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        distiller = find_distiller(trainer, pl_module)
        output = distiller.last_output
        if output is None or not self._is_due(trainer):
            return
        step = logged_step(trainer)  # the same step as the losses' in the logs
        readings = output.readings() | _ranges(output)
        readings["temperature_multiplier"] = distiller.temperature.multiplier.detach().float().mean()
        if self._share is not None:
            readings["kd_gradient_share"], self._share = self._share, None
        trainer.callback_metrics.update(readings)
        values = dict(zip(readings, torch.stack(list(readings.values())).tolist(), strict=True))
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        if self.prog_bar:
            shown = readings["temperature_student"]
            pl_module.log("temperature_student", shown, prog_bar=True, logger=False, batch_size=1)
        if self.histogram:
            self._log_histograms(trainer, output, step)
        if self.plot:
            self.history.append([float(trainer.global_step), *_row(values, "student"), *_row(values, "teacher")])

    def _is_due(self, trainer: Trainer) -> bool:
        if accumulates(trainer):
            return False
        return trainer.is_last_batch or (self._every_step and updates_logs(trainer))

    def _log_histograms(self, trainer: Trainer, output: DistillationOutput, step: int) -> None:
        for side in ("student", "teacher"):
            flat = torch.cat([getattr(term, side).detach().flatten() for term in output.temperatures])
            for writer in _histogram_writers(trainer) if flat.numel() > 1 else ():
                writer.add_histogram(f"temperature_{side}_histogram", flat, global_step=step)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.plot or not is_validation_check(trainer):
            return
        name = self._drawn(trainer)
        if self.monitor is not None or name in trainer.callback_metrics:
            self.metric_history.append([float(trainer.global_step), read_metric(trainer, name, self)])

    def _drawn(self, trainer: Trainer) -> str:
        return metric_name(trainer, "val", "acc") if self.monitor is None else self.monitor

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (self.plot and self.history):
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # on every rank, because log_dir is a collective
        if trainer.is_global_zero:
            from kd_lightning.plotting import plot_temperature_history

            folder.mkdir(parents=True, exist_ok=True)
            figure = plot_temperature_history(
                [row[0] for row in self.history],
                [(row[1], row[2], row[3]) for row in self.history],
                [(row[4], row[5], row[6]) for row in self.history],
                metric=[(step, value) for step, value in self.metric_history],
                metric_name=self._drawn(trainer),
                moves=sorted(move for callback in callbacks_of(trainer) for move in getattr(callback, "moves", ())),
            )
            figure.savefig(folder / "temperature.png", dpi=150)
            rank_zero_info(f"Plot: {folder / 'temperature.png'}")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "metric_history": self.metric_history}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict.get("history", [])
        self.metric_history = state_dict.get("metric_history", [])


def _histogram_writers(trainer: Trainer) -> list[Any]:
    experiments = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    return [experiment for experiment in experiments if hasattr(experiment, "add_histogram")]


def _ranges(output: DistillationOutput) -> dict[str, Tensor]:
    """Return the smallest and the largest temperature, if there are several."""
    ranges = {}
    for side in ("student", "teacher"):
        values = [getattr(term, side).detach() for term in output.temperatures]
        if len(values) > 1 or values[0].numel() > 1:
            ranges[f"temperature_{side}_min"] = torch.stack([value.min() for value in values]).min().float()
            ranges[f"temperature_{side}_max"] = torch.stack([value.max() for value in values]).max().float()
    return ranges


def _row(values: dict[str, float], side: str) -> list[float]:
    name = f"temperature_{side}"
    return [values[name], values.get(f"{name}_min", values[name]), values.get(f"{name}_max", values[name])]
