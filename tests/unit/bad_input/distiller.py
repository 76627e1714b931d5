"""Bad calls of a Distiller."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kd_lightning import Distiller
from kd_lightning.fused_distiller import FusedDistiller
from kd_lightning.losses import FusedLinearKDLoss, KDLoss
from kd_lightning.models import CausalTransformer
from kd_lightning.teachers.calls import hidden_states
from kd_lightning.temperature import MultiTemperature
from tests.unit.bad_input.case import Case

TOKENS = torch.zeros(1, 3, dtype=torch.long)


def from_hidden(
    kind: Callable[..., Distiller], loss: nn.Module, temperature: Any = 2.0, **given: Any
) -> Callable[[], object]:
    def write() -> object:
        student, teacher = (CausalTransformer(vocab_size=5, dim=8, depth=1, heads=1) for _ in range(2))
        teacher.requires_grad_(False).eval()
        for parameter in teacher.parameters():
            parameter.mul_(3.0)  # stands for training
        return kind(teacher, temperature, loss)(TOKENS, hidden_states(student, TOKENS), TOKENS, **given)

    return write


WITHOUT_TEACHER = "hidden states go with a teacher that is run: leave {} out."
CASES = [
    Case("hidden states for logits", from_hidden(Distiller, KDLoss()), ValueError,
         "the student's logits must be a tensor, got HiddenStates: hidden states are for FusedLinearKDLoss in a "
         "FusedDistiller. Give logits."),
    Case("hidden states with logits", from_hidden(FusedDistiller, FusedLinearKDLoss(), teacher_logits=torch.zeros(1)),
         ValueError, WITHOUT_TEACHER.format("teacher_logits")),
    Case("hidden states with rows of a cache", from_hidden(FusedDistiller, FusedLinearKDLoss(), index=torch.zeros(1)),
         ValueError, WITHOUT_TEACHER.format("index")),
    Case("hidden states with two", from_hidden(FusedDistiller, FusedLinearKDLoss(), index=torch.zeros(1),
                                               task_loss=torch.zeros(())),
         ValueError, WITHOUT_TEACHER.format("index and task_loss")),
    Case("hidden states at two temperatures",
         from_hidden(FusedDistiller, FusedLinearKDLoss(), MultiTemperature([1, 2])),
         ValueError, "FusedLinearKDLoss takes one temperature, but MultiTemperature gives several. "
         "Take a policy of one, or KDLoss."),
]  # fmt: skip
