"""Calling a network the way its inputs ask for, and finding the logits in what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["Call", "call_model", "extract_logits"]


@dataclass(frozen=True)
class Call:
    """Arguments of a call, by position and by keyword: inputs for another call just like it."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def call_model(module: nn.Module, inputs: Any) -> Any:
    """Call a network the way its inputs ask for: a mapping by keywords, a tuple or list by position, a :class:`Call` by
    both, else as one.

    Example:
        >>> import torch
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
        >>> import torch
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
