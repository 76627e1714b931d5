"""The output of a Distiller, and the readings that are logged from it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kd_lightning.functional import Temperature, predictive_entropy
from kd_lightning.functional.rows import Scale, is_sharded, loss_scale
from kd_lightning.layers import LayerResult
from kd_lightning.temperature.base import Temperatures, as_terms, mean_temperature


@dataclass(frozen=True)
class DistillationOutput:
    """The result of one call of a :class:`~kd_lightning.Distiller`.

    Attributes:
        loss: ``kd_weight · kd_loss + task_weight · task_loss`` and the weighted ``layers``; call ``backward()`` on it.
        kd_loss: The distillation term, unweighted.
        task_loss: The task term, unweighted; 0 without targets.
        temperature: The temperatures of this batch, class dimension last; a tuple for a policy that gives several.
        student_logits: As they were given; empty, ``(0, V)``, where hidden states were given.
        teacher_logits: In the student's layout, without gradient; an ensemble's consensus; empty likewise, and where
            the teacher gave :class:`~kd_lightning.functional.Sparse` targets.
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
        """Return the terms between layers, unweighted, by the student's layer."""
        return {name: result.loss for name, result in self.layers.items()}

    @property
    def temperatures(self) -> tuple[Temperature, ...]:
        """Return the temperatures as a tuple, even of one."""
        return as_terms(self.temperature)

    @property
    def effective_kd_weight(self) -> Tensor:
        """Return ``kd_weight · scale``, averaged over the batch: compare it between runs of different T."""
        scales = [loss_scale(temperature, self.scale_rule).detach().mean() for temperature in self.temperatures]
        return self.kd_weight * torch.stack(scales).mean()

    def readings(self) -> dict[str, Tensor]:
        """Return what is logged of the temperature, as float32 scalars on the logits' device, without a host sync.

        ``temperature_student`` and ``temperature_teacher`` (means over the batch, and over the terms where a policy
        gives several), ``effective_kd_weight``, ``entropy_student`` and ``entropy_teacher`` (in nats, at the first
        term's temperatures; not where there were no logits), and ``temperature_<layer>`` for the terms between layers
        that have one.
        """
        first = self.temperatures[0]
        student_logits = self.student_logits.detach().movedim(self.class_dim, -1)
        teacher_logits = self.teacher_logits.movedim(self.class_dim, -1)
        values = {
            "temperature_student": mean_temperature(self.temperature),
            "temperature_teacher": mean_temperature(self.temperature, "teacher"),
            "effective_kd_weight": self.effective_kd_weight,
        }
        if len(student_logits) and not is_sharded(student_logits, teacher_logits):
            values["entropy_student"] = predictive_entropy(student_logits, first.student.detach()).mean()
        if len(teacher_logits) and not is_sharded(student_logits, teacher_logits):
            values["entropy_teacher"] = predictive_entropy(teacher_logits, first.teacher.detach()).mean()
        for name, result in self.layers.items():
            if result.temperature is not None:
                values[f"temperature_{name}"] = mean_temperature(result.temperature)
        return {name: value.float() for name, value in values.items()}
