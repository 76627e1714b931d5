from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kd_lightning.functional import confidence_weights, entropy_weights, mixed_log_softmax, mixed_logits

LOGITS = [3 * torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(3)]
TARGETS = torch.tensor([0, 4, 2, 2])


def softmax(z: Tensor, t: float = 1.0) -> np.ndarray:
    power = np.exp(z.double().numpy() / t)
    return power / power.sum(-1, keepdims=True)


def column(*values: float) -> list[Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def test_mixture_and_mean() -> None:
    temperatures, weights = [1.0, 3.0, 7.0], [0.2, 0.5, 0.3]
    expected = sum(w * softmax(z, t) for z, t, w in zip(LOGITS, temperatures, weights, strict=True))
    assert_close(mixed_log_softmax(LOGITS, temperatures, column(*weights)).exp().numpy(), expected)
    mean = sum(w * z / t for z, t, w in zip(LOGITS, temperatures, weights, strict=True))
    assert_close(mixed_logits(LOGITS, temperatures, column(*weights)), mean)


def test_mixture_of_masked_classes_and_a_weight_of_zero() -> None:
    one, two = torch.tensor([[0.0, -torch.inf, -torch.inf]]), torch.tensor([[0.0, 0.0, -torch.inf]])
    t = torch.tensor([2.0], requires_grad=True)
    log_p = mixed_log_softmax([one, two], [t, t], [torch.tensor([0.5])] * 2)
    assert_close(log_p.exp(), torch.tensor([[0.75, 0.25, 0.0]]))
    log_p.exp().square().sum().backward()
    assert t.grad is not None
    assert torch.isfinite(t.grad).all()
    for mixed in (mixed_log_softmax, mixed_logits):
        alone = mixed([one, two], [2.0, 2.0], [torch.tensor([0.0]), torch.tensor([1.0])])
        assert_close(alone.softmax(-1), two.softmax(-1))


def test_the_mixture_does_not_underflow() -> None:
    far = torch.tensor([[0.0, 4000.0]])
    log_p = mixed_log_softmax([far, far], [1.0, 1.0], [torch.tensor([0.3]), torch.tensor([0.7])])
    assert_close(log_p, torch.tensor([[-4000.0, 0.0]]))


def test_confidence_weights_are_the_published_ones() -> None:
    errors = np.stack([-np.log(softmax(z)[np.arange(4), TARGETS.numpy()]) for z in LOGITS])
    expected = (1 - np.exp(errors) / np.exp(errors).sum(0)) / (3 - 1)
    assert_close(confidence_weights(LOGITS, TARGETS).squeeze(-1).numpy(), expected)


def test_entropy_weights() -> None:
    entropies = np.stack([-(softmax(z) * np.log(softmax(z))).sum(-1) for z in LOGITS])
    expected = (1 - entropies / entropies.sum(0)) / (3 - 1)
    assert_close(entropy_weights(LOGITS).squeeze(-1).numpy(), expected)


@pytest.mark.parametrize("kind", ["confidence", "entropy"])
def test_weights_are_shared_among_those_that_know(kind: str) -> None:
    known = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool).unsqueeze(-1)

    def weights(logits: list[Tensor], rows: slice, known: Tensor | None = None) -> Tensor:
        logits = [z[rows] for z in logits]
        return entropy_weights(logits, known) if kind == "entropy" else confidence_weights(logits, TARGETS[rows], known)

    ours = weights(LOGITS, slice(None), known)
    assert_close(ours.sum(0), torch.ones(4, 1, dtype=torch.float64))
    assert not (ours * ~known).any()
    assert_close(ours[:, :1], weights(LOGITS, slice(0, 1)))
    assert_close(ours[:2, 1:2], weights(LOGITS[:2], slice(1, 2)))
    assert_close(ours[:, 2:].squeeze(-1), torch.tensor([[0.0, 1], [1, 0], [0, 0]], dtype=torch.float64))


def test_extreme_confidence_and_no_label() -> None:
    sure, wrong = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    assert_close(confidence_weights([sure, wrong], torch.tensor([0])).flatten(), torch.tensor([1.0, 0.0]))
    assert_close(confidence_weights([sure, wrong], torch.tensor([-100])).flatten(), torch.tensor([0.5, 0.5]))
    assert_close(entropy_weights([sure, wrong]).flatten(), torch.tensor([0.5, 0.5]))  # both are certain
