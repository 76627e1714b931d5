"""The LightningModule that distils a teacher into a student."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from kd_lightning.classification import SupervisedModule
from kd_lightning.distiller import DistillationOutput, Distiller
from kd_lightning.teachers import FrozenTeacher
from kd_lightning.temperature import Progress, Schedule, TemperaturePolicy
from kd_lightning.training import DistillationRun, is_logging_step, step_readings

__all__ = ["DistillationModule"]

_CHECKPOINT_KEY = "kd_lightning"


class DistillationModule(SupervisedModule):
    r"""Trains a student on a frozen teacher: :math:`L = w_{kd} L_{kd} + w_{task} L_{task}`.

    Logged: ``train_loss``, ``train_kd_loss``, ``train_task_loss``, ``temperature_student``, ``temperature_teacher``,
    ``effective_kd_weight`` (:math:`w_{kd} \cdot \text{scale}`, to be compared between runs), ``entropy_student``,
    ``entropy_teacher`` (at their temperatures, in nats) when the logger writes (a
    :class:`~kd_lightning.callbacks.TemperatureMonitor` takes over all but the losses); ``val_loss``, ``val_kd_loss``,
    ``val_task_loss``, ``val_acc``, ``val_acc_top5`` (more than five classes), ``val_calibration_error``,
    ``val_agreement`` and ``val_teacher_acc`` in validation, ``test_…`` in test. ``val_loss`` and ``val_kd_loss`` move
    with the temperature: choose models by ``val_acc`` or ``val_task_loss``.

    The teacher is read at the start of ``fit`` and never saved: not in checkpoints, not in the optimiser, out of
    callbacks' reach; resuming with another teacher is an error. ``validate`` and ``predict`` do without its file.

    Args:
        student: The network to train. If it is a LightningModule and no optimiser is given, its own
            ``configure_optimizers`` is used.
        teacher: A trained network or a :class:`FrozenTeacher`. None will do for everything but ``fit``.
        temperature: A number, a schedule or a :class:`TemperaturePolicy`.
        kd_loss: See :class:`~kd_lightning.Distiller`.
        task_loss: See :class:`~kd_lightning.Distiller`.
        kd_weight: Number or schedule.
        task_weight: Number or schedule.
        optimizer: A function from parameters to an optimiser. None: the student's own if it is a LightningModule, else
            AdamW with a learning rate of 0.001. The policy's parameters are in a group without weight decay.
        lr_scheduler: A function from the optimiser to a scheduler.
        lr_scheduler_interval: Whether the scheduler steps each ``"epoch"`` or each ``"step"``.

    Raises:
        ValueError: Student and teacher share parameters; at fit, no teacher, or another one than the checkpoint's.

    Example:
        >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> _ = teacher.weight.data.mul_(3.0)  # stands for training
        >>> module = DistillationModule(student=student, teacher=teacher, temperature=4.0)
        >>> sorted(module.state_dict())
        ['distiller.temperature.multiplier', 'student.bias', 'student.weight']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | FrozenTeacher | None = None,
        temperature: float | Schedule | TemperaturePolicy | Callable[[Progress], float] = 4.0,
        kd_loss: nn.Module | None = None,
        task_loss: nn.Module | None = None,
        kd_weight: float | Schedule | Callable[[Progress], float] = 0.9,
        task_weight: float | Schedule | Callable[[Progress], float] = 0.1,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__(optimizer, lr_scheduler, lr_scheduler_interval)
        self._save_plain_hyperparameters()
        self.student = student
        self.distiller = Distiller(teacher, temperature, kd_loss, task_loss, kd_weight, task_weight)
        self.last_output: DistillationOutput | None = None
        self._last_targets: Tensor | None = None
        self._run = DistillationRun(self.distiller, type(self).__name__)
        self._temperature_state: dict[str, Tensor] = {}
        self._run.check_student(student)

    @property
    @override
    def network(self) -> nn.Module:
        return self.student

    @property
    @override
    def class_dim(self) -> int:
        return self.distiller.class_dim

    @property
    @override
    def ignore_index(self) -> int:
        return self.distiller.task_ignore_index

    @property
    def teacher(self) -> FrozenTeacher | None:
        """The frozen teacher."""
        return self.distiller.teacher

    @property
    def progress(self) -> Progress:
        """Where training stands; outside of ``fit`` where the last fit, or the checkpoint, left it."""
        return self._run.progress(self._trainer)

    # ---- steps ----------------------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        # no more than the computation, so that torch.compile(module) sees one graph; book-keeping comes after it
        self.last_output, self._last_targets = self._distil(batch, _progress_outside_the_graph(self))
        return self.last_output.loss

    @override
    def on_before_backward(self, loss: Tensor) -> None:
        out = self.last_output
        if out is not None:
            self._update_metrics("train", out.student_logits, self._last_targets, out.teacher_logits)
            if is_logging_step(self.trainer):
                self._log_step(out)

    @override
    def validation_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        self._evaluate("val", batch, dataloader_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        self._evaluate("test", batch, dataloader_idx)

    def _distil(self, batch: Any, progress: Progress) -> tuple[DistillationOutput, Tensor | None]:
        inputs, targets = self.unpack_batch(batch)
        if self.teacher is None:
            raise ValueError(f"{type(self).__name__} has no teacher: give one to learn from.")
        student_logits = self(inputs)
        teacher_logits = self.extract_logits(self.teacher(inputs))
        return self.distiller(inputs, student_logits, targets, progress, teacher_logits=teacher_logits), targets

    def _evaluate(self, stage: str, batch: Any, dataloader_idx: int) -> None:
        if self.teacher is not None and self.teacher.loaded:
            out, targets = self._distil(batch, self.progress)
            losses = {"loss": out.loss, "kd_loss": out.kd_loss, "task_loss": out.task_loss}
            logits, teacher_logits = out.student_logits, out.teacher_logits
        else:
            inputs, targets = self.unpack_batch(batch)
            logits, teacher_logits = self(inputs), None
            losses = {} if targets is None else {"task_loss": self.distiller.task_term(logits, targets)}
        self.log_dict(
            {f"{stage}_{name}": value for name, value in losses.items()}, sync_dist=True, batch_size=len(logits)
        )
        self._update_metrics(stage, logits, targets, teacher_logits, dataloader_idx)

    def _log_step(self, out: DistillationOutput) -> None:
        size = len(out.student_logits)
        self.log("train_loss", out.loss.detach(), prog_bar=True, batch_size=size)
        self.log_dict(step_readings(self.trainer, out), batch_size=size)

    # ---- the teacher ----------------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        teacher = self.teacher
        if stage == "fit":
            if teacher is None:
                raise ValueError(
                    f"fit needs a teacher, but {type(self).__name__} was made without one: "
                    "DistillationModule(student=..., teacher=FrozenTeacher(network, checkpoint=...))."
                )
            self._run.set_up(self.trainer)
        elif stage in ("validate", "test") and teacher is not None and not teacher.loaded:
            if teacher.available():
                teacher.load()
            else:
                rank_zero_info(
                    f"No teacher at {teacher.checkpoint}: the student is measured alone, without the losses and "
                    "metrics that compare it with the teacher."
                )

    @override
    def on_fit_start(self) -> None:
        self._run.teacher.to(self.device)  # strategies that do not move the module, such as FSDP
        self._run.check_ranks(self.trainer)

    @override
    def on_train_start(self) -> None:
        self._run.check_resumed()

    @override
    def on_fit_end(self) -> None:
        values = self.trainer.callback_metrics
        if "val_acc" in values and "val_teacher_acc" in values:
            rank_zero_info(
                f"val_acc: student {values['val_acc']:.4f}, teacher {values['val_teacher_acc']:.4f} "
                f"(agreement {values['val_agreement']:.4f})"
            )

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.last_output, self._last_targets = None, None  # callbacks, whose hooks run first, have seen it

    # ---- optimiser ------------------------------------------------------------------------------------------------

    @override
    def parameter_groups(self) -> list[dict[str, Any]]:
        """The student's (and the losses') parameters; the policy's in groups of their own, without weight decay."""
        policy = {id(parameter) for parameter in self.distiller.temperature.parameters()}
        trained = [p for p in self.parameters() if p.requires_grad and id(p) not in policy]
        return [{"params": trained}, *self.distiller.temperature.param_groups()]

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[_CHECKPOINT_KEY] = self._run.state_dict(self._trainer)
        # weight averaging has put its average of the temperature's state here; it is no weight
        weights = checkpoint.get("state_dict", {})
        weights.update({name: value for name, value in self._live_temperature_state().items() if name in weights})

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._run.load_state_dict(checkpoint.get(_CHECKPOINT_KEY, {}))
        if self._trainer is None or self._trainer.state.fn != TrainerFn.FITTING:
            self._run.warn_of_changes()  # else at the start of training: a callback may put back what it had set

    # ---- the temperature's state is no weight: WeightAveraging swaps all buffers, these hooks put ours back -------

    def _live_temperature_state(self) -> dict[str, Tensor]:
        prefix = "distiller.temperature."
        return {prefix + name: buffer.detach() for name, buffer in self.distiller.temperature.named_buffers()}

    def _keep_temperature_state(self) -> None:
        self._temperature_state = {name: value.clone() for name, value in self._live_temperature_state().items()}

    def _put_temperature_state_back(self) -> None:
        live = self._live_temperature_state()
        for name, value in self._temperature_state.items():
            live[name].copy_(value)

    @property
    def _weights_are_averaged(self) -> bool:
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        return fitting and any(isinstance(callback, WeightAveraging) for callback in self._callbacks)

    @property
    def _callbacks(self) -> list[Callback]:
        return self.trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]  (set by a connector)

    @override
    def on_validation_start(self) -> None:
        if self._weights_are_averaged:
            self._keep_temperature_state()

    @override
    def on_validation_epoch_start(self) -> None:
        if self._weights_are_averaged:
            self._put_temperature_state_back()

    @override
    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if self._weights_are_averaged:
            self._keep_temperature_state()

    @override
    def on_train_end(self) -> None:
        if self._weights_are_averaged:
            self._put_temperature_state_back()


def _progress_of(module: DistillationModule) -> Progress:
    return module.progress


# numbers that a graph reads from the trainer would be compiled into it, step by step
_progress_outside_the_graph = cast(Callable[[DistillationModule], Progress], torch.compiler.disable(_progress_of))
