"""Calling a network the way its inputs ask for, and finding the logits in what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["Call", "call_model", "extract_logits", "in_micro_batches"]


class Call(NamedTuple):
    """Arguments of a call, by position and by keyword: inputs for another call just like it."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def call_model(module: Callable[..., Any], inputs: Any) -> Any:
    """Call a network the way its inputs ask for: a mapping by keywords, a tuple or list by position, a :class:`Call` by
    both, else as one.

    Example:
        >>> from torch import nn
        >>> call_model(nn.Bilinear(2, 3, 1), (torch.ones(5, 2), torch.ones(5, 3))).shape
        torch.Size([5, 1])
    """
    if isinstance(inputs, Call):
        return module(*inputs.args, **inputs.kwargs)
    if isinstance(inputs, Mapping):
        return module(**inputs)
    if isinstance(inputs, (tuple, list)):
        return module(*inputs)
    return module(inputs)


def extract_logits(output: Any) -> Tensor:
    """The logits in a network's output: the tensor itself, ``.logits`` (Hugging Face), ``["logits"]`` or ``["out"]``.

    Raises:
        TypeError: None of these.

    Example:
        >>> extract_logits({"out": torch.zeros(1, 21, 8, 8)}).shape  # torchvision's segmentation models
        torch.Size([1, 21, 8, 8])
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, Mapping):
        for key in ("logits", "out"):
            if isinstance(output.get(key), Tensor):
                return output[key]
    keys = f" with keys {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
    raise TypeError(
        f"found no logits in a model output of type {type(output).__name__}{keys}: expected a tensor, `.logits`, "
        "['logits'] or ['out']. Override extract_logits(output) of your DistillationModule or DistillationCallback."
    )


def in_micro_batches(module: Callable[..., Any], inputs: Any, size: int) -> Any:
    """Call a network on at most ``size`` samples at a time, and join what it returns.

    The first tensor tells the length of the batch: tensors of that length are split, all else goes to every part. In
    the outputs, nested in any way, tensors are joined along their first dimension.

    Args:
        module: The network.
        inputs: As in :func:`call_model`.
        size: Samples at a time.

    Raises:
        TypeError: Inputs without a tensor, or an output that cannot be joined.

    Example:
        >>> in_micro_batches(lambda x: {"logits": 2 * x}, torch.arange(5.0), 2)
        {'logits': tensor([0., 2., 4., 6., 8.])}
    """
    leaves, layout = tree_flatten(inputs)
    count = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0), None)
    if count is None:
        raise TypeError(f"micro_batch_size splits tensors, and found none in inputs of type {type(inputs).__name__}.")
    if count <= size:
        return call_model(module, inputs)

    def split(leaf: Any, start: int) -> Any:
        whole = not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != count
        return leaf if whole else leaf[start : start + size]

    parts = [
        tree_flatten(call_model(module, tree_unflatten([split(leaf, start) for leaf in leaves], layout)))
        for start in range(0, count, size)
    ]
    return tree_unflatten([_joined(pieces) for pieces in zip(*(part for part, _ in parts), strict=True)], parts[0][1])


def _joined(pieces: tuple[Any, ...]) -> Any:
    first = pieces[0]
    if isinstance(first, Tensor) and first.dim() > 0:
        return torch.cat(pieces)
    if first is None or (isinstance(first, (bool, int, float, str)) and all(piece == first for piece in pieces)):
        return first
    what = "a tensor without a batch dimension" if isinstance(first, Tensor) else f"a {type(first).__name__}"
    raise TypeError(
        f"micro_batch_size joins tensors along the batch, but the teacher's output holds {what}. Have the teacher "
        "return its logits alone (Hugging Face: config.use_cache=False), or leave micro_batch_size out."
    )
