"""The Distiller: teacher, temperature, losses and weights in one module, for any training loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from kd_lightning.functional import Scale, Temperature, loss_scale, predictive_entropy, without_padding
from kd_lightning.losses import CrossEntropyLoss, KDLoss
from kd_lightning.teachers import FrozenTeacher, as_teacher, extract_logits
from kd_lightning.temperature import Progress, Schedule, Signals, TemperaturePolicy, as_policy
from kd_lightning.temperature.base import Temperatures
from kd_lightning.temperature.schedules import as_schedule

__all__ = ["DistillationOutput", "Distiller"]


@dataclass(frozen=True)
class DistillationOutput:
    """What one call of a :class:`Distiller` computed.

    Attributes:
        loss: ``kd_weight · kd_loss + task_weight · task_loss``; call ``backward()`` on it.
        kd_loss: The distillation term, unweighted.
        task_loss: The task term, unweighted; 0 without targets.
        temperature: The temperatures of this batch, class dimension last; a tuple for a policy that gives several.
        student_logits: As they were given.
        teacher_logits: In the student's layout, without gradient.
        kd_weight: The weight of the distillation term in this step.
        task_weight: The weight of the task term.
        scale_rule: The loss's rule for the factor ``scale`` where the temperature does not set it.
        class_dim: The class dimension of the logits.
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
        term's temperatures).
        """
        first = self.temperatures[0]
        student_logits = self.student_logits.detach().movedim(self.class_dim, -1)
        teacher_logits = self.teacher_logits.movedim(self.class_dim, -1)
        values = {
            "temperature_student": torch.stack([t.student.detach().mean() for t in self.temperatures]).mean(),
            "temperature_teacher": torch.stack([t.teacher.detach().mean() for t in self.temperatures]).mean(),
            "effective_kd_weight": self.effective_kd_weight,
            "entropy_student": predictive_entropy(student_logits, first.student.detach()).mean(),
            "entropy_teacher": predictive_entropy(teacher_logits, first.teacher.detach()).mean(),
        }
        return {name: value.float() for name, value in values.items()}


class Distiller(nn.Module):
    r"""All that a training step needs to distil: :math:`L = w_{kd} L_{kd} + w_{task} L_{task}`.

    .. code-block:: python

        student_logits = student(inputs)
        loss = distiller(inputs, student_logits, targets, progress).loss

    The teacher is held outside the module tree (see :class:`FrozenTeacher`): ``state_dict``, ``parameters`` and
    ``modules`` know the policy and the losses only, while ``to``, ``cuda``, ``half`` and the like reach the teacher.

    Args:
        teacher: A trained network, or a :class:`FrozenTeacher` with its checkpoint. None: give ``teacher_logits`` with
            every call.
        temperature: A number, a schedule, or a :class:`TemperaturePolicy`.
        kd_loss: ``(student_logits, teacher_logits, temperature, targets=...) -> scalar``, :class:`KDLoss` by default.
            Its attributes ``class_dim`` and ``ignore_index`` (−1 and −100 where it has none) say how logits are laid
            out and which targets do not count.
        task_loss: ``(student_logits, targets) -> scalar``, cross-entropy by default; logits of more than two dimensions
            are given with the class dimension second, as torch's losses take them.
        kd_weight: Number or schedule; not negative. Counts as 0 while the attribute ``kd_enabled`` is False.
        task_weight: Number or schedule; not negative.

    Raises:
        TypeError: An argument is none of these.
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
    ) -> None:
        super().__init__()
        self.teacher = as_teacher(teacher)
        self.temperature = as_policy(temperature)
        self.kd_loss = KDLoss() if kd_loss is None else kd_loss
        self.task_loss = CrossEntropyLoss(ignore_index=self.task_ignore_index) if task_loss is None else task_loss
        self.kd_weight = as_schedule(kd_weight)
        self.kd_enabled = True
        self.task_weight = as_schedule(task_weight)

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
        student_logits: Tensor,
        targets: Tensor | None = None,
        progress: Progress | None = None,
        *,
        teacher_logits: Tensor | None = None,
        task_loss: Tensor | None = None,
    ) -> DistillationOutput:
        """Run the teacher, set the temperature, and weigh both losses.

        Args:
            inputs: What the teacher is called with: a tensor, a tuple, or a mapping of keywords.
            student_logits: ``(N, C)`` or any shape with a class dimension.
            targets: What the task loss takes. None: no task loss, which asks for ``task_weight=0`` or ``task_loss``.
            progress: Where training stands, for schedules.
            teacher_logits: Logits that are there already; the teacher is not run.
            task_loss: A task loss that is there already, such as the one that a Hugging Face model returns; the
                Distiller's own is not computed.
        """
        progress = progress or Progress()
        if teacher_logits is None:
            teacher_logits = self.teacher_logits(inputs)
        teacher_logits = without_padding(student_logits, teacher_logits, self.class_dim)
        kd_weight = _weight_at(self.kd_weight, progress, "kd_weight") if self.kd_enabled else 0.0
        task_weight = _weight_at(self.task_weight, progress, "task_weight")
        kd_loss, temperature = self._distil(student_logits, teacher_logits, targets, progress)
        if task_loss is None and targets is not None:
            task_loss = self.task_term(student_logits, targets)
        elif task_loss is None and task_weight == 0:
            task_loss = kd_loss.new_zeros(())
        elif task_loss is None:
            raise ValueError(
                f"task_weight is {task_weight:g} but the batch has no targets. Give targets or a task_loss, or set "
                "task_weight=0 to learn from the teacher alone."
            )
        return DistillationOutput(
            loss=kd_weight * kd_loss + task_weight * task_loss,
            kd_loss=kd_loss,
            task_loss=task_loss,
            temperature=temperature,
            student_logits=student_logits,
            teacher_logits=teacher_logits,
            kd_weight=kd_weight,
            task_weight=task_weight,
            scale_rule=getattr(self.kd_loss, "scale", "student_teacher"),
            class_dim=self.class_dim,
        )

    def teacher_logits(self, inputs: Any) -> Tensor:
        """The teacher's logits for these inputs, without gradient.

        Raises:
            ValueError: There is no teacher.
        """
        if self.teacher is None:
            raise ValueError("this Distiller has no teacher: give one, or pass teacher_logits with each call.")
        return extract_logits(self.teacher(inputs))

    def task_term(self, student_logits: Tensor, targets: Tensor) -> Tensor:
        """The task loss, unweighted."""
        logits = student_logits.movedim(self.class_dim, 1) if student_logits.dim() > 2 else student_logits
        return self.task_loss(logits, targets)

    def _distil(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor | None, progress: Progress
    ) -> tuple[Tensor, Temperatures]:
        if student_logits.shape != teacher_logits.shape:  # before a policy stumbles over it with a lesser message
            raise ValueError(
                f"student and teacher logits must have the same shape, got {tuple(student_logits.shape)} and "
                f"{tuple(teacher_logits.shape)}: give both models the same classes and inputs."
            )
        class_dim = self.class_dim
        student_last, teacher_last = student_logits.movedim(class_dim, -1), teacher_logits.movedim(class_dim, -1)
        policy = self.temperature
        temperature = policy(Signals(student_last, teacher_last, targets, progress, self.ignore_index))
        student = policy.transform(student_last).movedim(-1, class_dim)
        teacher = policy.transform(teacher_last).movedim(-1, class_dim)
        terms = (temperature,) if isinstance(temperature, Temperature) else temperature
        losses = [
            self.kd_loss(student, teacher, _to_layout(term, class_dim, student.dim()), targets=targets)
            for term in terms
        ]
        return (losses[0] if len(losses) == 1 else torch.stack(losses).sum()), temperature

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


def _weight_at(schedule: Callable[[Progress], float], progress: Progress, name: str) -> float:
    weight = schedule(progress)
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"{name} must be finite and not negative, but {schedule} gave {weight} at {progress}.")
    return weight


def _to_layout(temperature: Temperature, class_dim: int, rank: int) -> Temperature:
    """From class-last, as policies give it, to the layout of the logits."""

    def move(value: Tensor) -> Tensor:
        return value.movedim(-1, class_dim) if value.dim() == rank else value

    scale = None if temperature.scale is None else move(temperature.scale)
    return Temperature(move(temperature.student), move(temperature.teacher), scale)
