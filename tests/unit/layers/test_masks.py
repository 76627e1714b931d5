"""Padding does not count between layers: a padded batch costs what its sequences cost without the padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd_lightning import ClassificationModule, DistillationModule, Distiller, LayerTerm
from kd_lightning.losses import (
    AttentionKDLoss,
    AttentionTransferLoss,
    ChannelWiseKDLoss,
    FeatureLoss,
    HintLoss,
    InfoNCELoss,
    SimilarityKDLoss,
    SimilarityPreservingLoss,
    SoftFeatureLoss,
)
from kd_lightning.schedules import Progress

LENGTHS = (5, 3, 2)
LOSSES = [HintLoss(), AttentionTransferLoss(), ChannelWiseKDLoss(), AttentionKDLoss()]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    student, teacher = (torch.randn(3, 5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher, mask


def term_of(loss: FeatureLoss) -> LayerTerm:
    soft = isinstance(loss, SoftFeatureLoss)
    term = LayerTerm("a", "a", loss, temperature=2.0 if soft else None)
    term.build(3, 4, 4)
    return term


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("rest", [1e3, float("nan")])
def test_padding_costs_nothing_and_has_no_gradient(loss: FeatureLoss, rest: float) -> None:
    student, teacher, mask = batch()
    term = term_of(loss)
    padded = [torch.where(mask[..., None], x, rest * (1 + i)) for i, x in enumerate((student, teacher))]
    value = term(*padded, Progress(), mask=mask).loss
    (gradient,) = torch.autograd.grad(value, student)

    alone = [term(student[i : i + 1, :n], teacher[i : i + 1, :n], Progress()).loss for i, n in enumerate(LENGTHS)]
    by_sample = isinstance(loss, (ChannelWiseKDLoss, AttentionKDLoss))
    weights = torch.tensor([1.0] * 3 if by_sample else [*map(float, LENGTHS)], dtype=torch.float64)
    expected = (torch.stack(alone) * weights).sum() / weights.sum()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])
    assert gradient[~mask].eq(0).all()
    assert gradient[mask].ne(0).any()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_a_sample_of_padding_alone(loss: FeatureLoss) -> None:
    student, teacher, mask = batch()
    mask = mask.clone()
    mask[2] = False
    value = term_of(loss)(student, teacher, Progress(), mask=mask).loss
    assert torch.isfinite(value)
    assert torch.autograd.grad(value, student)[0][2].eq(0).all()


@pytest.mark.parametrize(
    "loss", [SimilarityKDLoss(), SimilarityPreservingLoss(), InfoNCELoss()], ids=lambda loss: type(loss).__name__
)
def test_similarities_are_those_of_the_tokens(loss: FeatureLoss) -> None:
    student, teacher, mask = batch()
    zero = [torch.where(mask[..., None], x, 0.0) for x in (student, teacher)]
    other = [torch.where(mask[..., None], x, 7.0 * i) for i, x in enumerate((student, teacher))]
    term = term_of(loss)
    torch.testing.assert_close(term(*other, Progress(), mask=mask).loss, term(*zero, Progress()).loss)


class Body(nn.Module):
    """Its features are the inputs, and a number of its own at padding."""

    def __init__(self, padding: float) -> None:
        super().__init__()
        self.layer, self.head, self.padding = nn.Identity(), nn.Linear(4, 3), padding
        self.head.weight.data += 1.0  # stands for training

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = input_ids[..., None].expand(-1, -1, 4)
        return self.head(self.layer(torch.where(attention_mask[..., None] == 1, hidden, self.padding)))


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


def test_padding_of_a_batch_reaches_the_terms() -> None:
    """Only the padding differs between student and teacher: 4000 without the mask."""
    student, teacher = Body(0.0), Body(100.0)
    inputs = {"input_ids": torch.ones(2, 5), "attention_mask": MASK}
    distiller = Distiller(teacher, task_weight=0.0, layers=[LayerTerm("layer", "layer", HintLoss())])
    distiller.build_projectors(student, inputs)
    with distiller.attach(student):
        out = distiller(inputs, student(**inputs))
    assert out.layer_losses["layer"] == 0.0


def test_a_module_finds_a_mask_that_is_given_by_position() -> None:
    class Positional(DistillationModule):
        def unpack_batch(self, batch: Any) -> tuple[Any, None]:
            return batch, None

    module = Positional(
        Body(0.0), Body(100.0), task_weight=0.0, layers=[LayerTerm("layer", "layer", HintLoss())]
    ).train()
    inputs = (torch.ones(2, 5), MASK)
    module.distiller.build_projectors(module.student, inputs)
    with module.distiller.attach(module.student):
        out = module.distiller(inputs, module(inputs))
    assert out.layer_losses["layer"] == 0.0
    by_keyword = {"input_ids": inputs[0], "attention_mask": MASK}
    plain = Distiller(module.teacher, task_weight=0.0)
    torch.testing.assert_close(out.kd_loss, plain(by_keyword, module.student(*inputs)).kd_loss)
    assert out.kd_loss < plain(inputs, module.student(*inputs)).kd_loss  # which does not know the names


@pytest.mark.parametrize(
    "module", [ClassificationModule(Body(0.0)), DistillationModule(Body(0.0), Body(100.0))], ids=["plain", "distilled"]
)
def test_labels_at_padding_do_not_count(module: Any) -> None:
    """Where labels stand at their places and none is −100, the mask says which are padding."""
    labels = torch.zeros(2, 5, dtype=torch.long)
    batch = {"input_ids": torch.ones(2, 5), "attention_mask": MASK, "labels": labels}
    assert torch.equal(module.inputs_and_targets(batch)[1], labels.masked_fill(MASK == 0, -100))
    assert torch.equal(module.inputs_and_targets({**batch, "labels": labels[:, 0]})[1], labels[:, 0])


def test_a_loss_of_ones_own_without_a_mask() -> None:
    class AbsoluteLoss(FeatureLoss):
        def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
            return (student_features - teacher_features).abs().mean()

    student, teacher, mask = batch()
    with pytest.raises(ValueError, match=r"AbsoluteLoss compares positions and takes no mask\. Add an argument mask"):
        term_of(AbsoluteLoss())(student, teacher, Progress(), mask=mask)
    term_of(AbsoluteLoss())(student[:, 0], teacher[:, 0], Progress(), mask=mask)  # vectors have no padding
