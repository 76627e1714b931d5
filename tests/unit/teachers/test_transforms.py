"""Inputs of a teacher, from a batch whose inputs were prepared for the student."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from kd_lightning import DistillationModule, Distiller, FrozenTeacher, TeacherCache, TeacherEnsemble
from kd_lightning.layers import LayerTerm
from kd_lightning.losses import HintLoss
from kd_lightning.teachers import FunctionTeacher, Renormalize
from tests.helpers import Net

STUDENT = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def renormalized(images: Tensor) -> Tensor:
    """The formula in float64, pixel by pixel."""
    out = images.double().clone()
    for channel in range(3):
        pixels = out[:, channel] * STUDENT[1][channel] + STUDENT[0][channel]
        out[:, channel] = (pixels - IMAGENET[0][channel]) / IMAGENET[1][channel]
    return out


def test_renormalize_is_the_formula() -> None:
    images = torch.randn(2, 3, 8, 8)
    transform = Renormalize(*STUDENT, *IMAGENET)
    torch.testing.assert_close(transform(images).double(), renormalized(images), rtol=1e-5, atol=1e-6)
    pixels = torch.rand(4, 3, 8, 8)  # what the teacher's own preprocessing makes of the same pixels
    torch.testing.assert_close(transform(v2.functional.normalize(pixels, *STUDENT)),
                               v2.functional.normalize(pixels, *IMAGENET), rtol=1e-4, atol=1e-5)  # fmt: skip


def test_renormalize_resizes_as_torchvision() -> None:
    images = torch.randn(2, 3, 8, 8)
    transform = Renormalize(*STUDENT, *IMAGENET, size=(24, 20))
    expected = v2.functional.resize(renormalized(images).float(), [24, 20], antialias=True)
    torch.testing.assert_close(transform(images), expected, rtol=1e-4, atol=1e-5)
    assert transform(images.bfloat16()).dtype == torch.bfloat16
    assert transform(images[0]).shape == (3, 24, 20)
    again = pickle.loads(pickle.dumps(transform))
    assert repr(again) == repr(transform)
    assert torch.equal(again(images), transform(images))


def seen_by(net: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return seen


def trained(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    net = Net()
    net.stage1[1].running_mean += 0.5  # pyright: ignore  (stands for training)
    return net


TRANSFORM = Renormalize([0.5], [0.5], [0.3], [0.2], size=12)


@pytest.mark.parametrize("transform", [TRANSFORM, v2.Normalize([0.1], [0.2]), torch.tanh, nn.BatchNorm2d(1).eval()])
def test_the_teacher_s_inputs_loss_and_gradient(transform: Any) -> None:
    images, student = torch.randn(4, 1, 8, 8), torch.randn(4, 5, requires_grad=True)
    net = trained()
    plain = copy.deepcopy(net).eval()
    out = Distiller(FrozenTeacher(net, transform=transform), temperature=3.0, task_weight=0.0)(images, student)
    with torch.no_grad():
        logits = plain(transform(images))
    other = Distiller(None, temperature=3.0, task_weight=0.0)(images, student, teacher_logits=logits)
    torch.testing.assert_close(out.loss, other.loss)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (out.loss, other.loss)]
    torch.testing.assert_close(*gradients)
    of_function = FunctionTeacher(plain.forward, transform=transform)
    torch.testing.assert_close(of_function.logits(images), logits)


def test_it_runs_before_casts_and_micro_batches() -> None:
    net = trained()
    seen = seen_by(net)
    FrozenTeacher(net, transform=TRANSFORM, precision="bf16", micro_batch_size=3)(torch.randn(5, 1, 8, 8))
    assert [(tuple(part.shape), part.dtype) for part in seen] == [
        ((3, 1, 12, 12), torch.bfloat16),
        ((2, 1, 12, 12), torch.bfloat16),
    ]


def test_fingerprint_has_the_transform() -> None:
    transforms = [None, TRANSFORM, Renormalize([0.5], [0.5], [0.3], [0.3], size=12), v2.Normalize([0.1], [0.2]),
                  v2.Normalize([0.1], [0.3]), torch.tanh, nn.BatchNorm2d(1), nn.BatchNorm2d(1, eps=0.1)]  # fmt: skip
    found = [FrozenTeacher(trained(), transform=transform).fingerprint() for transform in transforms]
    assert len({*found}) == len(found)
    again = [FrozenTeacher(trained(), transform=copy.deepcopy(each)).fingerprint() for each in transforms]
    assert again == found


def test_the_cache_is_of_one_transform(tmp_path: Path) -> None:
    data = TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8) % 5)

    def teacher(transform: Any) -> FrozenTeacher:
        cache = TeacherCache(tmp_path / "teacher.cache", dtype="float32")
        return FrozenTeacher(trained(), transform=transform, cache=cache)

    one = teacher(TRANSFORM)
    for (images, _), rows in DataLoader(one.index(data), 4):
        torch.testing.assert_close(one.logits(images, rows), trained().eval()(TRANSFORM(images)).detach())
    teacher(Renormalize([0.5], [0.5], [0.3], [0.2], size=12)).index(data)
    with pytest.raises(ValueError, match="teacher"):
        teacher(torch.tanh).index(data)


def test_with_layers_in_a_module(make_trainer: Callable[..., Trainer]) -> None:
    net = trained()
    seen = seen_by(net)
    module = DistillationModule(
        student=Net(width=3),
        teacher=FrozenTeacher(net, transform=Renormalize([0.5], [0.5], [0.3], [0.2], size=16)),
        layers=[LayerTerm("hidden", "hidden", HintLoss(), weight=1.0)],
    )
    data = TensorDataset(torch.randn(16, 1, 8, 8), torch.arange(16) % 5)
    make_trainer(max_epochs=1).fit(module, DataLoader(data, 8))
    assert {tuple(images.shape[1:]) for images in seen} == {(1, 16, 16)}


def test_teachers_of_other_preprocessing_in_an_ensemble() -> None:
    images = torch.randn(4, 1, 8, 8)
    ensemble = TeacherEnsemble([FrozenTeacher(trained(), transform=TRANSFORM), FrozenTeacher(trained(1))])
    one, two = ensemble.logits(images)
    torch.testing.assert_close(one, trained().eval()(TRANSFORM(images)))
    torch.testing.assert_close(two, trained(1).eval()(images))
