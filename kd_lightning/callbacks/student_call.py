"""The student in another's module: its layer, its recorded calls, and the targets that belong to them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kd_lightning._lightning import is_compiled
from kd_lightning.losses.task import as_targets
from kd_lightning.modules.supervised import LABEL_KEYS
from kd_lightning.teachers import Call


@dataclass
class StudentCall:
    """A call of the student: its arguments, its output, and the version of their tensors."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    given: dict[int, int]
    returned: dict[int, int]

    def by_name(self, layer: nn.Module) -> Mapping[str, Any]:
        """Return the arguments of the call by their names in the layer's ``forward``."""
        bound = inspect.signature(layer.forward).bind_partial(*self.args, **self.kwargs).arguments
        return {**bound, **self.kwargs}

    def inputs(self) -> Any:
        """Return the arguments of the call: a single tensor as it is, else all of them."""
        if not self.kwargs:
            return self.args[0] if len(self.args) == 1 and isinstance(self.args[0], Tensor) else self.args
        return Call(self.args, self.kwargs) if self.args else self.kwargs


def choose(calls: Sequence[StudentCall], index: int | None, student: str) -> StudentCall:
    """Return the call that counts: the only one, or that of ``forward_call``; ``student`` is its layer in words."""
    if index is None and len(calls) > 1:
        raise RuntimeError(
            f"training_step calls {student} {len(calls)} times. Say which call gives the logits: "
            "forward_call=0 for the first, forward_call=-1 for the last."
        )
    try:
        return calls[index or 0]
    except IndexError:
        raise RuntimeError(
            f"forward_call is {index}, but training_step calls {student} only {len(calls)} times."
        ) from None


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a structure."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def versions(value: Any) -> dict[int, int]:
    """Return the number of in-place changes of each tensor; nothing under ``torch.compile``, which hides it."""
    if torch.compiler.is_compiling():
        return {}
    return {id(tensor): tensor._version for tensor in tensors(value) if not tensor.is_inference()}


def changed(value: Any, since: dict[int, int]) -> bool:
    """Return True if a tensor was changed in place since its version was recorded."""
    return any(since.get(key, version) != version for key, version in versions(value).items())


def select(batch: Any, how: Callable[[Any], Any] | int | str, name: str) -> Any:
    """Return the part of a batch at a key or an index, or the value of a function of the batch."""
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


def find_targets(batch: Any, logits: Tensor, class_dim: int) -> Tensor | None:
    """Return a batch's second part or that under one of :data:`LABEL_KEYS`, if its shape fits the logits, else None."""
    targets = None
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        targets = batch[1]
    elif isinstance(batch, Mapping):
        targets = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    with suppress(TypeError):  # because labels that are not numbers are no targets
        targets = as_targets(targets, logits.device)
    if not isinstance(targets, Tensor):
        return None
    shape = logits.movedim(class_dim, -1).shape
    if targets.shape == shape:
        return targets
    if targets.is_floating_point() or logits.dim() < 2:
        return None
    if targets.shape == shape[:-1]:
        if logits.dim() == 3 and class_dim in (-1, 2):
            raise RuntimeError(
                f"the batch has labels {tuple(targets.shape)} for token logits {tuple(logits.shape)}. Say how they "
                "go together: targets='labels' if the label of a token stands at its place; for a causal model, "
                "which predicts the next token, targets=lambda batch: F.pad(batch['labels'][:, 1:], (0, 1), "
                "value=-100); targets=lambda batch: None to distil every position that is no padding."
            )
        return targets
    if logits.dim() > 2 and targets.shape == logits.movedim(1, -1).shape[:-1]:
        raise RuntimeError(
            f"logits {tuple(logits.shape)} with targets {tuple(targets.shape)} have their classes in dimension 1, "
            f"but the distillation loss has class_dim={class_dim}: give kd_loss=KDLoss(class_dim=1)."
        )
    return None


def find_layer(pl_module: LightningModule, name: str | None) -> nn.Module:
    """Return the submodule of a dotted name; the module itself for None."""
    if name is None and is_compiled(pl_module):
        raise ValueError(
            f"torch.compile({type(pl_module).__name__}) leaves no call of forward to see. Name the submodule whose "
            "output has the logits (student_layer=...), or compile the network in place: module.net.compile()."
        )
    if name is None:
        return pl_module
    try:
        return pl_module.get_submodule(name)
    except AttributeError:
        names = [other for other, _ in pl_module.named_modules() if other]
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.5) or names[:10]
        raise ValueError(
            f"{type(pl_module).__name__} has no submodule {name!r}. There are: "
            f"{', '.join(near) or 'none'}. Set student_layer to the one whose output has the logits, or to None "
            "for what forward returns."
        ) from None


def unseen(pl_module: LightningModule, student: str, calls: Sized, step: Callable[[], object]) -> str:
    """Return the message for a step without logits to learn from, which runs once more to list the layers it calls."""
    if calls:
        return (
            f"training_step calls {student} without gradient, so distillation would teach it nothing. Was it "
            "frozen, or run under no_grad?"
        )
    called: set[nn.Module] = set()
    layers = {name: layer for name, layer in pl_module.named_modules() if name}
    hooks = [layer.register_forward_hook(lambda layer, *_: called.add(layer)) for layer in layers.values()]
    with torch.no_grad(), suppress(Exception):
        step()
    for hook in hooks:
        hook.remove()
    names = sorted((name for name, layer in layers.items() if layer in called), key=lambda name: name.count("."))
    shown = [f"{name} ({type(layers[name]).__name__})" for name in names]
    listed = ", ".join([*shown[:12], *(["…"] if len(shown) > 12 else [])])
    return (
        f"the logits were not seen: training_step did not call {student}. It called: {listed or 'no layer'}. "
        f"Set student_layer to the one whose output has the logits"
        + (f", such as student_layer={names[0]!r}." if names else ".")
    )
