"""KDLoss(convention=…): what other libraries compute, written down from their equations."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kd_lightning.functional.conventions import (
    CONVENTIONS,
    Convention,
    hinton_kd_loss,
    modelopt_kd_loss,
    textbrewer_kd_loss,
    torchdistill_kd_loss,
    trl_kd_loss,
)
from kd_lightning.losses import KDLoss


@pytest.fixture(scope="module")
def batch(reference: dict[str, Any]) -> Any:
    student, teacher = (torch.tensor(reference[f"{who}_logits"], dtype=torch.float64) for who in ("student", "teacher"))
    return student.requires_grad_(), teacher, torch.tensor(reference["targets"])


@pytest.mark.parametrize(
    ("convention", "expected"),
    [("hinton", 0.962508), ("trl", 0.060157), ("modelopt", 0.192502), ("textbrewer", 1.603808)],
)
def test_recorded_value(batch, convention: Convention, expected):
    student, teacher, targets = batch
    loss = CONVENTIONS[convention](student, teacher, 4.0, targets=targets)
    assert loss.item() == pytest.approx(expected, abs=5e-7)
    assert_close(KDLoss(convention=convention)(student, teacher, 4.0, targets), loss)


def test_trl(batch):
    """Its generalised JSD at β = 0: KL from log-probabilities, sum over the vocabulary, mean over valid tokens."""
    student, teacher, _ = batch
    mask = torch.tensor([True, False, True, True])
    rows = F.kl_div(
        (student / 4).log_softmax(-1), (teacher / 4).log_softmax(-1), reduction="none", log_target=True
    )  # fmt: skip
    expected = rows[mask].sum() / mask.sum()
    labels = torch.where(mask, 0, -100)
    assert_close(trl_kd_loss(student, teacher, 4.0, targets=labels), expected)


def test_modelopt(batch):
    """Reduction "mean" of kl_div divides by N·C."""
    student, teacher, _ = batch
    expected = F.kl_div((student / 4).log_softmax(-1), (teacher / 4).softmax(-1), reduction="none").mean() * 16
    assert_close(modelopt_kd_loss(student, teacher, 4.0), expected)


def test_textbrewer(batch):
    student, teacher, _ = batch
    expected = -((teacher / 4).softmax(-1) * (student / 4).log_softmax(-1)).sum(-1).mean()
    assert_close(textbrewer_kd_loss(student, teacher, 4.0), expected)


@pytest.mark.parametrize(("alpha", "beta", "weight"), [(0.3, None, 0.7), (0.3, 2.0, 2.0), (0.3, 0.0, 0.0)])
def test_torchdistill(batch, alpha, beta, weight):
    student, teacher, targets = batch
    soft = F.kl_div((student / 4).log_softmax(-1), (teacher / 4).softmax(-1), reduction="batchmean")
    hard = F.cross_entropy(student, targets)
    loss = torchdistill_kd_loss(student, teacher, 4.0, targets=targets, alpha=alpha, beta=beta)
    assert_close(loss, alpha * hard + weight * 16 * soft)
    assert_close(KDLoss(convention="torchdistill", alpha=alpha, beta=beta)(student, teacher, 4.0, targets), loss)


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_torchdistill_without_cross_entropy_has_no_squared_temperature(batch, alpha):
    student, teacher, targets = batch
    soft = F.kl_div((student / 4).log_softmax(-1), (teacher / 4).softmax(-1), reduction="batchmean")
    assert_close(torchdistill_kd_loss(student, teacher, 4.0, targets=targets, alpha=alpha), soft)
    assert_close(torchdistill_kd_loss(student, teacher, 4.0, alpha=0.5), soft)


def test_torchdistill_for_tokens_and_dense_predictions(batch):
    student, teacher = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 5, 3)
    targets = torch.tensor([[0, -100, 4], [1, 2, -100]])
    keep = targets.flatten() >= 0
    rows = [z.movedim(1, -1).reshape(6, 5)[keep] for z in (student, teacher)]
    expected = torchdistill_kd_loss(rows[0], rows[1], 2.0, targets=targets.flatten()[keep], alpha=0.4)
    got = torchdistill_kd_loss(student, teacher, 2.0, targets=targets, class_dim=1, alpha=0.4)
    assert_close(got, expected)
    shared = torchdistill_kd_loss(
        student, teacher, 2.0, targets=targets, class_dim=1, alpha=0.4, num_items=8
    )  # fmt: skip
    assert_close(shared, expected * 4 / 8)


def test_every_convention_is_tested_above():
    assert set(get_args(Convention)) == set(CONVENTIONS)
    assert set(CONVENTIONS) == {"hinton", "trl", "modelopt", "torchdistill", "textbrewer"}


def test_errors(batch):
    student, teacher, targets = batch
    wrong: Any = "timm"
    with pytest.raises(ValueError, match="convention must be one of"):
        KDLoss(convention=wrong)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'scale'"):
        CONVENTIONS["trl"](student, teacher, 4.0, scale="student")
    with pytest.raises(TypeError, match="unexpected keyword argument 'alpha'"):
        CONVENTIONS["hinton"](student, teacher, 4.0, alpha=0.5)
    refused: list[Any] = [{"alpha": 0.5}, {"beta": 0.5}, {"alpha": 0.0, "convention": "hinton"}]
    for options in refused:
        with pytest.raises(ValueError, match="alpha and beta belong to convention='torchdistill'"):
            KDLoss(**options)
    with pytest.raises(ValueError, match="fixes the scale"):
        KDLoss(scale="student", convention="trl")
    with pytest.raises(ValueError, match="is a mean"):
        torchdistill_kd_loss(student, teacher, 4.0, targets=targets, alpha=0.5, reduction="sum")
    assert not math.isnan(hinton_kd_loss(student, teacher, 4.0).item())
