from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kd_lightning.teachers import call_model, extract_logits


def test_call_model() -> None:
    class Net(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a - b

    one, two = torch.ones(1), torch.full((1,), 2.0)
    assert call_model(Net(), (one, two)) == call_model(Net(), {"b": two, "a": one}) == -1
    assert call_model(nn.Identity(), one) == 1


def test_extract_logits() -> None:
    logits = torch.ones(2, 3)
    for output in (logits, SimpleNamespace(logits=logits), {"logits": logits}, {"out": logits, "aux": None}):
        assert extract_logits(output) is logits
    with pytest.raises(TypeError, match=r"type dict with keys \['scores'\]"):
        extract_logits({"scores": logits})
