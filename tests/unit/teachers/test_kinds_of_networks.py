"""Networks that are no plain eager modules, and the files that their weights come in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd_lightning import Distiller, FrozenTeacher

INPUTS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def plain(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    for parameter in net.parameters():
        parameter.data *= 3.0  # stands for training
    return net.eval()


def int8(net: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(net, {nn.Linear})


KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "dynamic int8": int8,
    "scripted": torch.jit.script,
    "traced": lambda net: torch.jit.trace(net, INPUTS),
    "exported": lambda net: torch.export.export(net, (INPUTS,)).module(),
}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    network = KINDS[kind](plain())
    expected = network(INPUTS).detach()
    teacher = FrozenTeacher(network)
    distiller = Distiller(teacher, task_weight=0.0).to("cpu")
    distiller(INPUTS, torch.zeros(5, 3, requires_grad=True)).loss.backward()
    logits = teacher.logits(INPUTS)
    assert not logits.requires_grad
    assert torch.equal(logits, expected)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher.fingerprint() == FrozenTeacher(KINDS[kind](plain())).fingerprint()
    assert teacher.fingerprint() != FrozenTeacher(KINDS[kind](plain(1))).fingerprint()


def test_a_program_exported_in_training_mode() -> None:
    program = torch.export.export(plain().train(), (INPUTS,))
    with pytest.raises(ValueError, match=r"exported in training mode.*Export network.eval\(\)"):
        FrozenTeacher(program.module())
    with pytest.raises(TypeError, match=r"got ExportedProgram. Give program.module\(\)."):
        FrozenTeacher(program)  # pyright: ignore[reportArgumentType]


def test_a_name_in_the_place_of_the_hash() -> None:
    frozen: Any = torch.jit.freeze(torch.jit.script(plain()))
    with pytest.raises(ValueError, match="constants of its TorchScript"):
        FrozenTeacher(frozen).fingerprint()
    assert FrozenTeacher(frozen, fingerprint="v3").fingerprint() == "v3"


def test_int8_weights_from_a_file(tmp_path: Path) -> None:
    saved = int8(plain())
    torch.save(saved.state_dict(), tmp_path / "int8.pt")
    teacher = FrozenTeacher(int8(plain(1)), tmp_path / "int8.pt")
    assert torch.equal(teacher.logits(INPUTS), saved(INPUTS))
    assert teacher.fingerprint() == FrozenTeacher(saved).fingerprint()


@pytest.mark.parametrize("move_first", [False, True])
def test_a_module_on_the_meta_device(tmp_path: Path, move_first: bool) -> None:
    network = plain()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    teacher = FrozenTeacher(copy.deepcopy(network).to("meta"), tmp_path / "weights.pt")
    if move_first:
        Distiller(teacher).to("cpu")
    assert teacher.fingerprint() == FrozenTeacher(network).fingerprint()
    assert torch.equal(teacher.logits(INPUTS), network(INPUTS))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize(
    "key",
    ["model", "net", "module", "ema", "model_ema", "state_dict", "state_dict_ema", "params", "teacher", "student"],
)
def test_weights_under_a_key(tmp_path: Path, key: str) -> None:
    network = plain()
    torch.save({key: network.state_dict(), "epoch": 3}, tmp_path / "weights.pt")
    teacher = FrozenTeacher(plain(1), tmp_path / "weights.pt")
    assert torch.equal(teacher.logits(INPUTS), network(INPUTS))


def test_weights_and_their_average_are_told_apart(tmp_path: Path) -> None:
    network, average = plain(), plain(1)
    torch.save({"model": network.state_dict(), "ema": average.state_dict()}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"several prefixes, 'model.', 'ema.'. Say which to take"):
        FrozenTeacher(plain(2), tmp_path / "weights.pt").load()

    def logits(prefix: str) -> Tensor:
        return FrozenTeacher(plain(2), tmp_path / "weights.pt", prefix).logits(INPUTS)

    assert torch.equal(logits("model."), network(INPUTS))
    assert torch.equal(logits("ema."), average(INPUTS))
