"""Temperatures by what the batch says of its samples, from the batch to the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from kd_lightning import DistillationModule, Distiller, TeacherEnsemble
from kd_lightning.callbacks import DistillationCallback
from kd_lightning.functional import kd_loss
from kd_lightning.losses import FusedLinearKDLoss, KDLoss
from kd_lightning.models import CausalTransformer
from kd_lightning.temperature import (
    GroupTemperature,
    LinearSchedule,
    LogitStdTemperature,
    ProductTemperature,
    Progress,
    Signals,
    Temperature,
    TemperaturePolicy,
)
from kd_lightning.temperature.signals import take_extra
from tests.helpers import NUM_CLASSES, NUM_FEATURES

LANGUAGES = ["en", "fi", "sv"]
BY_NAME = {"en": 1.0, "fi": 2.0, "sv": 6.0}
SAMPLES = 12


def samples(strings: bool) -> Any:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, NUM_FEATURES, generator=generator)
    return [
        {"x": x, "label": i % NUM_CLASSES, "language": LANGUAGES[i % 3] if strings else i % 3}
        for i, x in enumerate(inputs)
    ]


def policy(strings: bool) -> GroupTemperature:
    return GroupTemperature("language", BY_NAME if strings else dict(enumerate(BY_NAME.values())))


def expected_loss(student: nn.Module, teacher: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The mean over the samples of the loss of each at its own temperature."""
    temperatures = torch.tensor([BY_NAME[LANGUAGES[i % 3]] for i in range(len(batch["x"]))])
    rows = [
        kd_loss(student(x[None]), teacher(x[None]).detach(), t.item())
        for x, t in zip(batch["x"], temperatures, strict=True)
    ]
    return 0.9 * torch.stack(rows).mean() + 0.1 * F.cross_entropy(student(batch["x"]), batch["label"])


