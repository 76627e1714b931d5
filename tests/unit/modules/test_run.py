"""What a module and a callback that distil share."""

from __future__ import annotations

import threading
from typing import Any

import torch

from kd_lightning.modules.optimization import configure_with_groups


def test_groups_go_to_no_optimizer_of_another_thread() -> None:
    weights, policy = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    others: list[torch.optim.Optimizer] = []

    def configure() -> Any:
        other = threading.Thread(target=lambda: others.append(torch.optim.SGD([torch.ones(1)], lr=0.1)))
        other.start()
        other.join()
        return torch.optim.SGD([weights], lr=0.1)

    original = torch.optim.Optimizer.__init__
    optimizer = configure_with_groups(configure, [{"params": [policy]}])
    assert torch.optim.Optimizer.__init__ is original
    assert [group["params"] for group in optimizer.param_groups] == [[weights], [policy]]
    assert len(others[0].param_groups) == 1
