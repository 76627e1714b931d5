"""The layer of a LightningModule that returns the student's logits."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sized
from contextlib import suppress

import torch
from lightning.pytorch import LightningModule
from torch import nn

from kd_lightning._lightning import is_compiled


def find_layer(pl_module: LightningModule, name: str | None) -> nn.Module:
    """Return the submodule of a dotted name; the module itself for None.

    Raises:
        ValueError: If there is no such submodule, or the module is compiled, whose forward cannot be seen.
    """
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
    """Return the message for a step without logits to learn from.

    Args:
        pl_module: The module.
        student: The layer, in words.
        calls: The calls of the layer, none of which has a gradient.
        step: The step, which runs once more to list the layers that it calls.
    """
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