class Strict(nn.Module):
    """Takes ``x`` and nothing else, as networks do."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.net = nn.Linear(NUM_FEATURES, NUM_CLASSES)
        self.net.weight.data = torch.randn(NUM_CLASSES, NUM_FEATURES, generator=generator)  # stands for training

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Theirs(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        return F.cross_entropy(self.net(batch["x"]), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(module: LightningModule, data: Any, *callbacks: Any, steps: int = 1) -> Trainer:
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, data if isinstance(data, DataLoader) else DataLoader(data, batch_size=SAMPLES))
    return trainer


@pytest.mark.parametrize("strings", [True, False])
@pytest.mark.parametrize("way", ["module", "callback"])
def test_the_column_reaches_the_loss_and_not_the_networks(way, strings):
    student, teacher = Strict(1), Strict(2)
    data = samples(strings)
    batch = next(iter(DataLoader(data, batch_size=SAMPLES)))
    expected = expected_loss(student, teacher, batch)
    gradients = torch.autograd.grad(expected, list(student.parameters()))
    before = [parameter.detach().clone() for parameter in student.parameters()]
    if way == "module":
        module = DistillationModule(student, teacher, policy(strings), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        train(module, data)
    else:
        train(Theirs(student), data, DistillationCallback(teacher, "net", policy(strings), targets="label"))
    for parameter, was, gradient in zip(student.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), was - 0.1 * gradient, rtol=1e-4, atol=1e-6)


def test_the_column_reaches_the_fused_loss():
    """Which has no logits to show a policy, and needs none for a group."""
    tokens = torch.randint(0, 32, (6, 5), generator=torch.Generator().manual_seed(0))
    data: Any = [{"input_ids": row, "labels": row, "language": i % 3} for i, row in enumerate(tokens)]
    weights = []
    for loss in (KDLoss(), FusedLinearKDLoss(chunk_size=4)):
        torch.manual_seed(0)
        student, teacher = (CausalTransformer(vocab_size=32, dim=8, depth=1) for _ in range(2))
        for parameter in teacher.parameters():
            parameter.data.mul_(3.0)  # stands for training
        module = DistillationModule(
            student, teacher, policy(False), loss, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), shift_labels=True
        )
        train(module, data)
        weights.append({name: value.clone() for name, value in student.state_dict().items()})
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)


def test_a_position_of_a_tuple_in_validation_and_prediction_too():
    data: Any = [(s["x"], s["label"], s["language"]) for s in samples(False)]
    module = DistillationModule(Strict(1), Strict(2), GroupTemperature(2, {0: 1.0, 1: 2.0, 2: 6.0}))
    loader = DataLoader(data, batch_size=SAMPLES)
    trainer = train(module, loader)
    assert "val_kd_loss" in trainer.validate(module, loader, verbose=False)[0]
    predictions: Any = trainer.predict(module, loader)
    assert predictions[0].shape == (SAMPLES, NUM_CLASSES)
    assert module.example_inputs.shape == (SAMPLES, NUM_FEATURES)


def test_within_combinations_and_in_an_ensemble():
    inner = policy(False)
    product = ProductTemperature([LogitStdTemperature(), inner])
    assert product.batch_keys == ("language",)
    ensemble = TeacherEnsemble([Strict(2), Strict(3)], temperatures=[4.0, inner])
    distiller = Distiller(ensemble, product, task_weight=0.0)
    assert distiller.batch_keys == ("language",)
    x = torch.randn(6, NUM_FEATURES)
    out = distiller(x, Strict(1)(x), extra={"language": torch.arange(6) % 3})
    assert out.temperature.student.shape == (6, 1)


def test_tokens_take_one_group_a_sample_or_one_a_position():
    logits = torch.zeros(2, 3, 4)
    group = GroupTemperature("k", {0: 1.0, 1: 3.0})
    per_sample = group(Signals(logits, logits, extra={"k": torch.tensor([1, 0])}))
    torch.testing.assert_close(per_sample.teacher, torch.tensor([3.0, 1.0]).reshape(2, 1, 1))
    positions = torch.tensor([[0, 1, 1], [1, 0, 0]])
    per_position = group(Signals(logits, logits, extra={"k": positions}))
    torch.testing.assert_close(per_position.teacher.squeeze(-1), positions * 2.0 + 1)


def test_a_group_may_have_a_schedule():
    group = GroupTemperature("k", {0: LinearSchedule(8.0, 2.0), 1: 3.0}, default=5.0)
    zeros = torch.zeros(3, 2)
    signals = Signals(zeros, zeros, progress=Progress(1, 4), extra={"k": torch.tensor([0, 1, 2])})
    torch.testing.assert_close(group(signals).student.squeeze(-1), torch.tensor([6.5, 3.0, 5.0]))


def test_bounds_and_multiplier_hold():
    group = GroupTemperature("k", {0: 2.0, 1: 8.0}, max_temperature=10.0)
    group.multiplier.mul_(2)
    computed = group(Signals(torch.zeros(2, 2), torch.zeros(2, 2), extra={"k": [0, 1]}))
    assert isinstance(computed, Temperature)
    assert computed.student.squeeze(-1).tolist() == [4.0, 10.0]


@pytest.mark.parametrize("groups", [{"en": 2.0, "fi": 4.0}, {0: 2.0, 1: 4.0}])
def test_from_yaml(groups):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--temperature", type=TemperaturePolicy)
    cosine = {"class_path": "kd_lightning.temperature.CosineSchedule", "init_args": {"init_value": 8, "end_value": 2}}
    given = {"key": "source", "temperatures": groups, "default": cosine}
    built = parser.instantiate(
        parser.parse_object(
            {"temperature": {"class_path": "kd_lightning.temperature.GroupTemperature", "init_args": given}}
        )
    )
    assert built.temperature.temperatures == groups
    zeros = torch.zeros(3, 2)
    signals = Signals(zeros, zeros, progress=Progress(0, 4), extra={"source": [*groups, "other"]})
    values = built.temperature(signals)
    assert values.student.squeeze(-1).tolist() == [2.0, 4.0, 8.0]


def test_take_extra_leaves_other_batches_alone():
    tensor = torch.zeros(2)
    batch = {"x": tensor}
    assert take_extra(tensor, ["k"]) == (tensor, {})
    assert take_extra(batch, ["k"])[0] is batch
    assert take_extra((1, 2), ["k", 5]) == ((1, 2), {})
