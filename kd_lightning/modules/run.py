"""A Distiller in a run of Lightning: what the module that distils and the callback that distils share."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from kd_lightning._lightning import callbacks_of, datamodule_of
from kd_lightning.distiller import DistillationOutput, Distiller
from kd_lightning.modules.between_ranks import check_replicas, distiller_state
from kd_lightning.modules.cached_rows import CachedRows
from kd_lightning.modules.checkpoint_fit import fit_optimizer, fit_policies
from kd_lightning.modules.non_finite import NonFiniteHandler, NonFiniteWatch
from kd_lightning.modules.readings import is_logging_step
from kd_lightning.modules.run_length import RunLength
from kd_lightning.teachers import Teacher
from kd_lightning.teachers.indexed import index_training
from kd_lightning.temperature import Progress


class DistillationRun:
    """The state of a run that is not the Distiller's own: progress, checks of the teacher, and their checkpoint.

    Args:
        distiller: The Distiller of the run.
        owner: The name of the class that holds the Distiller, for messages.
    """

    def __init__(self, distiller: Distiller, owner: str) -> None:
        self.distiller = distiller
        self.distiller.keeps_output = True
        self.owner = owner
        self._length = RunLength()
        self._finite = NonFiniteWatch()
        self._last_progress = Progress(max_steps=1, max_epochs=1)  # at the start of a run
        self._restored: dict[str, Any] = {}
        self._misfit: dict[str, Any] | None = None  # a checkpoint of other policies, until the optimiser is restored
        self._step_hooks: list[RemovableHandle] = []
        self._process = os.getpid()
        self._state_at_start: dict[str, Tensor] = {}
        self.cache = CachedRows(distiller)

    @property
    def teacher(self) -> Teacher:
        """The teacher of a run, which has one."""
        assert self.distiller.teacher is not None
        return self.distiller.teacher

    def progress(self, trainer: Trainer | None) -> Progress:
        """Return where training stands; outside of ``fit``, where the last fit or the checkpoint ended."""
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return self._last_progress
        max_epochs = trainer.max_epochs
        self._last_progress = Progress(
            step=trainer.global_step,
            max_steps=self._length.steps(trainer),
            epoch=trainer.current_epoch,
            max_epochs=max_epochs if max_epochs is not None and max_epochs >= 0 else None,
        )
        return self._last_progress

    def set_up(self, trainer: Trainer) -> None:
        """Check the weights of the loss, load the teacher and show the data to cache and policies, before a fit."""
        self.cache.set_epoch(0)
        self.cache.index(trainer)
        self.distiller.check_trains()
        self.teacher.load()
        for policy in self.distiller.policies().values():
            policy.setup_data(datamodule_of(trainer))
        self._length = RunLength()
        self._finite = NonFiniteWatch()
        self._restored.pop("resumed_teacher", None)
        if os.getpid() != self._process:
            self._state_at_start = {name: value.clone() for name, value in self.distiller.state_dict().items()}
        rank_zero_info(f"Teacher: {self.teacher!r}, fingerprint {self.teacher.fingerprint()[:8]}")

    def set_up_evaluation(self, trainer: Trainer, stage: str) -> None:
        """Load the teacher's weights if they are there, and report if the student is measured without the teacher."""
        teacher = self.teacher
        if teacher.available():
            teacher.load()
        if not teacher.loaded or (stage == "test" and not teacher.runs):
            rank_zero_info(
                f"No teacher at {teacher.checkpoint}: the student is measured alone, without the losses and metrics "
                "that compare it with the teacher."
            )
        if stage == "validate" and teacher.loaded:
            self.cache.index(trainer)

    def check_student(self, student: nn.Module) -> None:
        """Raise if the student is no network, or shares parameters with the teacher."""
        check_network("student", student)
        teacher = self.distiller.teacher
        taught = set() if teacher is None else {id(parameter) for parameter in teacher.parameters()}
        shared = [name for name, parameter in student.named_parameters() if id(parameter) in taught]
        if shared:
            raise ValueError(
                f"student and teacher share parameters, and a teacher is frozen: {', '.join(shared[:5])}"
                f"{', …' if len(shared) > 5 else ''}. Give the teacher its own: copy.deepcopy(network)."
            )

    def follow(self, student: nn.Module) -> None:
        """Tell the teacher, if there is one, of the student."""
        if self.distiller.teacher is not None:
            self.distiller.teacher.follow(student)

    def can_ask(self, batch: Any) -> bool:
        """Return True if there is a teacher for a batch of evaluation, or a cache that has it."""
        teacher = self.distiller.teacher
        known = teacher is not None and teacher.loaded and (teacher.runs or self.cache.rows is not None)
        return known and self.teacher.serves(batch)

    def start(self, trainer: Trainer, student: nn.Module) -> None:
        """Check the teacher of a resumed run, and have it follow the optimiser's steps, when training begins."""
        self.cache.set_epoch(trainer.current_epoch)  # resumed in an epoch, no on_train_epoch_start comes
        self._check_resumed()
        self.follow(student)
        # a hook of the optimiser, because a checkpoint may be written before any later hook of the trainer
        with_hooks = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, Optimizer)]
        if len(with_hooks) < len(trainer.optimizers) and self.teacher.state_dict():  # it changes
            raise ValueError(
                f"{type(self.teacher).__name__} follows the optimiser's steps, which {type(trainer.strategy).__name__} "
                "hides. Take ddp, say, or a teacher that stays as it is."
            )
        self._step_hooks = [each.register_step_post_hook(lambda *_: self.teacher.update()) for each in with_hooks]

    def stop(self, trainer: Trainer | None) -> None:
        """Leave the optimisers and the data of the fit as they were."""
        if trainer is not None:
            index_training(datamodule_of(trainer), None)
        while self._step_hooks:
            self._step_hooks.pop().remove()

    def warn_of_lost_state(self, weights: bool) -> None:
        """Warn at the end of a fit if its state ends with this process, which ``ddp_fork`` or ``ddp_spawn`` started.

        Args:
            weights: Whether the Distiller's own state is lost too: Lightning brings home the module's state dict alone.
        """
        if os.getpid() == self._process:
            return
        state = self.distiller.state_dict() if weights else {}
        before = self._state_at_start
        lost = [name for name, value in state.items() if not torch.equal(value.cpu(), before[name].cpu())]
        lost += ["the teacher's state"] if self.teacher.state_dict() else []
        if lost:
            rank_zero_warn(
                f"ddp_fork and ddp_spawn train in processes that end with fit, from which Lightning brings home the "
                f"module's weights alone: in the process that called fit, {self.owner} has {', '.join(lost)} as before "
                "it. Take strategy='ddp', or read the values from a checkpoint, which has them."
            )

    def check_step(self, trainer: Trainer, out: DistillationOutput) -> None:
        """Raise before backward if the student cannot learn, or if a loss is not finite and no callback handles it."""
        if out.student_logits.numel() and not out.student_logits.requires_grad:
            raise ValueError(
                "the student's logits carry no gradient, so the student would not learn: the network detaches them, "
                "runs under torch.no_grad(), or has no trained parameter before them. Return logits with a gradient."
            )
        if not any(isinstance(callback, NonFiniteHandler) for callback in callbacks_of(trainer)):
            self._finite.check(out, trainer.global_step, is_logging_step(trainer))

    def start_epoch(self, trainer: Trainer) -> None:
        """Check that ranks agree on temperature, weights and teacher, and select the cache's epoch. A collective."""
        if trainer.world_size > 1:
            check_replicas(trainer, distiller_state(self.distiller, self.progress(trainer)))
        self.cache.start_epoch(trainer)

    def _check_resumed(self) -> None:
        before = self._restored.pop("resumed_teacher", None)
        if before is not None and before["fingerprint"] != self.teacher.fingerprint():
            raise RuntimeError(
                f"this checkpoint was trained with the teacher {before['description']}, fingerprint "
                f"{before['fingerprint'][:8]}, but the teacher now is {self.teacher!r}, fingerprint "
                f"{self.teacher.fingerprint()[:8]}. Resume with the same teacher, or start a new run from the "
                "student's weights."
            )
        self.warn_of_changes()

    def state_dict(self, trainer: Trainer | None) -> dict[str, Any]:
        """Return the checkpoint's record of the run: tensors and primitives only."""
        teacher = self.distiller.teacher
        saved: dict[str, Any] = {
            "progress": vars(self.progress(trainer)),
            "configuration": self._configuration(),
            "kd_enabled": self.distiller.kd_enabled,
            "projectors": [term.shapes for term in self.distiller.layers],
        }
        if teacher is not None and teacher.loaded:
            saved["teacher"] = {"fingerprint": teacher.fingerprint(), "description": repr(teacher)}
            saved |= {"teacher_state": state} if (state := teacher.state_dict()) else {}
        elif "teacher" in self._restored:
            saved["teacher"] = self._restored["teacher"]
        return saved

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore the progress; teacher and settings are compared when training starts."""
        self._restored = dict(saved)
        state = self._restored.pop("teacher_state", None)
        if state is not None and self.distiller.teacher is not None:
            self.distiller.teacher.load_state_dict(state)
        if "progress" in saved:
            self._last_progress = Progress(**saved["progress"])
        if "teacher" in saved:
            self._restored["resumed_teacher"] = saved["teacher"]
        self.distiller.kd_enabled = saved.get("kd_enabled", True)
        self.distiller.layers.rebuild(self._restored.pop("projectors", []))
        self.distiller.layers.to(self.distiller.temperature.multiplier.device)

    def fit_policies(self, checkpoint: dict[str, Any], *states: dict[str, Any], prefix: str = "") -> None:
        """Make a checkpoint of other temperature policies loadable: what fits is loaded, what does not is warned of.

        ``states`` are the Distiller's state dicts in the checkpoint, under ``prefix``, and are changed in place.
        """
        self._misfit = None
        for state in states:
            left_out, kept = fit_policies(state, self.distiller.policies(), prefix)
            if left_out or kept:
                self._misfit = checkpoint
                parts = [f"{', '.join(sorted(left_out))} left out"] if left_out else []
                parts += [f"{', '.join(sorted(kept))} as given now"] if kept else []
                rank_zero_warn(
                    f"the checkpoint's temperature policies hold other state than those of this run: "
                    f"{'; '.join(parts)}. To go on as before, give {self.owner} the same temperature."
                )

    def fit_optimizer(self, trainer: Trainer) -> None:
        """Start the optimiser's state of policies that differ from the checkpoint's anew, before it is restored."""
        checkpoint, self._misfit = self._misfit, None
        if checkpoint is not None:
            fit_optimizer(checkpoint, trainer, self.distiller.policies().values())

    def warn_of_changes(self) -> None:
        """Warn once of each setting that differs from the checkpoint's."""
        now = self._configuration()
        for name, before in self._restored.pop("configuration", {}).items():
            if now.get(name) != before:
                rank_zero_warn(
                    f"the checkpoint was trained with {name}={before}, but now {name}={now.get(name)}, "
                    f"which is used from here on. To go on as before, give {self.owner} the same {name}."
                )

    def _configuration(self) -> dict[str, str]:
        distiller = self.distiller
        parts = {
            "temperature": distiller.temperature,
            "kd_loss": distiller.kd_loss,
            "kd_weight": distiller.kd_weight,
            "task_weight": distiller.task_weight,
            "layers": list(distiller.layers),
        }
        settings = "" if distiller.teacher is None else distiller.teacher.settings
        return {name: repr(part) for name, part in parts.items()} | ({"teacher": settings} if settings else {})


