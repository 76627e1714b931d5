"""The Distiller for large vocabularies, which takes hidden states in place of logits while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from kd_lightning.distiller import Distiller
from kd_lightning.functional import Temperature
from kd_lightning.losses import CrossEntropyLoss, FusedLinearKDLoss
from kd_lightning.losses.task import check_targets
from kd_lightning.output import DistillationOutput
from kd_lightning.schedules import Progress
from kd_lightning.teachers import extract_logits
from kd_lightning.teachers.calls import HiddenStates, by_name, check_hidden_states, counting_positions, hidden_states
from kd_lightning.temperature import Signals


class FusedDistiller(Distiller):
    """A :class:`~kd_lightning.Distiller` for :class:`~kd_lightning.losses.FusedLinearKDLoss`.

    Called with the student's hidden states it runs the teacher up to its output layer and computes both terms a chunk
    of rows at a time. Called with logits, as in validation, it is the plain Distiller. Arguments are those of
    :class:`~kd_lightning.Distiller`; :class:`~kd_lightning.DistillationModule` takes this one for that loss by itself.

    Raises:
        ValueError: If the teacher is an ensemble or cached, layers are given, the temperature reads logits, or the loss
            or the task loss is not the one that the fused equation computes.

    Example:
        >>> from kd_lightning.models import CausalTransformer
        >>> student, teacher = CausalTransformer(dim=32, depth=1), CausalTransformer(dim=32, depth=1)
        >>> _ = [parameter.data.mul_(3.0) for parameter in teacher.parameters()]  # stands for training
        >>> distiller = FusedDistiller(teacher, 2.0, FusedLinearKDLoss(chunk_size=256))
        >>> tokens = torch.zeros(2, 5, dtype=torch.long)
        >>> distiller(tokens, hidden_states(student, tokens), tokens).loss.requires_grad
        True
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._heads_are_checked = False
        self._check()

    @override
    def run_student(self, logits: Callable[[Any], Tensor], network: nn.Module, inputs: Any) -> Any:
        if not self.training:
            return super().run_student(logits, network, inputs)
        if not self._heads_are_checked:
            check_hidden_states(network, inputs)
            self._teaching.hidden_states(inputs, check=True)
            self._heads_are_checked = True
        return hidden_states(network, inputs)

    @override
    def teacher_logits(
        self, inputs: Any, index: Tensor | None = None, extract: Callable[[Any], Tensor] = extract_logits
    ) -> Any:
        return None if self.training else super().teacher_logits(inputs, index, extract)

    @override
    def _from_output(
        self,
        inputs: Any,
        student: HiddenStates,
        targets: Tensor | None,
        progress: Progress,
        extra: Mapping[Any, Any],
        given: Mapping[str, Any],
    ) -> DistillationOutput:
        if surplus := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"hidden states go with a teacher that is run: leave {' and '.join(surplus)} out.")
        self._check()  # the temperature may have been replaced
        kd_weight, task_weight = self._weights(progress)
        check_targets(targets, task_weight)
        kd_loss = self.kd_loss
        assert isinstance(kd_loss, FusedLinearKDLoss)
        shape = (*student.hidden.shape[:-1], student.weight.shape[0])
        no_logits = student.hidden.new_zeros((), dtype=torch.float32).expand(shape)  # a shape without memory
        signals = Signals(no_logits, no_logits, targets, progress, self.ignore_index, extra=extra)
        temperature = self.temperature(signals)
        if not isinstance(temperature, Temperature):
            raise ValueError(
                f"FusedLinearKDLoss takes one temperature, but {type(self.temperature).__name__} gives several. "
                "Take a policy of one, or KDLoss."
            )
        teacher = self._teaching.hidden_states(inputs)
        counting = counting_positions(targets, by_name(inputs, self.input_names), shape[:-1])
        terms = kd_loss.from_hidden(student, teacher, temperature, counting, kd_weight, task_weight)
        empty = student.hidden.new_empty(0, shape[-1])
        output = DistillationOutput(
            *terms,
            temperature=temperature,
            student_logits=empty,
            teacher_logits=empty,
            kd_weight=kd_weight,
            task_weight=task_weight,
            scale_rule=kd_loss.scale,
        )
        return self._keep(output)

    def _check(self) -> None:
        policy, task, kd_loss = self.temperature, self.task_loss, self.kd_loss
        if not isinstance(kd_loss, FusedLinearKDLoss):
            raise ValueError(
                f"a FusedDistiller computes FusedLinearKDLoss, got {type(kd_loss).__name__}: take Distiller."
            )
        if len(self.layers) or not self._teaching.gives_hidden_states:
            raise ValueError(
                "FusedLinearKDLoss takes the hidden states of one teacher that runs: no ensemble, no cache and no "
                "layers go with it, and no targets of a few classes, as functions and servers give. Take KDLoss."
            )
        if self.class_dim != -1 or kd_loss.reduction != "mean":
            raise ValueError(f"from hidden states the classes are last and the loss is a mean, got {kd_loss!r}.")
        if policy.needs_logits:
            raise ValueError(
                f"FusedLinearKDLoss never has the logits, but the temperature {type(policy).__name__} is computed "
                "from them or changes them. Take a number, a schedule or LearnableTemperature, or KDLoss."
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


def make_distiller(
    teacher: Any, temperature: Any, kd_loss: nn.Module | None, task_loss: nn.Module | None, *args: Any
) -> Distiller:
    """Return the Distiller that computes this loss; arguments are those of :class:`~kd_lightning.Distiller`."""
    kind = FusedDistiller if isinstance(kd_loss, FusedLinearKDLoss) else getattr(kd_loss, "distiller", Distiller)
    return kind(teacher, temperature, kd_loss, task_loss, *args)
