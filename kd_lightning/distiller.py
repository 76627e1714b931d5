"""The Distiller: teacher, temperature, losses and weights in one module, for any training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from kd_lightning.distiller_parts import DistillerParts
from kd_lightning.functional import Temperature
from kd_lightning.functional.rows import check_labels, plain
from kd_lightning.functional.sparse import TeacherTarget
from kd_lightning.layers import LayerTerm, LayerTerms
from kd_lightning.losses import CrossEntropyLoss, KDLoss
from kd_lightning.losses.first_batch import check_first_batch
from kd_lightning.losses.task import as_targets, check_targets, is_readable, task_term
from kd_lightning.output import DistillationOutput
from kd_lightning.schedules import ConstantSchedule, Progress, Schedule, as_schedule, weight_at
from kd_lightning.teachers import Opinions, Teacher, extract_logits
from kd_lightning.teachers.calls import HiddenStates, by_name, check_sequence, counting_positions
from kd_lightning.teachers.frozen import as_teacher
from kd_lightning.temperature import Signals, TemperaturePolicy, as_policy
from kd_lightning.temperature.base import Temperatures, as_terms


class Distiller(DistillerParts):
    r"""The distillation part of a training step: :math:`L = w_{kd} L_{kd} + w_{task} L_{task}`.

    .. code-block:: python

        student_logits = student(inputs)
        loss = distiller(inputs, student_logits, targets, progress).loss

    With ``layers``, terms between layers of both networks are added, but in eval mode. Call :meth:`build_projectors`
    before the optimiser is made, and run the loop within :meth:`attach`.

    The teacher is held outside the module tree (see :class:`FrozenTeacher`): ``state_dict``, ``parameters`` and
    ``modules`` know the policy and the losses only, while ``to``, ``cuda``, ``half`` and the like reach the teacher.

    Args:
        teacher: A trained network, or a :class:`~kd_lightning.teachers.Teacher` such as :class:`FrozenTeacher` with its
            checkpoint or :class:`TeacherEnsemble`; ``"batch:<key>"``: logits that each batch has. None:
            give ``teacher_logits`` with every call.
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
        TypeError: If an argument is none of these.
        RuntimeError: On the call, if the layers are not attached or not built, or the teacher was not run.
        ValueError: If a weight is negative, or the teacher cannot serve the loss or the layers; on the call, if the
            losses or the policy object, or a task weight has no targets.

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
        teacher: nn.Module | Teacher | str | None,
        temperature: float | Schedule | TemperaturePolicy | Callable[[Progress], float] = 4.0,
        kd_loss: nn.Module | None = None,
        task_loss: nn.Module | None = None,
        kd_weight: float | Schedule | Callable[[Progress], float] = 0.9,
        task_weight: float | Schedule | Callable[[Progress], float] = 0.1,
        layers: Sequence[LayerTerm] | None = None,
    ) -> None:
        super().__init__()
        self.kd_enabled = True
        self.input_names: Sequence[str] = ()  # of inputs given by position, for a mask among them
        self.kd_loss = KDLoss(ignore_index=getattr(task_loss, "ignore_index", -100)) if kd_loss is None else kd_loss
        self.task_loss = CrossEntropyLoss(ignore_index=self.task_ignore_index) if task_loss is None else task_loss
        self.layers = LayerTerms(layers or ())
        self.kd_weight = as_schedule(kd_weight, "kd_weight")
        self.task_weight = as_schedule(task_weight, "task_weight")
        self.temperature = as_policy(temperature)
        self.teacher = as_teacher(teacher)
        self.check_trains()

    @override
    def forward(
        self,
        inputs: Any,
        student_logits: Tensor | HiddenStates,
        targets: Tensor | None = None,
        progress: Progress | None = None,
        *,
        teacher_logits: TeacherTarget | Sequence[TeacherTarget] | None = None,
        index: Tensor | None = None,
        task_loss: Tensor | None = None,
        extra: Mapping[Any, Any] | None = None,
    ) -> DistillationOutput:
        """Run the teacher, set the temperature, and weigh both losses.

        Args:
            inputs: What the teacher is called with: a tensor, a tuple, or a mapping of keywords.
            student_logits: ``(N, C)`` or any shape with a class dimension; a
                :class:`~kd_lightning.fused_distiller.FusedDistiller` takes hidden states too.
            targets: What the task loss takes. None: no task loss, which asks for ``task_weight=0`` or ``task_loss``;
                the ``attention_mask`` of the inputs, if any, then says which positions count. With ``task_loss``
                they may be a boolean mask of the positions that count.
            progress: Where training stands, for schedules.
            teacher_logits: Logits or :class:`~kd_lightning.functional.Sparse` targets that are there already, of an
                ensemble one for each member; the teacher is not run.
            index: The samples' rows in the teacher's cache, as batches of ``teacher.index(dataset)`` carry them.
            task_loss: A task loss that is there already, such as the one that a Hugging Face model returns; the
                Distiller's own is not computed.
            extra: The parts of the batch that the temperature reads, by their keys; see :attr:`batch_keys`.
        """
        progress = progress or Progress()
        if not isinstance(student_logits, Tensor):
            given = {"teacher_logits": teacher_logits, "index": index, "task_loss": task_loss}
            return self._from_output(inputs, student_logits, targets, progress, extra or {}, given)
        targets = as_targets(targets, student_logits.device, may_be_mask=task_loss is not None)
        kd_weight, task_weight = self._weights(progress)
        if teacher_logits is None:
            teacher_logits = self._teaching.logits(inputs, index)
        student_logits, teacher_logits = plain(student_logits), plain(teacher_logits)
        check_labels(targets, student_logits, self.class_dim, self.task_ignore_index)
        first = is_readable() and not self.looked_at
        if first:
            self.looked_at = True
            self._check_first_batch(student_logits, teacher_logits, targets if task_loss is None else None)
        student = student_logits.movedim(self.class_dim, -1)
        named = by_name(inputs, self.input_names)
        counting = counting_positions(targets, named, student.shape[:-1])
        if first and counting is None:
            check_sequence(student_logits, self.class_dim, inputs)
        signals = Signals(student, student, counting, progress, self.ignore_index, extra=extra or {})
        opinions = self._teaching.opinions(teacher_logits, signals, self.class_dim, inputs)
        kd_loss, temperature = self._distil(opinions.seen(signals), opinions)
        if task_loss is None and targets is not None:
            task_loss = self.task_term(student_logits, targets)
        elif task_loss is None:
            check_targets(targets, task_weight)
            task_loss = kd_loss.new_zeros(())
        layers = self.layers(signals, self.kd_enabled, named)
        loss = kd_weight * kd_loss + task_weight * task_loss
        for term in layers.values():
            loss = loss + term.weight * term.loss
        output = DistillationOutput(
            loss=loss,
            kd_loss=kd_loss,
            task_loss=task_loss,
            temperature=temperature,
            student_logits=student_logits,
            teacher_logits=opinions.shown.movedim(-1, self.class_dim),
            kd_weight=kd_weight,
            task_weight=task_weight,
            scale_rule=getattr(self.kd_loss, "scale", "student_teacher"),
            class_dim=self.class_dim,
            layers=layers,
        )
        return self._keep(output)

    def _from_output(
        self,
        inputs: Any,
        student: HiddenStates,
        targets: Tensor | None,
        progress: Progress,
        extra: Mapping[Any, Any],
        given: Mapping[str, Tensor | Sequence[TeacherTarget] | None],
    ) -> DistillationOutput:
        """Distil from an output that is no logits; ``given`` are the call's other arguments. This Distiller raises."""
        raise ValueError(
            f"the student's logits must be a tensor, got {type(student).__name__}: hidden states are for "
            "FusedLinearKDLoss in a FusedDistiller. Give logits."
        )

    def run_student(self, logits: Callable[[Any], Tensor], network: nn.Module, inputs: Any) -> Any:
        """Return what the call takes of the student: its ``logits``, or what another Distiller takes of the network."""
        return logits(inputs)

    def teacher_logits(
        self, inputs: Any, index: Tensor | None = None, extract: Callable[[Any], Tensor] = extract_logits
    ) -> Any:
        """Return what :meth:`Teacher.logits` gives: logits without gradient, of an ensemble one for each member."""
        return self._teaching.logits(inputs, index, extract)

    def consensus(
        self,
        inputs: Any,
        teacher_logits: TeacherTarget | Sequence[TeacherTarget],
        targets: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Return the logits of a single teacher, or an ensemble's consensus, from what :meth:`teacher_logits` returned.

        The targets are for weights and routing by label; the progress is the start of a training by default.
        """
        member = self._teaching.in_classes(teacher_logits, self.class_dim)[0]
        progress = progress or Progress(max_steps=1, max_epochs=1)
        signals = Signals(member, member, targets, progress, self.ignore_index)
        opinions = self._teaching.opinions(teacher_logits, signals, self.class_dim, inputs)
        return opinions.consensus.movedim(-1, self.class_dim)

    def task_term(self, student_logits: Tensor, targets: Tensor) -> Tensor:
        """Return the task loss, unweighted."""
        logits = student_logits.movedim(self.class_dim, 1) if student_logits.dim() > 2 else student_logits
        return task_term(self.task_loss, logits, targets)

    def _distil(self, signals: Signals, opinions: Opinions) -> tuple[Tensor, Temperatures]:
        """Return the distillation loss, and the temperatures of its terms, class dimension last."""
        policy = self.temperature
        temperature = policy(signals)
        own: Any = [*self.teacher_temperatures]
        terms, used = self._teaching.loss_terms(opinions, signals, as_terms(temperature), policy, own)
        student = policy.transform(signals.student_logits)
        losses = [
            term.loss(self.kd_loss, student, signals.targets, self.class_dim, self.ignore_index) for term in terms
        ]
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        return loss, used[0] if isinstance(temperature, Temperature) else tuple(used)

    def _check_first_batch(self, student: Tensor, teacher: Any, targets: Tensor | None) -> None:
        members = self._teaching.members(teacher)
        softened = getattr(self.kd_loss, "compares_distributions", False)
        trains = self.teacher is not None and self.training and torch.is_grad_enabled()
        check_first_batch(student, members, self.class_dim, softened, self.task_loss, targets, trains)

    def check_trains(self) -> None:
        """Raise if no term of the loss has a weight.

        Raises:
            ValueError: If both weights are 0 throughout, and there are no layers.
        """
        if (self.kd_weight, self.task_weight) == (ConstantSchedule(0), ConstantSchedule(0)) and not len(self.layers):
            raise ValueError("kd_weight and task_weight are both 0, which trains nothing. Give one of them a weight.")

    def _weights(self, progress: Progress) -> tuple[float, float]:
        kd_weight = weight_at(self.kd_weight, progress, "kd_weight") if self.kd_enabled else 0.0
        return kd_weight, weight_at(self.task_weight, progress, "task_weight")

    # ---- layers ---------------------------------------------------------------------------------------------------

    def attach(self, student: nn.Module) -> ExitStack:
        """Put hooks on the layers of student and teacher; the ``with`` statement, or :meth:`detach`, takes them off."""
        self.layers.attach(student, self._teaching)
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
        Two samples will do as ``inputs``.
        """
        self.layers.build(student, self._teaching, inputs)
