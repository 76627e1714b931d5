"""Bad places for a teacher's weights."""

import warnings
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


def program() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # because torch deprecates TorchScript
        net = torch.jit.script(nn.BatchNorm1d(2).eval())
    return FrozenTeacher(net, placement="offload")  # pyright: ignore[reportArgumentType]


PLACE = (
    "placement must be 'offload', 'offload_whole', a Placement or a device of this machine, such as 'cpu' or 'cuda:1', "
    "got {!r}: {}."
)
TWO = "a teacher's weights have one place, got {} and accelerate's device map: leave one out."
COMPILED = (
    "placement={!r} moves weights while the network runs, which a compiled network does not allow: leave out compile "
    "or placement."
)
CASES = [
    Case("the meta device as a place", teacher(placement="meta"), ValueError,
         PLACE.format("meta", "the meta device has no values")),
    Case("an unknown place", teacher(placement="ofload"), ValueError,
         PLACE.format("ofload", "no device has this name")),
    Case("a number as a place", teacher(placement=1), ValueError, PLACE.format(1, "a int names no place")),
    Case("accelerate's map and the host", on_meta(fingerprint="v1", placement="offload"), ValueError,
         TWO.format("placement='offload'")),
    Case("accelerate's map and a place", on_meta(fingerprint="v1", placement=torch.device("cpu")), ValueError,
         TWO.format("placement='cpu'")),
    Case("a compiled network, layer by layer", teacher(placement="offload", compile=True), ValueError,
         COMPILED.format("offload")),
    Case("a compiled network, as a whole", teacher(placement="offload_whole", compile=True), ValueError,
         COMPILED.format("offload_whole")),
    Case(
        "a TorchScript program on the host",
        program,
        ValueError,
        "placement='offload' replaces the weights of a network's modules, which a TorchScript program does not allow: "
        "give the network itself, or a device as placement.",
    ),
    Case(
        "layers of a network elsewhere",
        lambda: Distiller(teacher(placement=torch.device("cpu"))(), layers=[LayerTerm("", "", HintLoss())]),  # pyright: ignore
        ValueError,
        "layers need the teacher's features on the student's device, but the teacher has placement='cpu': "
        "leave it out, or take placement='offload'.",
    ),
]  # fmt: skip
