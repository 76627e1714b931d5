"""Freezing a network, TorchScript modules and exported programs included."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# the position of the argument that says "training"
_MODES = {torch.ops.aten.dropout.default: 2, torch.ops.aten.batch_norm.default: 5}


def freeze(module: nn.Module) -> bool:
    """Take the gradient from all parameters and put a network in eval mode; raise if it is a program in training mode.

    Returns:
        False for an exported program, whose mode is that of its export.
    """
    for parameter in module.parameters():  # because a ScriptModule refuses requires_grad_
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(False)
    try:
        module.eval()
    except NotImplementedError:
        nodes: Any = module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ()
        if any(node.target in _MODES and node.args[_MODES[node.target]] for node in nodes):
            raise ValueError(
                "the teacher is a program that was exported in training mode, which stays: its dropout or batch norm "
                "would disturb the logits. Export network.eval()."
            ) from None
        return False
    return True
