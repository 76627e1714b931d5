"""The Distiller: teacher, temperature, losses and weights in one module, for any training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from kd_lightning.functional import Scale, Temperature, predictive_entropy
from kd_lightning.functional.rows import loss_scale, valid_positions, without_padding
from kd_lightning.layers.terms import LayerResult, LayerTerm, LayerTerms
from kd_lightning.losses import CrossEntropyLoss, FusedLinearKDLoss, KDLoss
from kd_lightning.losses.logits import LogitLoss
from kd_lightning.schedules import as_schedule, weight_at
from kd_lightning.teachers import FrozenTeacher, HiddenStates, TeacherEnsemble, as_teacher
from kd_lightning.teachers.ensemble import LossTerm, Opinions
from kd_lightning.temperature import Progress, Schedule, Signals, TemperaturePolicy, as_policy
from kd_lightning.temperature.base import Temperatures

__all__ = ["DistillationOutput", "Distiller"]


@dataclass(frozen=True)
class DistillationOutput:
    """What one call of a :class:`Distiller` computed.

    Attributes:
        loss: ``kd_weight · kd_loss + task_weight · task_loss`` and the weighted ``layers``; call ``backward()`` on it.
        kd_loss: The distillation term, unweighted.
        task_loss: The task term, unweighted; 0 without targets.
        temperature: The temperatures of this batch, class dimension last; a tuple for a policy that gives several.
        student_logits: As they were given; ``(0, V)``, none, where hidden states were.
        teacher_logits: In the student's layout, without gradient; of a :class:`TeacherEnsemble` the consensus; none
            likewise.
        kd_weight: The weight of the distillation term in this step.
        task_weight: The weight of the task term.
        scale_rule: The loss's rule for the factor ``scale`` where the temperature does not set it.
        class_dim: The class dimension of the logits.
        layers: What each :class:`LayerTerm` computed, by the student's layer; none in eval mode.
    """

    loss: Tensor
    kd_loss: Tensor
    task_loss: Tensor
    temperature: Temperatures
    student_logits: Tensor
    teacher_logits: Tensor
    kd_weight: float
    task_weight: float
    scale_rule: Scale = "student_teacher"
    class_dim: int = -1
    layers: dict[str, LayerResult] = field(default_factory=dict)

    @property
    def layer_losses(self) -> dict[str, Tensor]:
        """The terms between layers, unweighted, by the student's layer."""
        return {name: result.loss for name, result in self.layers.items()}

    @property
    def temperatures(self) -> tuple[Temperature, ...]:
        """The temperatures as a tuple, also where there is one."""
        return (self.temperature,) if isinstance(self.temperature, Temperature) else tuple(self.temperature)

    @property
    def effective_kd_weight(self) -> Tensor:
        """``kd_weight · scale``, averaged over the batch: the figure to compare between runs of different T."""
        scales = [loss_scale(temperature, self.scale_rule).detach().mean() for temperature in self.temperatures]
        return self.kd_weight * torch.stack(scales).mean()

    def readings(self) -> dict[str, Tensor]:
        """What is logged of the temperature, as float32 scalars on the logits' device: nothing waits for the device.

        ``temperature_student`` and ``temperature_teacher`` (means over the batch, and over the terms where a policy
        gives several), ``effective_kd_weight``, ``entropy_student`` and ``entropy_teacher`` (in nats, at the first
        term's temperatures; not where there were no logits), and ``temperature_<layer>`` for the terms between layers
        that have one.
        """
        first = self.temperatures[0]
        student_logits = self.student_logits.detach().movedim(self.class_dim, -1)
        teacher_logits = self.teacher_logits.movedim(self.class_dim, -1)
        values = {
            "temperature_student": torch.stack([t.student.detach().mean() for t in self.temperatures]).mean(),
            "temperature_teacher": torch.stack([t.teacher.detach().mean() for t in self.temperatures]).mean(),
            "effective_kd_weight": self.effective_kd_weight,
        }
        if len(student_logits):
            values["entropy_student"] = predictive_entropy(student_logits, first.student.detach()).mean()
            values["entropy_teacher"] = predictive_entropy(teacher_logits, first.teacher.detach()).mean()
        for name, result in self.layers.items():
            if (temperature := result.mean_temperature()) is not None:
                values[f"temperature_{name}"] = temperature
        return {name: value.float() for name, value in values.items()}


