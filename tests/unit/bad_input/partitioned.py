"""A teacher whose weights DeepSpeed has partitioned (ZeRO 3), which marks each by an attribute."""

from typing import Any

import torch
from torch import nn

from kd_lightning import FrozenTeacher
from tests.unit.bad_input.case import Case


def partitioned(**options: Any) -> object:
    network = nn.Linear(2, 2)
    for parameter in network.parameters():
        parameter.ds_tensor = parameter.data  # pyright: ignore[reportAttributeAccessIssue]
        parameter.data = torch.empty(0)
    return FrozenTeacher(network, **options)


MESSAGE = (
    "the teacher Linear has weights that DeepSpeed has partitioned (ZeRO 3), which can be neither read from a "
    "checkpoint here nor hashed. Load them before deepspeed.initialize, and name them and their version: "
    "FrozenTeacher(engine.module, fingerprint='model v3')."
)
CASES = [
    Case("a partitioned teacher without a name", partitioned, ValueError, MESSAGE),
    Case("a partitioned teacher with a checkpoint", lambda: partitioned(checkpoint="teacher.pt", fingerprint="v1"),
         ValueError, MESSAGE),
]  # fmt: skip
