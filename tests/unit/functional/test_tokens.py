from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kd_lightning.functional import next_token_targets


def test_is_the_loss_of_shifted_logits():
    logits, labels = torch.randn(3, 7, 11), torch.randint(11, (3, 7))
    labels[torch.rand(3, 7) < 0.3] = -100
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(F.cross_entropy(logits.flatten(0, 1), next_token_targets(labels).flatten()), expected)


def test_padding_on_either_side():
    labels, mask = torch.tensor([[0, 0, 5, 6, 7], [5, 6, 7, 0, 0]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    expected = torch.tensor([[-1, -1, 6, 7, -1], [6, 7, -1, -1, -1]])
    for kind in (torch.long, torch.bool, torch.float32):
        assert next_token_targets(labels, mask.to(kind), ignore_index=-1).equal(expected)
    assert labels[0, 0] == 0  # not written over


def test_errors():
    with pytest.raises(ValueError, match=r"token indices \(B, L\), got torch.int64 of shape \(4,\)"):
        next_token_targets(torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="token indices"):
        next_token_targets(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"the labels' shape \(2, 4\), got \(2, 3\)"):
        next_token_targets(torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 3))