def check_network(name: str, value: object) -> None:
    """Raise if the network to train is no nn.Module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, the network to train, got {value!r}. Build the network first.")


def _of_distiller(name: str, doc: str) -> Any:
    def get(self: HoldsDistiller) -> Any:
        return getattr(self.distiller, name)

    def set(self: HoldsDistiller, value: Any) -> None:
        setattr(self.distiller, name, value)

    return property(get, set, doc=doc)


class HoldsDistiller:
    """The settings of a Distiller, read and set on the object that holds it."""

    distiller: Distiller
    teacher: Any = _of_distiller("teacher", "The :class:`~kd_lightning.teachers.Teacher`, or None.")
    temperature: Any = _of_distiller("temperature", "The temperature policy.")
    kd_loss: Any = _of_distiller("kd_loss", "The distillation loss.")
    kd_weight: Any = _of_distiller("kd_weight", "The schedule of the distillation term's weight.")
    task_weight: Any = _of_distiller("task_weight", "The schedule of the task term's weight.")
    last_output: Any = _of_distiller(
        "last_output", "The output for the current training batch, until the ``on_train_batch_end`` of callbacks."
    )

    @property
    def progress(self) -> Progress:
        """The progress of training."""
        raise NotImplementedError

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, (nn.Module, Tensor)) and isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)  # because nn.Module registers a network past the property
        else:
            super().__setattr__(name, value)
