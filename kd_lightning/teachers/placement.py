"""The devices of a teacher's weights, inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from kd_lightning.teachers.made_at import device_of

__all__ = ["Dispatched", "OffloadedToHost", "OnDevice", "Placement", "placement_of"]


class Placement:
    """Weights that follow the moves of the module around: the default."""

    gives_features = True
    """Whether features of layers come out on the inputs' device."""

    def place(self, module: nn.Module) -> None:
        """Put weights that have values in their place."""

    def move(self, module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a move or cast of the module around, given as a function of a tensor."""
        module._apply(fn)

    def device_of_logits(self, inputs: Any, weight: Tensor | None) -> torch.device:
        """Return the device on which the logits of these inputs are expected."""
        return device_of(inputs) if weight is None else weight.device

    def call(self, run: Callable[[Any], Any], module: nn.Module, inputs: Any) -> Any:
        """Return the outputs for these inputs."""
        return run(inputs)


class Dispatched(Placement):
    """Weights that accelerate has placed, whose hooks bring each layer's inputs to its device: nothing is moved."""

    def move(self, module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
        """Leave the weights where they are."""


class OnDevice(Placement):
    """Weights that stay on a device of their own: inputs are copied to it, outputs to where the inputs were."""

    gives_features = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def place(self, module: nn.Module) -> None:
        """Move the weights to the device."""
        module.to(self.device)

    def move(self, module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a cast only."""
        module._apply(lambda tensor: tensor.to(fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).dtype))

    def device_of_logits(self, inputs: Any, weight: Tensor | None) -> torch.device:
        """Return the inputs' device."""
        return device_of(inputs)

    def call(self, run: Callable[[Any], Any], module: nn.Module, inputs: Any) -> Any:
        """Return the outputs, computed on the device of the weights and on the inputs' device."""
        home = device_of(inputs)
        outputs = run(tree_map_only(Tensor, lambda tensor: tensor.to(self.device), inputs))
        return tree_map_only(Tensor, lambda tensor: tensor.to(home), outputs)


class OffloadedToHost(OnDevice):
    """Weights that stay on the host: those of a layer are on the inputs' device while that layer runs.

    Hooks are on the module during a call only. A layer is a module with parameters or buffers of its own; torch's
    ``MultiheadAttention`` reads its output projection's parameters itself, so that they move with it.
    """

    gives_features = True

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def call(self, run: Callable[[Any], Any], module: nn.Module, inputs: Any) -> Any:
        """Return the outputs, computed on the inputs' device."""
        device = device_of(inputs)
        with ExitStack() as hooks:
            for part in module.modules():
                if own := list(_slots(part, isinstance(part, nn.MultiheadAttention))):
                    layer = _Layer(own, device)
                    handles = (
                        part.register_forward_pre_hook(layer.fetch),
                        part.register_forward_hook(layer.release, always_call=True),
                    )
                    for handle in handles:
                        hooks.callback(handle.remove)
            return run(inputs)


class _Layer:
    """The tensors of a layer, which are on a device between two hooks."""

    def __init__(self, slots: list[tuple[dict[str, Any], str]], device: torch.device) -> None:
        self.slots = slots
        self.device = device
        self.on_host: list[Tensor] = []

    def fetch(self, *_: Any) -> None:
        self.on_host = [tensors[name] for tensors, name in self.slots]
        for (tensors, name), tensor in zip(self.slots, self.on_host, strict=True):
            tensors[name] = tensor.to(self.device, non_blocking=True)

    def release(self, *_: Any) -> None:
        for (tensors, name), tensor in zip(self.slots, self.on_host, strict=True):
            tensors[name] = tensor
        self.on_host = []


def _slots(part: nn.Module, with_children: bool) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the dictionaries and names under which a module has its tensors."""
    for owner in part.modules() if with_children else (part,):
        for tensors in (owner._parameters, owner._buffers):
            yield from ((tensors, name) for name, tensor in tensors.items() if tensor is not None)


def placement_of(module: nn.Module, device: str | torch.device | None, offload: bool, has_file: bool) -> Placement:
    """Return where the teacher's weights are to be.

    Args:
        module: The network.
        device: A device of its own, or None.
        offload: Whether the weights stay on the host.
        has_file: Whether weights on the meta device will be read from a file.

    Raises:
        ValueError: If the device does not exist, or two places are given.
    """
    # accelerate's hooks bring each layer's inputs to its device, so that a move would break the placement
    spread = len(set((getattr(module, "hf_device_map", None) or {}).values())) > 1
    dispatched = spread or (not has_file and any(parameter.is_meta for parameter in module.parameters()))
    if (device is not None) + bool(offload) + dispatched > 1:
        places = [f"device={str(device)!r}"] * (device is not None) + ["offload=True"] * bool(offload)
        places += ["accelerate's device map"] * dispatched
        raise ValueError(f"a teacher's weights have one place, got {' and '.join(places)}: leave one out.")
    if dispatched:
        return Dispatched()
    if device is None:
        return OffloadedToHost() if offload else Placement()
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
        if place.type == "meta":
            raise RuntimeError("the meta device has no values")
    except (RuntimeError, AssertionError, TypeError) as error:
        what = " ".join(str(error).split(". ")[0].split()).rstrip(".")
        raise ValueError(
            f"device must be one of this machine, such as 'cpu' or 'cuda:1', got {device!r}: {what}."
        ) from None
    return OnDevice(place)
