"""Combinations go by their parts where the logits of all classes are nowhere: hidden states, a few classes, shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from kd_lightning import Distiller
from kd_lightning.functional import Sparse
from kd_lightning.fused_distiller import FusedDistiller
from kd_lightning.losses import FusedLinearKDLoss
from kd_lightning.models import CausalTransformer
from kd_lightning.teachers.calls import hidden_states
from kd_lightning.temperature import (
    AsymmetricTemperature,
    ClassFrequencyTemperature,
    EntropyTemperature,
    JoinedTemperature,
    LearnableTemperature,
    LinearSchedule,
    MultiTemperature,
    ProductTemperature,
    Progress,
    TemperaturePolicy,
)
from tests.helpers import on_ranks

HALFWAY = Progress(step=5, max_steps=10, epoch=1, max_epochs=2)

# with what each comes to halfway
ONE: dict[str, tuple[TemperaturePolicy, Any]] = {
    "product": (ProductTemperature([4.0, LinearSchedule(1.0, 0.5)]), LinearSchedule(4.0, 2.0)),
    "joined": (JoinedTemperature([LinearSchedule(4.0, 2.0), 3.0], [1]), 3.0),
    "asymmetric": (AsymmetricTemperature(LinearSchedule(2.0, 4.0), 3.0), 3.0),
    "nested": (ProductTemperature([AsymmetricTemperature(LearnableTemperature(2.0), 2.0), 1.5]), 3.0),
}
READING: dict[str, TemperaturePolicy] = {
    "product": ProductTemperature([4.0, EntropyTemperature()]),
    "joined": JoinedTemperature([4.0, EntropyTemperature()], [1]),
    "asymmetric": AsymmetricTemperature(2.0, EntropyTemperature()),
    "several": MultiTemperature([2.0, EntropyTemperature()]),
    "nested": ProductTemperature([AsymmetricTemperature(2.0, EntropyTemperature()), 1.5]),
    "centring": AsymmetricTemperature(2.0, ClassFrequencyTemperature([1, 2, 3, 4])),
}


def logits() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(5, 4), 3 * torch.randn(5, 4), torch.randint(4, (5,))


def fused_loss(temperature: Any) -> tuple[Tensor, Tensor]:
    """The loss of hidden states, and its gradient in the student's output layer."""
    torch.manual_seed(0)
    student, teacher = (CausalTransformer(4, dim=8, depth=1, heads=2) for _ in range(2))
    for parameter in teacher.parameters():
        parameter.data.mul_(3.0)  # stands for training
    tokens = torch.randint(4, (2, 5))
    distiller = FusedDistiller(teacher, temperature, FusedLinearKDLoss(chunk_size=3))
    loss = distiller(tokens, hidden_states(student, tokens), tokens, HALFWAY).loss
    hidden: Any = student.get_output_embeddings()
    return loss.detach(), torch.autograd.grad(loss, hidden.weight)[0]


@pytest.mark.parametrize("name", ONE)
def test_hidden_states(name: str) -> None:
    policy, equal = ONE[name]
    torch.testing.assert_close(fused_loss(policy), fused_loss(equal))


@pytest.mark.parametrize("name", ONE)
def test_targets_of_a_few_classes(name: str) -> None:
    policy, equal = ONE[name]
    student, teacher, targets = logits()
    sparse = Sparse.top_k(teacher, 2, 3.0)
    got, expected = (
        Distiller(None, t)(None, student, targets, HALFWAY, teacher_logits=sparse) for t in (policy, equal)
    )
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.temperature[:2], expected.temperature[:2])


def check_shards(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    student, teacher, targets = logits()
    shards = [distribute_tensor(z, mesh, [Shard(1)]) for z in (student, teacher)]
    several = MultiTemperature([2.0, LinearSchedule(1.0, 3.0)])
    for policy, equal in [*ONE.values(), (several, MultiTemperature([2.0, 2.0]))]:
        got = Distiller(None, policy)(None, shards[0], targets, HALFWAY, teacher_logits=shards[1])
        for temperature in (policy, equal):
            expected = Distiller(None, temperature)(None, student, targets, HALFWAY, teacher_logits=teacher)
            torch.testing.assert_close(got.kd_loss, expected.kd_loss)
            torch.testing.assert_close(got.task_loss, expected.task_loss)
    for policy in READING.values():
        with pytest.raises(ValueError, match=f"{type(policy).__name__} reads the logits, whose classes are sharded"):
            Distiller(None, policy)(None, shards[0], targets, HALFWAY, teacher_logits=shards[1])


def test_shards() -> None:
    on_ranks(2, check_shards)


@pytest.mark.parametrize("name", READING)
def test_one_part_that_reads_logits_is_refused(name: str) -> None:
    policy = READING[name]
    with pytest.raises(ValueError, match="FusedLinearKDLoss never has the logits, but the temperature"):
        fused_loss(policy)
    student, teacher, targets = logits()
    with pytest.raises(ValueError, match="Sparse targets, the probabilities of a few classes, but the temperature"):
        Distiller(None, policy)(None, student, targets, HALFWAY, teacher_logits=Sparse.top_k(teacher, 2, 3.0))
