"""The targets of a causal language model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def next_token_targets(labels: Tensor, attention_mask: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    r"""Return the target of each position of a causal language model, the next label :math:`y_i = l_{i+1}`.

    The labels are shifted rather than the logits (``logits[:, :-1]`` against ``labels[:, 1:]``), because the logits are
    by far the larger tensor; the loss is the same. The target is ``ignore_index`` at the last position, before a label
    that is ``ignore_index``, and at every position that is padding or is followed by padding.

    Args:
        labels: ``(B, L)`` token indices, or ``ignore_index``; unshifted, as Hugging Face's models take them.
        attention_mask: ``(B, L)``, 0 at padding. None: the labels mark the padding.
        ignore_index: The target of the positions to leave out.

    Returns:
        ``(B, L)``.

    Raises:
        ValueError: If the labels are no ``(B, L)`` indices, or if the mask has another shape.

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
