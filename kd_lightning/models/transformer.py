"""A causal transformer in plain torch: teacher and student of the language experiments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.models._layers import check_positive


class CausalTransformer(nn.Module):
    """A decoder-only transformer as GPT-2: pre-norm, GELU, learned positions; embedding and output layer are not tied.

    It is called as Hugging Face's causal models are. ``base_model`` gives the final hidden states and
    ``get_output_embeddings()`` the output layer, as :class:`~kd_lightning.losses.FusedLinearKDLoss` needs.

    Shapes: tokens ``(B, L)`` int64 → logits ``(B, L, vocab_size)``; the logits at i are for the token at i + 1.

    | dim | depth | parameters (256 tokens, 128 positions) |
    |-----|-------|----------------------------------------|
    | 128 | 4     | 875,264                                |
    | 64  | 1     | 91,072                                 |

    Args:
        vocab_size: Number of tokens.
        dim: Width; a multiple of ``heads``.
        depth: Number of blocks.
        heads: Attention heads.
        max_length: Largest number of tokens in a sequence.
        dropout: Share of activations dropped in each branch, in [0, 1).

    Raises:
        ValueError: If an argument lies outside its range; on a call, if the sequence is longer than ``max_length``.

    Example:
        >>> model = CausalTransformer(dim=64, depth=1)
        >>> model(torch.zeros(2, 10, dtype=torch.long)).shape
        torch.Size([2, 10, 256])
        >>> sum(p.numel() for p in model.parameters())
        91072
    """

    def __init__(
        self,
        vocab_size: int = 256,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        max_length: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(vocab_size=vocab_size, dim=dim, depth=depth, heads=heads, max_length=max_length)
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got {dim} and {heads}. Give a head 16 to 64.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}. 0 is none.")
        self.base_model = _Body(vocab_size, dim, depth, heads, max_length, dropout)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.base_model.blocks:
            assert isinstance(block, _Block)
            for last in (block.project, block.mlp[2]):  # so that the residual stream has the same size at any depth
                assert isinstance(last, nn.Linear)
                nn.init.normal_(last.weight, std=0.02 / (2 * depth) ** 0.5)

    def get_output_embeddings(self) -> nn.Linear:
        """Return the output layer, under Hugging Face's name."""
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits ``(B, L, vocab_size)``.

        Args:
            input_ids: ``(B, L)``.
            attention_mask: ``(B, L)``, 0 at positions that no other attends to.
        """
        return self.head(self.base_model(input_ids, attention_mask))


class _Body(nn.Module):
    """The transformer without its output layer: tokens ``(B, L)`` → hidden states ``(B, L, dim)``."""

    def __init__(self, vocab_size: int, dim: int, depth: int, heads: int, max_length: int, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(max_length, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(dim, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        length, longest = input_ids.shape[1], self.positions.num_embeddings
        if length > longest:
            raise ValueError(f"a sequence has at most max_length={longest} tokens, got {length}. Cut it into blocks.")
        allowed = None
        if attention_mask is not None:
            before = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
            # a position attends to itself, because a row without any would be NaN
            itself = torch.eye(length, dtype=torch.bool, device=input_ids.device)
            allowed = (before & attention_mask.bool()[:, None, None, :]) | itself
        x = self.dropout(self.tokens(input_ids) + self.positions.weight[:length])
        for block in self.blocks:
            x = block(x, allowed)
        return self.norm(x)


class _Block(nn.Module):
    """A block of attention and perceptron, each after a norm and added to the residual stream."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.query_key_value(self.norm1(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None)
        x = x + self.dropout(self.project(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.norm2(x)))
