"""A snapshot of a run's objects, taken once and restored bit for bit as often as needed."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

_WITH_ATTRIBUTES = (nn.Module, Optimizer, LRScheduler, GradScaler, DataLoader, Sampler)
_DATA = (Dataset, LightningDataModule)  # only their loaders, samplers and generators are kept, because data is large
_DRAWS_BATCHES = (
    DataLoader, Sampler, Dataset, torch.Generator, np.random.Generator, np.random.RandomState, random.Random
)  # fmt: skip


class Snapshot:
    """The state of modules, optimisers, schedulers, gradient scalers, loaders and random generators.

    Tensors (value, gradient, ``requires_grad``), lists, dictionaries and sets are restored in place, so references to
    them stay valid. Attributes are restored too, and those added since are deleted. Objects of other classes are left
    as they are, and the tensors of data sets are not copied.

    Args:
        *roots: Objects to start from; the objects that they hold are included.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> kept = Snapshot(model)
        >>> _ = model(torch.randn(4, 2)).sum().backward()
        >>> model.note = "made since"
        >>> kept.restore()
        >>> model.running_mean, model.weight.grad, hasattr(model, "note")
        (tensor([0., 0.]), None, False)
    """

    def __init__(self, *roots: Any) -> None:
        self._undo: list[Callable[[], Any]] = []
        self._seen: dict[int, Any] = {}  # keeps the objects alive, so that no id is used again
        for root in roots:
            self._keep(root)

    def restore(self) -> None:
        """Restore all objects; may be called repeatedly."""
        for undo in self._undo:
            undo()

    def _keep(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._keep_tensor(value)
        elif isinstance(value, dict):
            self._keep_dict(value)
        elif isinstance(value, (list, deque)):
            items = list(value)
            self._undo.append(lambda: (value.clear(), value.extend(items)))
            self._keep_all(items)
        elif isinstance(value, set):
            members = set(value)
            self._undo.append(lambda: (value.clear(), value.update(members)))
        elif isinstance(value, tuple):
            self._keep_all(value)
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            self._undo.append(lambda: value.set_state(state))
        elif isinstance(value, np.random.Generator):
            bits, numbers = value.bit_generator, value.bit_generator.state
            self._undo.append(lambda: setattr(bits, "state", numbers))
        elif isinstance(value, np.random.RandomState):
            numbers = value.get_state()
            self._undo.append(lambda: value.set_state(numbers))
        elif isinstance(value, random.Random):
            numbers = value.getstate()
            self._undo.append(lambda: value.setstate(numbers))
        elif isinstance(value, _DATA):
            attributes = dict(vars(value))
            self._undo.append(lambda: (vars(value).clear(), vars(value).update(attributes)))
            self._keep_all([held for held in attributes.values() if isinstance(held, _DRAWS_BATCHES)])
        elif isinstance(value, _WITH_ATTRIBUTES):
            self._keep(vars(value))

    def _keep_all(self, values: Any) -> None:
        for value in values:
            self._keep(value)

    def _keep_dict(self, value: dict[Any, Any]) -> None:
        items = dict(value)
        self._undo.append(lambda: (value.clear(), value.update(items)))
        self._keep_all(items.values())

    def _keep_tensor(self, tensor: Tensor) -> None:
        kept, needs_grad = tensor.detach().clone(), tensor.requires_grad
        grad = tensor.grad if tensor.is_leaf else None

        def undo() -> None:
            with torch.no_grad():
                tensor.copy_(kept)
            if tensor.is_leaf:
                tensor.requires_grad_(needs_grad)
                tensor.grad = grad

        self._undo.append(undo)
        if grad is not None:
            self._keep(grad)
