"""Distillation into a LightningModule that has no code for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from typing_extensions import override

from kd_lightning._lightning import FIRST_LOOK, callbacks_of
from kd_lightning.callbacks.student_call import (
    StudentCall,
    changed,
    choose,
    find_layer,
    find_targets,
    select,
    tensors,
    unseen,
    versions,
)
from kd_lightning.callbacks.teacher_scores import TeacherScores
from kd_lightning.distiller import DistillationOutput, Distiller
from kd_lightning.losses.task import as_targets, check_scalar
from kd_lightning.modules.between_ranks import average_gradients, broadcast, check_teachers
from kd_lightning.modules.optimization import add_groups
from kd_lightning.modules.readings import is_logging_step, step_readings
from kd_lightning.modules.run import DistillationRun, HoldsDistiller
from kd_lightning.modules.run_length import check_batches
from kd_lightning.teachers import Teacher, extract_logits
from kd_lightning.teachers.calls import counting_positions
from kd_lightning.temperature import Progress, Schedule, TemperaturePolicy
from kd_lightning.temperature.signals import take_extra

_ABSENT: Any = object()


class DistillationCallback(HoldsDistiller, Callback):
    r"""A callback that adds a teacher to an unchanged LightningModule: :math:`L = w_{kd} L_{kd} + w_{task} L_{module}`.

    :math:`L_{module}` is the loss of the module's ``training_step``. The student's logits are the output of
    ``forward``, or of the submodule ``student_layer``, in that step; the teacher receives the same arguments.
    Optimiser, schedulers, metrics, validation and checkpoints stay the module's. After ``fit``, also after an
    exception, the module is as before; its ``state_dict`` has no further key, so checkpoints load into its own class.

    A teacher with a :class:`~kd_lightning.teachers.TeacherCache` needs batches that name their samples, as those of
    this library's data modules do; make other loaders of ``teacher.index(dataset)``. The module sees plain batches.

    The step may return a tensor, a dictionary with ``"loss"`` (other keys are kept) or None (no optimisation in this
    step). Calls of the student under ``no_grad`` do not count; of several others, ``forward_call`` selects one.

    When the logger writes, the callback logs ``train_kd_loss``, ``train_task_loss`` (the module's loss), and the
    temperature as :class:`~kd_lightning.DistillationModule` does; ``validate=True`` adds ``val_kd_loss`` and
    ``val_agreement``. The callbacks of this package use its Distiller.

    Only automatic optimisation is supported. A learned policy has its own group, without weight decay, in the module's
    optimiser, so resuming such a run needs this callback, and ``LBFGS``, which takes one group, cannot be used.

    Args:
        teacher: A trained network or a :class:`~kd_lightning.FrozenTeacher`.
        student_layer: Dotted name of the submodule that returns the logits, such as ``"net"`` or ``"model.head"``.
            None: the module's ``forward``.
        temperature: A number, a schedule or a :class:`~kd_lightning.temperature.TemperaturePolicy`.
        kd_loss: See :class:`~kd_lightning.Distiller`.
        kd_weight: Weight of the distillation term: a number or a schedule.
        task_weight: Weight of the module's loss: a number or a schedule.
        inputs: The teacher's inputs: a key or an index of the batch, or a function of it. None: the student's
            arguments, which a layer within the network cannot provide, because they are features.
        targets: Labels for losses and policies that need them, and for ``ignore_index``: a key, an index or a function
            of the batch. None: the second of two parts, ``"labels"`` or ``"targets"``, if their shape fits; an error
            for token logits ``(B, L, V)``, where labels can be aligned in two ways.
        forward_call: Index of the call of the student that counts in a step: 0 the first, −1 the last. None: the step
            must have one.
        validate: Whether to run the teacher in validation too, and log ``val_kd_loss`` and ``val_agreement``.

    Raises:
        ValueError: At fit, if the module optimises manually, lacks the layer, distils itself, or shares parameters with
            the teacher, or if the Distiller has parameters under DeepSpeed.
        RuntimeError: In the first step, if it does not call the student, or calls it several times without
            ``forward_call``; when resuming, if the teacher differs from the checkpoint's.

    State: that of the policy and the losses, whether distillation is on, the teacher's fingerprint.

    Example:
        >>> teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> _ = teacher[0].weight.data.mul_(3.0)  # stands for training
        >>> callback = DistillationCallback(teacher, student_layer="net", temperature=4.0, kd_weight=0.9)
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        teacher: nn.Module | Teacher | str,
        student_layer: str | None = None,
        temperature: float | Schedule | TemperaturePolicy | Callable[[Progress], float] = 4.0,
        kd_loss: nn.Module | None = None,
        kd_weight: float | Schedule | Callable[[Progress], float] = 0.9,
        task_weight: float | Schedule | Callable[[Progress], float] = 0.1,
        inputs: Callable[[Any], Any] | int | str | None = None,
        targets: Callable[[Any], Any] | int | str | None = None,
        forward_call: int | None = None,
        validate: bool = False,
    ) -> None:
        super().__init__()
        kind = getattr(kd_loss, "distiller", Distiller)
        self.distiller = kind(teacher, temperature, kd_loss, None, kd_weight, task_weight)
        if self.distiller.teacher is None:
            raise TypeError("DistillationCallback needs a teacher, got None.")
        self.student_layer = student_layer
        self.inputs = inputs
        self.targets = targets
        self.forward_call = forward_call
        self.validate = validate
        self._run = DistillationRun(self.distiller, type(self).__name__)
        self._scores = TeacherScores()
        self._is_set_up = False
        self._trainer: Trainer | None = None
        self._layer: nn.Module | None = None
        self._wrapped: list[tuple[nn.Module, str, Any]] = []
        self._calls: list[StudentCall] | None = None

    @property
    @override
    def progress(self) -> Progress:
        """The progress of training."""
        return self._run.progress(self._trainer)

    def extract_logits(self, output: Any) -> Tensor:
        """Return the logits of an output of the student or the teacher. Override this for other outputs.

        By default: the tensor itself, ``.logits`` as in Hugging Face's outputs, ``["logits"]`` or ``["out"]``.
        """
        return getattr(self.distiller.kd_loss, "prediction", extract_logits)(output)

    # ---- onto the module, and off it --------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._is_set_up = True
        if stage != "fit":
            return
        if any(isinstance(each, DistillationCallback) and each is not self for each in callbacks_of(trainer)):
            raise ValueError(
                f"{type(pl_module).__name__} is to be trained with more than one DistillationCallback, and each would "
                "add a loss to the sum of the others. Keep one of them, and give it several teachers as a "
                "TeacherEnsemble([...])."
            )
        if any(isinstance(child, Distiller) for child in pl_module.children()):
            raise ValueError(
                f"{type(pl_module).__name__} distils by itself: train it without DistillationCallback, or give its "
                "student in a LightningModule of its own."
            )
        self._trainer = trainer
        self._run.set_up(trainer)
        if self._run.teacher.caches:
            self._wrap(pl_module, FIRST_LOOK, self._taking_rows)
        self._wrap(pl_module, "training_step", self._distilling)
        self._wrap(pl_module, "configure_optimizers", self._configuring)

    def _configuring(self, configure: Callable[[], Any], pl_module: LightningModule) -> Callable[[], Any]:
        """Start distillation when optimisers are configured, because the module is then complete and on its device."""

        def configure_optimizers() -> Any:
            self._start(pl_module)
            policy = self.distiller.temperature
            taken = {id(parameter) for parameter in policy.parameters()}
            rest = [p for p in self.distiller.parameters() if p.requires_grad and id(p) not in taken]
            groups = [*([{"params": rest}] if rest else []), *policy.param_groups()]
            return add_groups(configure(), groups)

        return configure_optimizers

    def _start(self, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} optimises manually, so nobody but its training_step can add a loss before "
                "backward. Leave out this callback and distil there: self.distiller = Distiller(teacher) in __init__, "
                "loss = self.distiller(inputs, student_logits, targets).loss in training_step, before backward."
            )
        self._run.check_student(pl_module)
        trainer, distiller = self._trainer, self.distiller.train()
        assert trainer is not None
        trainer.precision_plugin.convert_module(distiller)
        learned = [name for name, parameter in distiller.named_parameters() if parameter.requires_grad]
        if learned and isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                f"DeepSpeed's engine trains the parameters of {type(pl_module).__name__} alone, but those of "
                f"DistillationCallback are beside it: {', '.join(learned)}. Take a temperature and losses without "
                "parameters, or DistillationModule, which holds them."
            )
        distiller.to(trainer.strategy.root_device)
        check_teachers(trainer, self._run.teacher)
        broadcast(trainer, self.distiller)
        self._layer = find_layer(pl_module, self.student_layer)
        self._run.follow(self._layer)  # before its forward is wrapped, because a teacher may copy the layer
        self._wrap(self._layer, "forward", self._recording)

    def _wrap(self, module: nn.Module, name: str, wrapper: Callable[..., Callable[..., Any]]) -> None:
        """Replace a method of this instance by ``wrapper(method, module)`` until :meth:`_leave`."""
        method = getattr(module, name)
        self._wrapped.append((module, name, vars(module).get(name, _ABSENT)))
        vars(module)[name] = functools.wraps(method)(wrapper(method, module))

    def _leave(self) -> None:
        while self._wrapped:
            module, name, before = self._wrapped.pop()
            if before is _ABSENT:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = before
        self._run.stop(self._trainer)
        self._run.cache.rows = None
        if self._trainer is not None:
            self._layer = self._trainer = self.last_output = self._calls = None
            self.distiller.cpu()  # as Lightning does with the module

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._trainer is not None:
            self._run.warn_of_lost_state(weights=True)
        self._leave()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave()

    # ---- a step -----------------------------------------------------------------------------------------------------

    def _taking_rows(self, look: Callable[..., Any], pl_module: LightningModule) -> Callable[..., Any]:
        return lambda batch, *args, **kwargs: look(self._run.cache.take_rows(batch), *args, **kwargs)

    def _recording(self, forward: Callable[..., Any], layer: nn.Module) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self._calls is None:
                return forward(*args, **kwargs)
            given = versions((args, kwargs))
            output = forward(*args, **kwargs)
            self._calls.append(StudentCall(args, kwargs, output, given, versions(output)))
            return output

        return recorded

    def _distilling(self, step: Callable[..., Any], pl_module: LightningModule) -> Callable[..., Any]:
        def training_step(*args: Any, **kwargs: Any) -> Any:
            self.last_output = None
            self._calls = calls = []
            try:
                output = step(*args, **kwargs)
            finally:
                self._calls = None
            task_loss = output.get("loss") if isinstance(output, Mapping) else output
            if not isinstance(task_loss, Tensor):
                return output  # a skipped step, or one that Lightning refuses
            learning = [call for call in calls if self.extract_logits(call.output).requires_grad]
            if not learning:
                raise RuntimeError(unseen(pl_module, self._student, calls, lambda: step(*args, **kwargs)))
            batch = args[0] if args else next(iter(kwargs.values()), None)
            self._run.cache.check_rows(self._run.cache.rows)
            out, _ = self._distil(choose(learning, self.forward_call, self._student), batch, task_loss)
            return {**output, "loss": out.loss} if isinstance(output, Mapping) else out.loss

        return training_step

    def _distil(self, call: StudentCall, batch: Any, task_loss: Tensor) -> tuple[DistillationOutput, Tensor | None]:
        """Return the output, and the targets or the mask of the valid positions."""
        logits = self.extract_logits(call.output)
        inputs = self._inputs(call, batch)
        if changed((logits, call.output), call.returned):
            raise RuntimeError(
                f"training_step changed the output of {self._student} in place, so its logits are gone: write "
                "x = x / 2, not x /= 2."
            )
        teacher_logits = self.distiller.teacher_logits(inputs, self._run.cache.rows, self.extract_logits)
        recorded: Any = lambda *_, **__: call.output  # noqa: E731  (the student has run already)
        student = self.distiller.run_student(lambda _: logits, recorded, inputs)
        if self.targets is None:
            targets = find_targets(batch, logits, self.distiller.class_dim)
        else:
            targets = as_targets(select(batch, self.targets, "targets"), logits.device)
        if targets is None and self._layer is not None:
            positions = logits.movedim(self.distiller.class_dim, -1).shape[:-1]
            targets = counting_positions(None, call.by_name(self._layer), positions)
        _, extra = take_extra(batch, self.distiller.batch_keys)
        given: dict[str, Any] = {"teacher_logits": teacher_logits, "task_loss": task_loss, "extra": extra}
        out = self.distiller(inputs, student, targets, self.progress, **given)
        check_scalar(out.loss)
        return out, targets

    def _inputs(self, call: StudentCall, batch: Any) -> Any:
        """Return the teacher's inputs: what ``inputs`` selects of the batch, or those of the student's call."""
        if self.inputs is not None:
            return select(batch, self.inputs, "inputs")
        if self._run.teacher.reads_batch:
            return batch
        if any(leaf.grad_fn is not None for leaf in tensors((call.args, call.kwargs))):
            raise RuntimeError(
                f"{self._student} is called with what the student computed, on which the teacher cannot be run. Say "
                "what the teacher gets: inputs=0 for the first part of the batch, or inputs=lambda batch: …"
            )
        if changed((call.args, call.kwargs), call.given):
            raise RuntimeError(
                f"training_step changed the inputs of {self._student} in place, so the teacher would see others than "
                "the student did. Make a copy there, or say what the teacher gets: inputs=lambda batch: …"
            )
        return call.inputs()

    @property
    def _student(self) -> str:
        return "forward" if self.student_layer is None else f"the layer {self.student_layer!r}"

    # ---- around the step --------------------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run.fit_optimizer(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._layer is not None
        check_batches(trainer)
        self._run.start(trainer, self._layer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run.start_epoch(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_batches(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run.progress(trainer)  # because a checkpoint may be written after the fit

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        out = self.last_output
        if out is None:
            return
        self._run.check_step(trainer, out)
        if is_logging_step(trainer):
            pl_module.log_dict(step_readings(trainer, out), batch_size=len(out.student_logits))

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        average_gradients(trainer, self.distiller)

    # ---- validation -------------------------------------------------------------------------------------------------

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last_output = None  # to free memory, because no callback needs it any more

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if self.validate and self._trainer is not None:
            self._calls = []

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        calls, self._calls = self._calls, None
        if calls is None:
            return
        if not calls:
            raise RuntimeError(
                f"validate=True compares student and teacher in validation, but validation_step did not call "
                f"{self._student}."
            )
        self.distiller.eval()
        with trainer.precision_plugin.val_step_context():
            no_loss = torch.zeros((), device=pl_module.device)
            out, counting = self._distil(choose(calls, self.forward_call, self._student), batch, no_loss)
        self.distiller.train()
        self._scores.update(pl_module, self.kd_loss, out, counting, dataloader_idx)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.validate and self._trainer is not None:
            self._scores.log(trainer, pl_module)

    # ---- state ------------------------------------------------------------------------------------------------------

    @property
    @override
    def state_key(self) -> str:
        """The key of the state in checkpoints: the name of the class.

        Before :meth:`setup` the key is unique, so that a Trainer takes two callbacks and :meth:`setup` refuses them.
        """
        return type(self).__qualname__ + ("" if self._is_set_up else f" {id(self)}")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**self._run.state_dict(self._trainer), "distiller": dict(self.distiller.state_dict())}

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("callbacks", {}).get(self.state_key, {})
        self._run.fit_policies(checkpoint, saved.get("distiller", {}))
        self._run.cache.resume(checkpoint)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._run.load_state_dict({name: value for name, value in state_dict.items() if name != "distiller"})
        self.distiller.load_state_dict(state_dict["distiller"])
