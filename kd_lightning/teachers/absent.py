"""Weights that are not in memory: those of a teacher whose cache has every row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["AbsentWeights", "is_plain"]


class AbsentWeights:
    """Parameters on the meta device, and the device to which they belong; buffers stay.

    Args:
        module: The network, whose parameters are replaced by parameters without values.
        fingerprint: The fingerprint of the teacher with its weights.
    """

    def __init__(self, module: nn.Module, fingerprint: str) -> None:
        self.module = module
        self.fingerprint = fingerprint
        parameters = [parameter for parameter in module.parameters() if is_plain(parameter)]
        self.device = parameters[0].device if parameters else torch.device("cpu")
        empty = {id(parameter): _empty(parameter) for parameter in parameters}  # one parameter may have two names
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if id(parameter) in empty:
                    part._parameters[name] = empty[id(parameter)]

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a move or cast of the network, given as a function of a tensor."""
        for part in self.module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = fn(buffer)
            for parameter in part._parameters.values():
                if parameter is not None:
                    moved = fn(torch.empty(0, dtype=parameter.dtype, device=self.device))
                    parameter.data = parameter.data.to(moved.dtype)
        self.device = fn(torch.empty(0, device=self.device)).device


def is_plain(parameter: nn.Parameter) -> bool:
    """Return True for a dense tensor with values, which has no type of its own as packed and sharded weights have."""
    return type(parameter.data) is Tensor and not parameter.is_meta


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
