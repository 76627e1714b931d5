from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from kd_lightning.models import CausalTransformer


def make(**options: int) -> CausalTransformer:
    return CausalTransformer(vocab_size=20, dim=16, depth=2, heads=2, max_length=12, **options).eval()


def test_no_position_sees_a_later_one():
    model, tokens = make(), torch.randint(20, (2, 12))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 20
    for mask in (None, torch.ones(2, 12)):
        before, after = model(tokens, mask), model(changed, mask)
        assert_close(before[:, :7], after[:, :7])
        assert not torch.isclose(before[:, 7:], after[:, 7:]).all(-1).any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_nothing_sees_padding(side: str):
    model, tokens, mask = make(), torch.randint(20, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    padding = slice(0, 4) if side == "left" else slice(8, 12)
    mask[:, padding] = 0
    changed = tokens.clone()
    changed[:, padding] = (changed[:, padding] + 1) % 20
    before, after = model(tokens, mask), model(changed, mask)
    assert_close(before[mask == 1], after[mask == 1])
    assert before.isfinite().all()
    if side == "right":
        assert_close(before[:, :8], model(tokens[:, :8]))


def test_heads_attend_as_multi_head_attention_does():
    model, x = make(), torch.randn(2, 5, 16)
    block: Any = model.base_model.blocks[0]
    reference = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    reference.load_state_dict(
        {
            "in_proj_weight": block.query_key_value.weight, "in_proj_bias": block.query_key_value.bias,
            "out_proj.weight": block.project.weight, "out_proj.bias": block.project.bias,
        }
    )  # fmt: skip
    y = block.norm1(x)
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected = x + reference(y, y, y, attn_mask=later, need_weights=False)[0]
    expected = expected + block.mlp(block.norm2(expected))
    assert_close(block(x, None), expected)


def test_logits_are_the_head_of_the_hidden_states():
    model, tokens = make(), torch.randint(20, (2, 12))
    assert_close(model.get_output_embeddings()(model.base_model(tokens)), model(tokens))
    assert model.get_output_embeddings().weight is not model.base_model.tokens.weight


def test_dropout_is_for_training():
    model, tokens = CausalTransformer(vocab_size=20, dim=16, depth=1, heads=2, dropout=0.5), torch.randint(20, (2, 12))
    assert not model(tokens).equal(model(tokens))
    assert model.eval()(tokens).equal(model(tokens))


def test_errors():
    with pytest.raises(ValueError, match="dim must be a multiple of heads, got 10 and 4"):
        CausalTransformer(dim=10)
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        CausalTransformer(depth=0)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        CausalTransformer(dropout=1)
    with pytest.raises(ValueError, match="at most max_length=12 tokens, got 13"):
        make()(torch.zeros(1, 13, dtype=torch.long))
