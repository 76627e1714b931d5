from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kd_lightning import FrozenTeacher
from kd_lightning.teachers.weights import fingerprint, load_weights
from tests.helpers import assert_same, snapshot
from tests.unit.teachers.helpers import network


def test_fingerprint_sees_every_bit(teacher: nn.Module) -> None:
    original = fingerprint(teacher)
    assert fingerprint(copy.deepcopy(teacher)) == original
    for name in teacher.state_dict():
        other = copy.deepcopy(teacher)
        flat = other.state_dict()[name].reshape(-1)
        flat[0] = flat[0] + 1 if not flat.is_floating_point() else torch.nextafter(flat[0], torch.tensor(torch.inf))
        assert fingerprint(other) != original, name


def write(kind: str, weights: dict[str, torch.Tensor], folder: Path) -> Path:
    path = folder / f"teacher{'.safetensors' if kind == 'safetensors' else '.pt'}"
    if kind == "safetensors":
        save_file(weights, path)
    elif kind == "bare":
        torch.save(weights, path)
    elif kind == "mdistiller":
        torch.save({"model": weights, "epoch": 240, "best_acc": 79.4}, path)
    elif kind == "data parallel":
        torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}}, path)
    elif kind == "lightning":
        renamed = {f"student.{name}": value for name, value in weights.items()}
        policy = {"distiller.temperature.multiplier": torch.ones(1)}
        torch.save({"state_dict": renamed | policy, "epoch": 3, "hyper_parameters": {}}, path)
    elif kind == "compiled":
        torch.save({"state_dict": {f"student._orig_mod.{name}": v for name, v in weights.items()}}, path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "bare", "mdistiller", "data parallel", "lightning", "compiled"])
def test_every_kind_of_checkpoint_loads(kind: str, teacher: nn.Module, tmp_path: Path) -> None:
    path = write(kind, snapshot(teacher), tmp_path)
    other = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 6))
    frozen = FrozenTeacher(other, checkpoint=path)
    assert not frozen.loaded
    inputs = torch.randn(3, 8)
    assert torch.equal(frozen(inputs), FrozenTeacher(teacher)(inputs))
    assert frozen.loaded


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "teacher.ckpt").touch()
    with pytest.raises(FileNotFoundError, match=r"Close to it: .*teacher\.ckpt"):
        load_weights(network(), tmp_path / "techer.ckpt")


def test_two_networks_in_one_file_ask_for_the_prefix(tmp_path: Path) -> None:
    one, two = network(), network()
    both = {f"student.{k}": v for k, v in snapshot(one).items()} | {f"teacher.{k}": v for k, v in snapshot(two).items()}
    torch.save({"state_dict": both}, tmp_path / "both.pt")
    target = network()
    with pytest.raises(ValueError, match=r"several prefixes, 'student\.', 'teacher\.'"):
        load_weights(target, tmp_path / "both.pt")
    load_weights(target, tmp_path / "both.pt", prefix="teacher.")
    assert_same(target.state_dict(), snapshot(two))


def test_misfits_are_named_all_at_once_and_nothing_is_loaded(tmp_path: Path) -> None:
    saved = snapshot(network())
    saved["0.extra"] = saved.pop("0.bias")
    saved["3.weight"] = torch.zeros(3, 9)
    torch.save(saved, tmp_path / "odd.pt")
    target = network()
    before = snapshot(target)
    with pytest.raises(ValueError, match=r"missing in the file: 0\.bias") as error:
        load_weights(target, tmp_path / "odd.pt")
    assert "not in the module: 0.extra" in str(error.value)
    assert "3.weight (3, 9) in the file, (3, 8) in the module" in str(error.value)
    assert_same(target.state_dict(), before)


def test_another_class_count_says_so(tmp_path: Path) -> None:
    torch.save(snapshot(network(100)), tmp_path / "hundred.pt")
    with pytest.raises(ValueError, match="class counts differ: 100 in the file, 10 in the module"):
        load_weights(network(10), tmp_path / "hundred.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a checkpoint", "could not be read as weights"),
        (b"", "could not be read as weights"),
        ({"epoch": 3}, "holds no state dict but a dict with keys epoch"),
        (torch.ones(3), "holds no state dict but a Tensor"),
        (SimpleNamespace(weight=1), "could not be read as weights"),  # needs a class: refused by weights_only
    ],
)
def test_files_that_are_no_weights(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        load_weights(network(), path)


def test_a_broken_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"12345678garbage")
    with pytest.raises(ValueError, match="no readable safetensors file"):
        load_weights(network(), tmp_path / "broken.safetensors")
