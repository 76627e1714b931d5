"""What a causal language model is held against."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["next_token_targets"]


def next_token_targets(labels: Tensor, attention_mask: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    r"""The target of each position of a causal language model: the label of the next one, :math:`y_i = l_{i+1}`.

    Labels are shifted where others shift logits, ``logits[:, :-1]`` against ``labels[:, 1:]``: the loss is the same,
    and the logits, by far the larger tensor, stay as they are. What does not count is ``ignore_index``: the last
    position, labels that are so already, and every position that is padding or is followed by it.

    Args:
        labels: ``(B, L)`` token indices, or ``ignore_index``; unshifted, as Hugging Face's models take them.
        attention_mask: ``(B, L)``, 0 at padding. None: the labels say it all.
        ignore_index: The target of positions that do not count.

    Returns:
        ``(B, L)``.

    Raises:
        ValueError: Labels that are not ``(B, L)`` indices, or a mask of another shape.

    Example:
        >>> import torch
        >>> next_token_targets(torch.tensor([[5, 6, 7, 0]]), attention_mask=torch.tensor([[1, 1, 1, 0]]))
        tensor([[   6,    7, -100, -100]])
    """
    if labels.dim() != 2 or labels.is_floating_point():
        raise ValueError(
            f"labels to be shifted must be token indices (B, L), got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    targets = F.pad(labels[:, 1:], (0, 1), value=ignore_index)
    if attention_mask is None:
        return targets
    if attention_mask.shape != labels.shape:
        raise ValueError(
            f"attention_mask must have the labels' shape {tuple(labels.shape)}, got {tuple(attention_mask.shape)}."
        )
    seen = attention_mask != 0
    return targets.masked_fill(~(seen & F.pad(seen[:, 1:], (0, 1))), ignore_index)
