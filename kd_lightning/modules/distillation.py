"""The LightningModule that distils a teacher into a student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from kd_lightning._lightning import FirstLookModule, attached_trainer, callbacks_of, train_loader
from kd_lightning.distiller import DistillationOutput
from kd_lightning.export import ExportFormat, ExportReport, export_student
from kd_lightning.fused_distiller import make_distiller
from kd_lightning.layers import LayerTerm
from kd_lightning.losses.task import check_scalar
from kd_lightning.modules.between_ranks import (
    average_gradients,
    broadcast,
    check_sharded,
    check_teachers,
    clip_gradients,
)
from kd_lightning.modules.checkpoints import states_of
from kd_lightning.modules.first_samples import first_samples
from kd_lightning.modules.optimization import LRSchedulerConfig
from kd_lightning.modules.readings import final_scores, is_logging_step, metric_name, step_readings
from kd_lightning.modules.run import DistillationRun, HoldsDistiller
from kd_lightning.modules.supervised import SupervisedModule
from kd_lightning.modules.temperature_state import KeepsTemperatureState
from kd_lightning.teachers import Teacher
from kd_lightning.teachers.calls import positional_names
from kd_lightning.teachers.indexed import split_index
from kd_lightning.temperature import Progress, Schedule, TemperaturePolicy
from kd_lightning.temperature.signals import take_extra

_CHECKPOINT_KEY = "kd_lightning"


class DistillationModule(HoldsDistiller, FirstLookModule, KeepsTemperatureState, SupervisedModule):
    r"""Trains a student on a frozen teacher: :math:`L = w_{kd} L_{kd} + w_{task} L_{task}`.

    Logged: ``train_loss``, ``train_kd_loss``, ``train_task_loss``, ``temperature_student``, ``temperature_teacher``,
    ``effective_kd_weight`` (:math:`w_{kd} \cdot \text{scale}`, to be compared between runs), ``entropy_student``,
    ``entropy_teacher`` (at their temperatures, in nats) when the logger writes (a
    :class:`~kd_lightning.callbacks.TemperatureMonitor` takes over all but the losses); ``val_loss``, ``val_kd_loss``,
    ``val_task_loss``, ``val_acc``, ``val_acc_top5`` (more than five classes), ``val_calibration_error``,
    ``val_agreement`` and ``val_teacher_acc`` in validation, ``test_…`` in test. ``val_loss`` and ``val_kd_loss`` move
    with the temperature: choose models by ``val_acc`` or ``val_task_loss``. With ``layers`` there is
    ``train_layer_loss/<layer>`` too, unweighted, and ``temperature_<layer>``; ``val_loss`` is without them.

    For ``(B, L, V)`` logits ``val_perplexity`` and ``val_teacher_perplexity`` take the place of the calibration error.

    The teacher is read at the start of ``fit`` and never saved: not in checkpoints, not in the optimiser, out of
    callbacks' reach; resuming with another teacher is an error. ``validate`` and ``predict`` do without its file.

    A teacher with a :class:`~kd_lightning.teachers.TeacherCache` is run on batches of training and validation only as
    long as the cache lacks them. This library's data modules then say by themselves which samples a batch has; other
    loaders are made of ``teacher.index(dataset)``, and ``teacher.index(dataset, part="val")`` in validation. Hooks and
    callbacks see the batches as they are without a cache.

    Args:
        student: The network to train. If it is a LightningModule and no optimiser is given, its own
            ``configure_optimizers`` is used.
        teacher: A trained network, a :class:`FrozenTeacher` or a :class:`TeacherEnsemble`. None will do for everything
            but ``fit``.
        temperature: A number, a schedule or a :class:`TemperaturePolicy`.
        kd_loss: See :class:`~kd_lightning.Distiller`.
        task_loss: See :class:`~kd_lightning.Distiller`.
        kd_weight: Number or schedule.
        task_weight: Number or schedule.
        optimizer: A function from parameters to an optimiser. None: the student's own if it is a LightningModule, else
            AdamW with a learning rate of 0.001. The policy's parameters are in a group without weight decay.
        lr_scheduler: A function from the optimiser to a scheduler, or Lightning's dictionary with such a function:
            ``{"scheduler": function, "interval": "step", "frequency": 1, "monitor": "val_acc", "strict": True}``.
            ``ReduceLROnPlateau`` follows ``val_task_loss`` unless ``monitor`` says otherwise.
        layers: Terms between layers of the student and the teacher, a :class:`~kd_lightning.LayerTerm` each. Hooks are
            on both networks during ``fit``. Projectors are built before the optimiser is, from two training samples
            that leave no trace in loader or random numbers (a loader that can only be iterated gives its first batch);
            they have an optimiser group of their own and are in checkpoints, but not in ``student.state_dict()``.
        shift_labels: Whether the target of a position is the next one's label, as causal language models are trained
            and as Hugging Face's data collators leave it to the model; see
            :func:`~kd_lightning.functional.next_token_targets`.
        mean_over: What a loss is the mean over: the labelled positions of the ``"batch"``, or of the whole optimiser
            ``"step"``, all its accumulated batches and ranks; see
            :class:`~kd_lightning.modules.SupervisedModule`.

    Raises:
        ValueError: If student and teacher share parameters, labels are shifted without an ``ignore_index``, or the
            interval or ``mean_over`` is unknown; at fit, if there is no teacher, or it differs from the checkpoint's.

    Example:
        >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> _ = teacher.weight.data.mul_(3.0)  # stands for training
        >>> module = DistillationModule(student=student, teacher=teacher, temperature=4.0)
        >>> sorted(module.state_dict())
        ['distiller.temperature.multiplier', 'student.bias', 'student.weight']
    """

    _plateau_loss = "task_loss"  # because val_loss moves with the temperature

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Teacher | str | None = None,
        temperature: float | Schedule | TemperaturePolicy | Callable[[Progress], float] = 4.0,
        kd_loss: nn.Module | None = None,
        task_loss: nn.Module | None = None,
        kd_weight: float | Schedule | Callable[[Progress], float] = 0.9,
        task_weight: float | Schedule | Callable[[Progress], float] = 0.1,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerConfig | LRSchedulerCallable | None = None,
        layers: Sequence[LayerTerm] | None = None,
        shift_labels: bool = False,
        mean_over: Literal["batch", "step"] = "batch",
    ) -> None:
        super().__init__(optimizer, lr_scheduler, shift_labels, mean_over)
        self._save_plain_hyperparameters()
        self.student = student
        self.distiller = make_distiller(teacher, temperature, kd_loss, task_loss, kd_weight, task_weight, layers)
        self._run = DistillationRun(self.distiller, type(self).__name__)
        self._run.check_student(student)
        self.distiller.input_names = positional_names(student)
        self._run.follow(student)
        if shift_labels and self.distiller.ignore_index is None:
            raise ValueError(
                "shift_labels=True marks positions that do not count, the last one and padding, by ignore_index, but "
                "kd_loss has ignore_index=None and would distil them. Give it the default, -100."
            )

    @property
    @override
    def network(self) -> nn.Module:
        return self.student

    @property
    @override
    def _task_loss(self) -> nn.Module:
        return self.distiller.task_loss

    @property
    @override
    def class_dim(self) -> int:
        return self.distiller.class_dim

    @property
    @override
    def ignore_index(self) -> int:
        return self.distiller.task_ignore_index

    @property
    @override
    def progress(self) -> Progress:
        """The progress of training; outside of ``fit`` that of the last fit, or of the checkpoint."""
        return self._run.progress(attached_trainer(self))

    # ---- steps ----------------------------------------------------------------------------------------------------

    @override
    def unpack(self, batch: Any) -> tuple[Any, Tensor | None]:
        return self.unpack_batch(take_extra(batch, self.distiller.batch_keys)[0])

    @override
    def network_inputs(self, inputs: Any) -> Any:
        return inputs if self.teacher is None else self.teacher.student_inputs(inputs)

    @override
    def extract_logits(self, output: Any) -> Tensor:
        return getattr(self.distiller.kd_loss, "prediction", super().extract_logits)(output)

    @override
    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        # no more than the computation, so that torch.compile(module) sees one graph; book-keeping comes after it
        progress = _progress_outside_the_graph(self)  # not as an argument: torch 2.8 recompiles for what waits for it
        out, self._last_targets = self._distil(batch, progress)
        return out.loss

    @override
    def take_batch(self, batch: Any) -> Any:
        return self._run.cache.take_rows(batch, self.trainer.predicting)

    @override
    def on_before_backward(self, loss: Tensor) -> None:
        out = self.last_output
        if out is not None:
            self._run.check_step(self.trainer, out)
            self._update_metrics("train", out.student_logits, self._last_targets, out.teacher_logits)
            if is_logging_step(self.trainer):
                size = max(len(out.student_logits), 1)
                name = metric_name(self.trainer, "train", "loss")
                self.log(name, out.loss.detach(), prog_bar=True, batch_size=size)
                self.log_dict(step_readings(self.trainer, out), batch_size=size)

    @override
    def validation_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        self._evaluate("val", batch, dataloader_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        self._evaluate("test", batch, dataloader_idx)

    def _distil(self, batch: Any, progress: Progress) -> tuple[DistillationOutput, Tensor | None]:
        batch, rows = split_index(batch)  # still one where the step is called by hand
        inputs, targets = self.inputs_and_targets(batch)
        if self.teacher is None:
            raise ValueError(f"{type(self).__name__} has no teacher: give one to learn from.")
        rows = self._run.cache.rows if rows is None else rows
        if self.training:
            self._run.cache.check_rows(rows)
        student = self.distiller.run_student(self, self.student, inputs)
        given = batch if self.teacher.reads_batch else inputs
        teacher_logits = self.distiller.teacher_logits(given, rows, self.extract_logits)
        extra = take_extra(batch, self.distiller.batch_keys)[1]
        out = self.distiller(inputs, student, targets, progress, teacher_logits=teacher_logits, extra=extra)
        check_scalar(out.loss)
        return out, targets

    def _evaluate(self, stage: str, batch: Any, dataloader_idx: int) -> None:
        if self._run.can_ask(batch):
            out, targets = self._distil(batch, self.progress)
            losses = {"loss": out.loss, "kd_loss": out.kd_loss, "task_loss": out.task_loss}
            logits, teacher_logits = out.student_logits, out.teacher_logits
        else:
            inputs, targets = self.inputs_and_targets(batch)
            logits, teacher_logits = self(inputs), None
            losses = {} if targets is None else {"task_loss": self.distiller.task_term(logits, targets)}
        weight = len(logits) if self.distiller.ignore_index is None else self._weight(logits, targets)
        named = {metric_name(self.trainer, stage, name): value for name, value in losses.items()}
        self.log_dict(named, sync_dist=True, batch_size=weight)
        self._update_metrics(stage, logits, targets, teacher_logits, dataloader_idx)

    # ---- a run: the teacher, its cache and the ranks ----------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit":
            if self.teacher is None:
                raise ValueError(
                    f"fit needs a teacher, but {type(self).__name__} was made without one: "
                    "DistillationModule(student=..., teacher=FrozenTeacher(network, checkpoint=...))."
                )
            self._run.set_up(self.trainer)
            self._watch_layers()
        elif stage in ("validate", "test") and self.teacher is not None:
            self._run.set_up_evaluation(self.trainer, stage)

    @override
    def teardown(self, stage: str) -> None:
        self.distiller.detach()
        if stage == "fit":
            self._run.warn_of_lost_state(weights=False)
        self._run.stop(attached_trainer(self))

    @override
    def on_train_epoch_start(self) -> None:
        self._run.start_epoch(self.trainer)

    @override
    def on_fit_start(self) -> None:
        self._run.fit_optimizer(self.trainer)
        super().on_fit_start()
        self._run.teacher.to(self.device)  # strategies that do not move the module, such as FSDP
        check_teachers(self.trainer, self._run.teacher)
        if self._syncs_the_distiller:
            check_sharded(self.student)
            broadcast(self.trainer, self.distiller)

    @property
    def _syncs_the_distiller(self) -> bool:
        """Return True where FSDP2 synchronises sharded parameters alone, and the Distiller's are whole."""
        return isinstance(self.trainer.strategy, ModelParallelStrategy)

    @override
    def on_after_backward(self) -> None:
        super().on_after_backward()
        if self._syncs_the_distiller:
            average_gradients(self.trainer, self.distiller)

    @override
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if not clip_gradients(self.trainer, optimizer, gradient_clip_val, gradient_clip_algorithm in (None, "norm")):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self.distiller.train()  # because Lightning keeps the mode of module.eval(), which leaves out the layers' terms
        self._run.start(self.trainer, self.student)

    @override
    def on_fit_end(self) -> None:
        super().on_fit_end()
        if scores := final_scores(self.trainer):
            rank_zero_info(scores)

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.last_output, self._last_targets = None, None  # callbacks, whose hooks run first, have seen it

    # ---- layers ---------------------------------------------------------------------------------------------------

    def _watch_layers(self) -> None:
        """Build the projectors that there are not yet, and put the hooks on."""
        layers = self.distiller.layers
        if not layers.built:
            with isolate_rng():
                self.distiller.build_projectors(self.student, self._first_inputs())
            for callback in callbacks_of(self.trainer):
                if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
                    callback.setup(self.trainer, self, "fit")  # it copied the module before there were projectors
        self.distiller.attach(self.student)

    def _first_inputs(self) -> Any:
        batch = first_samples(train_loader(self.trainer))
        inputs = self._inputs(self.prepare_batch(batch))
        # in the student's type, because the precision plugin converts the networks only after setup
        dtype = next((p.dtype for p in self.student.parameters() if p.is_floating_point()), None)
        return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)

    @override
    def configure_callbacks(self) -> list[Callback]:
        return [_DetachOnException()] if len(self.distiller.layers) else []

    # ---- optimiser ------------------------------------------------------------------------------------------------

    @override
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return groups of the student and losses, of the projectors, and of the policies (without weight decay)."""
        policies = list(dict.fromkeys(self.distiller.policies().values()))
        projectors = [p for term in self.distiller.layers if term.projector for p in term.projector.parameters()]
        apart = {id(p) for p in projectors} | {id(p) for policy in policies for p in policy.parameters()}
        groups = [{"params": [p for p in self.parameters() if p.requires_grad and id(p) not in apart]}]
        if projectors:
            groups.append({"params": projectors})
        return groups + [group for policy in policies for group in policy.param_groups()]

    # ---- the student alone ----------------------------------------------------------------------------------------

    def export_student(
        self,
        path: str | Path,
        format: ExportFormat | None = None,
        example_inputs: Any = None,
        *,
        dynamic_dims: Sequence[int] = (0,),
        overwrite: bool = False,
    ) -> ExportReport:
        """Write the bare student as safetensors, ``torch.export`` program or ONNX, and verify it by reading it back.

        See :func:`kd_lightning.export.export_student`, which takes any network.

        Args:
            path: Where to write, with the format's suffix.
            format: ``"safetensors"``, ``"torch.export"`` or ``"onnx"``. None: by the suffix.
            example_inputs: What the student is called with. None: inputs of the shapes and types it was trained on, in
                this process or before the checkpoint was written; else Lightning's ``example_input_array``.
            dynamic_dims: Dimensions of the inputs that may have any size.
            overwrite: Whether to replace a file that is there.

        Example:
            >>> import tempfile
            >>> module = DistillationModule(student=nn.Linear(4, 3))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     module.export_student(f"{folder}/student.pt2", example_inputs=torch.ones(2, 4)).max_difference
            0.0
        """
        inputs = (each for each in (example_inputs, self.example_inputs, self.example_input_array) if each is not None)
        return export_student(
            self.student,
            path,
            format,
            next(inputs, None),
            built_from=self.hparams.get("student"),
            dynamic_dims=dynamic_dims,
            overwrite=overwrite,
        )

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_CHECKPOINT_KEY] = self._run.state_dict(attached_trainer(self))
        # weight averaging has put its average of the temperature's state here; it is no weight
        weights = checkpoint.get("state_dict", {})
        weights.update({name: value for name, value in self.live_temperature_state().items() if name in weights})

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._run.load_state_dict(checkpoint.get(_CHECKPOINT_KEY, {}))
        self._run.fit_policies(checkpoint, *states_of(checkpoint), prefix="distiller.")
        trainer = attached_trainer(self)
        fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self._run.cache.resume(checkpoint)
        else:
            self._run.warn_of_changes()  # else at the start of training: a callback may put back what it had set


def _progress_of(module: DistillationModule) -> Progress:
    return module.progress


# numbers that a graph reads from the trainer would be compiled into it, step by step
_progress_outside_the_graph = cast(Callable[[DistillationModule], Progress], torch.compiler.disable(_progress_of))


class _DetachOnException(Callback):
    """Takes the hooks off where a fit ends without ``teardown``; only callbacks are told of an exception."""

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(pl_module, DistillationModule):
            pl_module.distiller.detach()
