"""A call of the student in a training step: its inputs, its output, and whether they were changed since."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kd_lightning.teachers import Call

__all__ = ["StudentCall", "changed", "select", "tensors", "versions"]


@dataclass
class StudentCall:
    """One call of the student: what it got, what it gave, and the version of both."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    given: dict[int, int]
    returned: dict[int, int]

    def by_name(self, layer: nn.Module) -> Mapping[str, Any]:
        """Return the arguments of the call by the names that the layer's ``forward`` has for them."""
        bound = inspect.signature(layer.forward).bind_partial(*self.args, **self.kwargs).arguments
        return {**bound, **self.kwargs}

    def inputs(self) -> Any:
        """Return the arguments of the call in their simplest form."""
        if not self.kwargs:
            return self.args[0] if len(self.args) == 1 and isinstance(self.args[0], Tensor) else self.args
        return Call(self.args, self.kwargs) if self.args else self.kwargs


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a structure."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def versions(value: Any) -> dict[int, int]:
    """Return how often each tensor was changed in place; of none under ``torch.compile``, where that is unknown."""
    if torch.compiler.is_compiling():
        return {}
    return {id(tensor): tensor._version for tensor in tensors(value) if not tensor.is_inference()}


def changed(value: Any, since: dict[int, int]) -> bool:
    """Return True if a tensor was changed in place since its version was taken."""
    return any(since.get(key, version) != version for key, version in versions(value).items())


def select(batch: Any, how: Callable[[Any], Any] | int | str, name: str) -> Any:
    """Return the part of a batch that a key, an index or a function names.

    Raises:
        RuntimeError: If the batch has no such part.
    """
    if callable(how):
        return how(batch)
    try:
        return batch[how]
    except (KeyError, IndexError, TypeError):
        there = f" with the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise RuntimeError(
            f"{name}={how!r} is no part of the batch, a {type(batch).__name__}{there}. Give a key, an index, or a "
            "function of the batch."
        ) from None
