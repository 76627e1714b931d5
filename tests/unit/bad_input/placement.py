"""Bad places for a teacher's weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kd_lightning import Distiller, FrozenTeacher, LayerTerm
from kd_lightning.losses import HintLoss
from tests.unit.bad_input.case import Case


def teacher(**options: Any) -> Callable[[], object]:
    network = nn.Linear(2, 2)
    network.weight.data.mul_(9.0)  # stands for training
    return lambda: FrozenTeacher(network, **options)


def on_meta(**options: Any) -> Callable[[], object]:
    return lambda: FrozenTeacher(nn.Linear(2, 2, device="meta"), **options)


PLACE = "device must be one of this machine, such as 'cpu' or 'cuda:1', got {!r}: {}."
TWO = "a teacher's weights have one place, got {}: leave one out."
CASES = [
    Case("the meta device as a place", teacher(device="meta"), ValueError,
         PLACE.format("meta", "the meta device has no values")),
    Case("a place and the host", teacher(device="cpu", offload=True), ValueError,
         TWO.format("device='cpu' and offload=True")),
    Case("accelerate's map and the host", on_meta(fingerprint="v1", offload=True), ValueError,
         TWO.format("offload=True and accelerate's device map")),
    Case("accelerate's map and a place", on_meta(fingerprint="v1", device="cpu"), ValueError,
         TWO.format("device='cpu' and accelerate's device map")),
    Case(
        "a compiled network on the host", teacher(offload=True, compile=True), ValueError,
        "offload=True moves weights while the network runs, which a compiled network does not allow: leave out compile "
        "or offload.",
    ),
    Case(
        "layers of a network elsewhere",
        lambda: Distiller(teacher(device=torch.device("cpu"))(), layers=[LayerTerm("", "", HintLoss())]),  # pyright: ignore
        ValueError,
        "layers need the teacher's features on the student's device, but the teacher has device='cpu': leave it out, "
        "or take offload=True.",
    ),
]  # fmt: skip
