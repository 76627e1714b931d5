from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kd_lightning.teachers import Call, extract_logits
from kd_lightning.teachers.calls import by_name, call_model, in_micro_batches, padding_mask


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


class Pair(nn.Module):
    def __init__(self, extra: Any = None) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | float = 0.0) -> dict[str, Any]:
        return {"logits": a - b + bias, "layers": (a, [b]), "extra": self.extra, "count": 2}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_micro_batches_split_inputs_and_join_outputs_of_any_nesting(size: int) -> None:
    a, b, bias = torch.randn(5, 3), torch.randn(5, 3), torch.randn(3)  # the bias is not of the batch's length
    for inputs in ((a, b, bias), {"a": a, "b": b, "bias": bias}):
        out = in_micro_batches(Pair(), inputs, size)
        assert torch.equal(out["logits"], a - b + bias)
        assert torch.equal(out["layers"][0], a)
        assert torch.equal(out["layers"][1][0], b)
        assert out["extra"] is None
        assert out["count"] == 2


@pytest.mark.slow
def test_micro_batches_of_a_hugging_face_model() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = BertForSequenceClassification(config).eval()
    inputs = {"input_ids": torch.randint(0, 20, (5, 4)), "attention_mask": torch.ones(5, 4, dtype=torch.long)}
    with torch.no_grad():
        expected = extract_logits(call_model(model, inputs))
        torch.testing.assert_close(extract_logits(in_micro_batches(model, inputs, 2)), expected)


@pytest.mark.parametrize("extra", [torch.tensor(1.0), SimpleNamespace()])
def test_outputs_that_cannot_be_joined(extra: Any) -> None:
    with pytest.raises(TypeError, match="the teacher's output holds a"):
        in_micro_batches(Pair(extra), (torch.ones(4, 1), torch.ones(4, 1)), 2)


def test_inputs_that_cannot_be_split() -> None:
    with pytest.raises(TypeError, match="found none in inputs of type int"):
        in_micro_batches(nn.Identity(), 3, 2)


def test_call_by_position_and_keyword() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, *, by: float) -> torch.Tensor:
            return x * by

    call = Call((torch.ones(3),), {"by": 3.0})
    assert torch.equal(call_model(Scaled(), call), torch.full((3,), 3.0))
    assert torch.equal(in_micro_batches(Scaled(), call, 2), torch.full((3,), 3.0))


def test_the_mask_of_a_decoder_is_its_own() -> None:
    """Source and target may be of one length: the source's padding says nothing of the target's positions."""
    source, target = torch.tensor([[1, 1, 0]]), torch.tensor([[1, 0, 0]])
    inputs = {"attention_mask": source, "decoder_input_ids": torch.zeros(1, 3, dtype=torch.long)}
    assert padding_mask(inputs) is None
    for given in (inputs | {"decoder_attention_mask": target}, Call((), inputs | {"decoder_attention_mask": target})):
        mask = padding_mask(by_name(given))
        assert mask is not None
        assert mask.tolist() == [[True, False, False]]