class Distiller(nn.Module):
    r"""All that a training step needs to distil: :math:`L = w_{kd} L_{kd} + w_{task} L_{task}`.

    .. code-block:: python

        student_logits = student(inputs)
        loss = distiller(inputs, student_logits, targets, progress).loss

    With ``layers``, terms between layers of both networks are added. The loop then runs within
    :meth:`attach`, and where a projector is needed it is built first:

    .. code-block:: python

        distiller.build_projectors(student, inputs)  # before the optimiser, which trains distiller.parameters() too
        with distiller.attach(student):
            ...

    The terms between layers are for training: in eval mode (``distiller.eval()``) they are left out of the loss.

    The teacher is held outside the module tree (see :class:`FrozenTeacher`): ``state_dict``, ``parameters`` and
    ``modules`` know the policy and the losses only, while ``to``, ``cuda``, ``half`` and the like reach the teacher.

    Args:
        teacher: A trained network, a :class:`FrozenTeacher` with its checkpoint, or a :class:`TeacherEnsemble` of
            several. None: give ``teacher_logits`` with every call.
        temperature: A number, a schedule, or a :class:`TemperaturePolicy`.
        kd_loss: ``(student_logits, teacher_logits, temperature, targets=...) -> scalar``, :class:`KDLoss` by default.
            Its attributes ``class_dim`` and ``ignore_index`` (−1 and −100 where it has none) say how logits are laid
            out and which targets do not count.
        task_loss: ``(student_logits, targets) -> scalar``, cross-entropy by default; logits of more than two dimensions
            are given with the class dimension second, as torch's losses take them.
        kd_weight: Number or schedule; not negative. Counts as 0 while the attribute ``kd_enabled`` is False.
        task_weight: Number or schedule; not negative.
        layers: Terms between layers of the student and the teacher, a :class:`LayerTerm` each. They count as 0 too
            while ``kd_enabled`` is False.

    Raises:
        TypeError: An argument is none of these.
        RuntimeError: On the call, layers that are not attached or not built, or a teacher that was not run.
        ValueError: A negative weight; and on the call whatever the losses and the policy object to, or a task weight
            without targets.

    Example:
        >>> student, network = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> _ = network.weight.data.mul_(3.0)  # stands for training
        >>> distiller = Distiller(teacher=network, temperature=4.0, kd_weight=0.9, task_weight=0.1)
        >>> inputs, targets = torch.ones(2, 4), torch.tensor([0, 2])
        >>> out = distiller(inputs, student(inputs), targets)
        >>> out.loss.backward()
        >>> out.temperature.student
        tensor([4.])
    """

    def __init__(
        self,
        teacher: nn.Module | FrozenTeacher | None,
        temperature: float | Schedule | TemperaturePolicy | Callable[[Progress], float] = 4.0,
        kd_loss: nn.Module | None = None,
        task_loss: nn.Module | None = None,
        kd_weight: float | Schedule | Callable[[Progress], float] = 0.9,
        task_weight: float | Schedule | Callable[[Progress], float] = 0.1,
        layers: Sequence[LayerTerm] | None = None,
    ) -> None:
        super().__init__()
        self.teacher = as_teacher(teacher)
        self.temperature = as_policy(temperature)
        self.kd_loss = KDLoss() if kd_loss is None else kd_loss
        self.task_loss = CrossEntropyLoss(ignore_index=self.task_ignore_index) if task_loss is None else task_loss
        self.kd_weight = as_schedule(kd_weight)
        self.kd_enabled = True
        self.task_weight = as_schedule(task_weight)
        self.layers = LayerTerms(layers or ())
        if len(self.layers) and self.teacher is not None and self.teacher.caches:
            raise ValueError(
                "layers need the features of a teacher that runs, and a cache keeps its logits only. Leave out the "
                "cache, or the layers."
            )
        ensemble = self.teacher if isinstance(self.teacher, TeacherEnsemble) else None
        self.teacher_temperatures = nn.ModuleList(ensemble.temperatures if ensemble else ())
        if ensemble and ensemble.combine == "probs" and not getattr(self.kd_loss, "compares_distributions", True):
            raise ValueError(
                f"{type(self.kd_loss).__name__} sees logits without a softmax, and combine='probs' mixes what softmax "
                "gives. Take TeacherEnsemble(..., combine='logits') or combine='losses'."
            )
        if isinstance(self.kd_loss, FusedLinearKDLoss):
            self._check_fused()

    @property
    def class_dim(self) -> int:
        """The class dimension of the logits, as the distillation loss has it."""
        return getattr(self.kd_loss, "class_dim", -1)

    @property
    def ignore_index(self) -> int | None:
        """The target value of positions that do not count, as the distillation loss has it."""
        return getattr(self.kd_loss, "ignore_index", -100)

    @property
    def task_ignore_index(self) -> int:
        """The target value of positions without a label: ``ignore_index``, or −100 where distillation ignores none."""
        return -100 if self.ignore_index is None else self.ignore_index

    @override
    def forward(
        self,
        inputs: Any,
        student_logits: Tensor | HiddenStates,
        targets: Tensor | None = None,
        progress: Progress | None = None,
        *,
        teacher_logits: Tensor | Sequence[Tensor] | None = None,
        index: Tensor | None = None,
        task_loss: Tensor | None = None,
    ) -> DistillationOutput:
        """Run the teacher, set the temperature, and weigh both losses.

        Args:
            inputs: What the teacher is called with: a tensor, a tuple, or a mapping of keywords.
            student_logits: ``(N, C)`` or any shape with a class dimension; for :class:`FusedLinearKDLoss` what
                :func:`~kd_lightning.teachers.hidden_states` gives.
            targets: What the task loss takes. None: no task loss, which asks for ``task_weight=0`` or ``task_loss``.
            progress: Where training stands, for schedules.
            teacher_logits: Logits that are there already, of an ensemble one for each member; the teacher is not run.
            index: The samples' rows in the teacher's cache, as batches of ``teacher.index(dataset)`` carry them.
            task_loss: A task loss that is there already, such as the one that a Hugging Face model returns; the
                Distiller's own is not computed.
        """
        progress = progress or Progress()
        kd_weight = weight_at(self.kd_weight, progress, "kd_weight") if self.kd_enabled else 0.0
        task_weight = weight_at(self.task_weight, progress, "task_weight")
        if isinstance(student_logits, HiddenStates):
            if teacher_logits is not None or task_loss is not None:
                raise ValueError("hidden states go with a teacher that is run: leave teacher_logits and task_loss out.")
            return self._distil_fused(inputs, student_logits, targets, progress, kd_weight, task_weight)
        if teacher_logits is None:
            teacher_logits = self.teacher_logits(inputs, index)
        teacher_logits, opinions = self._consult(inputs, student_logits, teacher_logits, targets, progress)
        kd_loss, temperature = self._distil(student_logits, teacher_logits, targets, progress, opinions)
        if task_loss is None and targets is not None:
            task_loss = self.task_term(student_logits, targets)
        elif task_loss is None and task_weight == 0:
            task_loss = kd_loss.new_zeros(())
        elif task_loss is None:
            raise ValueError(_no_targets(task_weight))
        loss = kd_weight * kd_loss + task_weight * task_loss
        layers = self._layer_terms(progress)
        for term in layers.values():
            loss = loss + term.weight * term.loss
        return DistillationOutput(
            loss=loss,
            kd_loss=kd_loss,
            task_loss=task_loss,
            temperature=temperature,
            student_logits=student_logits,
            teacher_logits=teacher_logits,
            kd_weight=kd_weight,
            task_weight=task_weight,
            scale_rule=getattr(self.kd_loss, "scale", "student_teacher"),
            class_dim=self.class_dim,
            layers=layers,
        )

    def _layer_terms(self, progress: Progress) -> dict[str, LayerResult]:
        if self.training and len(self.layers):
            return self.layers(progress, self.kd_enabled)
        self.layers.clear()
        return {}

    def attach(self, student: nn.Module) -> ExitStack:
        """Put hooks on the layers of student and teacher; the ``with`` statement, or :meth:`detach`, takes them off.

        Raises:
            ValueError: There is no teacher, or no layer of that name.
        """
        if len(self.layers):
            self.layers.attach(student, self._required_teacher())
        stack = ExitStack()
        stack.callback(self.detach)
        return stack

    def detach(self) -> None:
        """Take the hooks of :meth:`attach` off."""
        self.layers.detach()

    def build_projectors(self, student: nn.Module, inputs: Any) -> None:
        """Make the projectors that ``layers`` need, if any, from the shapes that a first batch has.

        Call it before the optimiser is made, which is to train ``distiller.parameters()`` too. One forward of each
        network, in eval mode and without gradient; weights, buffers and random numbers are afterwards as they were.

        Args:
            student: The student.
            inputs: Inputs of a batch; two samples will do.

        Raises:
            ValueError: There is no teacher, no layer of that name, or features that no projector joins.
        """
        if not self.layers.built:
            self.layers.build(student, self._required_teacher(), inputs)

    def policies(self) -> dict[str, TemperaturePolicy]:
        """All temperature policies by their names as submodules: that of the logits, those of an
        ensemble's teachers that have one of their own, and those of the layers.
        """
        named = {"temperature": self.temperature}
        for index, policy in enumerate(self.teacher_temperatures):
            assert isinstance(policy, TemperaturePolicy)
            named[f"teacher_temperatures.{index}"] = policy
        for index, term in enumerate(self.layers):
            if term.temperature is not None:
                named[f"layers.{index}.temperature"] = term.temperature
        return named

    @property
    def _members_policies(self) -> list[TemperaturePolicy]:
        return [*self.teacher_temperatures]  # pyright: ignore[reportReturnType]

    def _required_teacher(self) -> FrozenTeacher:
        if self.teacher is None:
            raise ValueError("this Distiller has no teacher: layers need one that runs.")
        return self.teacher

    def teacher_logits(self, inputs: Any, index: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """The teacher's logits for these inputs, without gradient; of an ensemble one for each member.

        Args:
            inputs: What the teacher is called with.
            index: The samples' rows in its cache, which is read if there is one.

        Raises:
            ValueError: There is no teacher.
        """
        if self.teacher is None:
            raise ValueError("this Distiller has no teacher: give one, or pass teacher_logits with each call.")
        return self.teacher.logits(inputs, index)

    def consensus(
        self,
        inputs: Any,
        teacher_logits: Tensor | Sequence[Tensor],
        targets: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """What policies and metrics see as the teacher's logits: those of one as they are, an ensemble's common ones.

        Args:
            inputs: What the teacher was called with.
            teacher_logits: What :meth:`teacher_logits` gave.
            targets: Of the batch, for weights and routing by label.
            progress: Where training stands; at its start by default.
        """
        one = teacher_logits if isinstance(teacher_logits, Tensor) else teacher_logits[0]
        progress = progress or Progress(max_steps=1, max_epochs=1)
        return self._consult(inputs, one, teacher_logits, targets, progress)[0]

    def task_term(self, student_logits: Tensor, targets: Tensor) -> Tensor:
        """The task loss, unweighted."""
        logits = student_logits.movedim(self.class_dim, 1) if student_logits.dim() > 2 else student_logits
        return self.task_loss(logits, targets)

    def _consult(
        self,
        inputs: Any,
        student_logits: Tensor,
        teacher_logits: Tensor | Sequence[Tensor],
        targets: Tensor | None,
        progress: Progress,
    ) -> tuple[Tensor, Opinions | None]:
        """What policies and metrics see as the teacher's logits; and what the members of an ensemble say."""
        class_dim = self.class_dim
        if not isinstance(self.teacher, TeacherEnsemble):
            assert isinstance(teacher_logits, Tensor)
            return without_padding(student_logits, teacher_logits, class_dim), None
        members = [without_padding(student_logits, z, class_dim).movedim(class_dim, -1) for z in teacher_logits]
        student_last = student_logits.movedim(class_dim, -1)
        signals = Signals(student_last, student_last, targets, progress, self.ignore_index)
        opinions = self.teacher.weigh(members, signals, inputs)
        return opinions.consensus.movedim(-1, class_dim), opinions

    def _distil(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        targets: Tensor | None,
        progress: Progress,
        opinions: Opinions | None = None,
    ) -> tuple[Tensor, Temperatures]:
        if student_logits.shape != teacher_logits.shape:  # before a policy stumbles over it with a lesser message
            raise ValueError(
                f"student and teacher logits must have the same shape, got {tuple(student_logits.shape)} and "
                f"{tuple(teacher_logits.shape)}: give both models the same classes and inputs."
            )
        class_dim = self.class_dim
        student_last, teacher_last = student_logits.movedim(class_dim, -1), teacher_logits.movedim(class_dim, -1)
        policy = self.temperature
        signals = Signals(student_last, teacher_last, targets, progress, self.ignore_index)
        temperature = policy(signals)
        student = policy.transform(student_last).movedim(-1, class_dim)
        single = isinstance(temperature, Temperature)
        if opinions is None:
            teacher = policy.transform(teacher_last)
            terms = [LossTerm(teacher, term) for term in ((temperature,) if single else temperature)]
        else:
            assert isinstance(self.teacher, TeacherEnsemble)
            terms, used = self.teacher.loss_terms(
                opinions, signals, (temperature,) if single else temperature, policy, self._members_policies
            )
            temperature = used[0] if single else used
        losses = [self._term(student, term, targets) for term in terms]
        return (losses[0] if len(losses) == 1 else torch.stack(losses).sum()), temperature

    def _term(self, student: Tensor, term: LossTerm, targets: Tensor | None) -> Tensor:
        class_dim = self.class_dim
        teacher, temperature = (
            term.logits.movedim(-1, class_dim),
            _to_layout(term.temperature, class_dim, student.dim()),
        )
        if term.weight is None or term.weight.numel() == 1:
            loss = self.kd_loss(student, teacher, temperature, targets=targets)
            return loss if term.weight is None else loss * term.weight.squeeze()
        if not isinstance(self.kd_loss, LogitLoss):
            raise TypeError(
                "combine='losses' with weights by row needs the loss of each row: derive "
                f"{type(self.kd_loss).__name__} from kd_lightning.losses.LogitLoss, or take combine='probs'."
            )
        rows = self.kd_loss(student, teacher, temperature, targets=targets, reduction="none") * term.weight.squeeze(-1)
        if self.kd_loss.reduction == "none":
            return rows
        valid = valid_positions(targets, student, class_dim, self.ignore_index)
        mean = self.kd_loss.reduction == "mean"
        count = 1 if not mean else rows.numel() if valid is None else valid.sum().clamp(min=1)
        return rows.sum() / count

    # ---- from hidden states ---------------------------------------------------------------------------------------

    def _check_fused(self) -> None:
        policy, task, kd_loss = self.temperature, self.task_loss, self.kd_loss
        if isinstance(self.teacher, TeacherEnsemble) or len(self.layers) or (self.teacher and self.teacher.caches):
            raise ValueError(
                "FusedLinearKDLoss takes the hidden states of one teacher that runs: no ensemble, no cache and no "
                "layers go with it. Take KDLoss."
            )
        if self.class_dim != -1 or getattr(kd_loss, "reduction", "mean") != "mean":
            raise ValueError(f"from hidden states the classes are last and the loss is a mean, got {kd_loss!r}.")
        parts = [part for part in policy.modules() if isinstance(part, TemperaturePolicy)]
        if any(part.reads_logits or type(part).transform is not TemperaturePolicy.transform for part in parts):
            raise ValueError(
                f"FusedLinearKDLoss never has the logits, but the temperature {policy!r} is computed from them or "
                "changes them. Take a number, a schedule or LearnableTemperature, or KDLoss."
            )
        if (
            type(task) is not CrossEntropyLoss
            or (task.ignore_index, task.label_smoothing, task.reduction) != (self.task_ignore_index, 0.0, "mean")
            or task.weight is not None
        ):
            raise ValueError(
                f"FusedLinearKDLoss computes the cross-entropy along with the divergence, so task_loss must be the "
                f"default, got {task!r}. Leave task_loss out, or take KDLoss."
            )

    def _distil_fused(
        self,
        inputs: Any,
        student: HiddenStates,
        targets: Tensor | None,
        progress: Progress,
        kd_weight: float,
        task_weight: float,
    ) -> DistillationOutput:
        kd_loss = self.kd_loss
        if not isinstance(kd_loss, FusedLinearKDLoss) or self.teacher is None:
            raise ValueError(
                f"hidden states are for FusedLinearKDLoss and a teacher, got {type(kd_loss).__name__} and "
                f"{type(self.teacher).__name__}. Give logits."
            )
        self._check_fused()  # the temperature may have been replaced
        if targets is None and task_weight:
            raise ValueError(_no_targets(task_weight))
        shape = (*student.hidden.shape[:-1], student.weight.shape[0])
        no_logits = student.hidden.new_zeros((), dtype=torch.float32).expand(shape)  # a shape, no memory
        temperature = self.temperature(Signals(no_logits, no_logits, targets, progress, self.ignore_index))
        if not isinstance(temperature, Temperature):
            raise ValueError(f"FusedLinearKDLoss takes one temperature, but {self.temperature!r} gives several.")
        teacher = self.teacher.hidden_states(inputs)
        terms = kd_loss.from_hidden(student, teacher, temperature, targets, kd_weight, task_weight)
        return DistillationOutput(
            *terms,
            temperature=temperature,
            student_logits=student.hidden.new_empty(0, shape[-1]),
            teacher_logits=student.hidden.new_empty(0, shape[-1]),
            kd_weight=kd_weight,
            task_weight=task_weight,
            scale_rule=kd_loss.scale,
        )

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        super()._apply(fn, recurse)
        if self.teacher is not None:
            self.teacher._apply(fn)
        return self

    @override
    def extra_repr(self) -> str:
        off = "" if self.kd_enabled else " (off)"
        return f"teacher={self.teacher!r}, kd_weight={self.kd_weight}{off}, task_weight={self.task_weight}"


def _no_targets(task_weight: float) -> str:
    return (
        f"task_weight is {task_weight:g} but the batch has no targets. Give targets or a task_loss, or set "
        "task_weight=0 to learn from the teacher alone."
    )


def _to_layout(temperature: Temperature, class_dim: int, rank: int) -> Temperature:
    """From class-last, as policies give it, to the layout of the logits."""

    def move(value: Tensor) -> Tensor:
        return value.movedim(-1, class_dim) if value.dim() == rank else value

    scale = None if temperature.scale is None else move(temperature.scale)
    return Temperature(move(temperature.student), move(temperature.teacher), scale)
