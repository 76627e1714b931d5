from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.nn import functional as F

from kd_lightning import ClassificationModule, DistillationModule, FrozenTeacher
from tests.helpers import make_data, make_loader, make_network

MakeTrainer = Callable[..., Trainer]


def test_fit_equals_a_bare_loop(make_trainer: MakeTrainer) -> None:
    module, network = ClassificationModule(make_network(), optimizer=sgd), make_network()
    network.load_state_dict(module.model.state_dict())
    trainer = make_trainer()
    trainer.fit(module, make_loader(), make_loader(40, seed=1))
    optimizer = sgd(network.parameters())
    for _ in range(2):
        for inputs, targets in make_loader():
            optimizer.zero_grad()
            F.cross_entropy(network(inputs), targets).backward()
            optimizer.step()
    for one, two in zip(network.parameters(), module.model.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    inputs, targets = make_data(40, seed=1).tensors
    with torch.no_grad():
        logits = network.eval()(inputs)
    torch.testing.assert_close(trainer.callback_metrics["val_loss"], F.cross_entropy(logits, targets))
    torch.testing.assert_close(trainer.callback_metrics["val_acc"], (logits.argmax(1) == targets).float().mean())
    assert "val_teacher_acc" not in trainer.callback_metrics


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)  # pyright: ignore[reportArgumentType]


def test_its_checkpoint_teaches(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = ClassificationModule(make_network(32))
    trainer = make_trainer()
    trainer.fit(module, make_loader())
    trainer.save_checkpoint(tmp_path / "teacher.ckpt")
    student = DistillationModule(make_network(), FrozenTeacher(make_network(32), tmp_path / "teacher.ckpt"))
    make_trainer(max_epochs=1).fit(student, make_loader())
    loaded = ClassificationModule.load_from_checkpoint(tmp_path / "teacher.ckpt", model=make_network(32))
    inputs = torch.randn(3, 8)
    assert student.teacher is not None
    torch.testing.assert_close(student.teacher(inputs), loaded.eval()(inputs))


def test_tokens_and_own_loss(make_trainer: MakeTrainer) -> None:
    inputs, targets = torch.randn(8, 5, 8), torch.randint(0, 4, (8, 5))
    targets[:, 3:] = -100
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=4)
    module = ClassificationModule(nn.Linear(8, 4), task_loss=nn.CrossEntropyLoss(label_smoothing=0.1))
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader, loader)
    assert 0 <= trainer.callback_metrics["val_acc"] <= 1


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_no_targets(stage: str, make_trainer: MakeTrainer) -> None:
    loader = torch.utils.data.DataLoader(torch.randn(8, 8), batch_size=4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="learns from targets"):
        getattr(make_trainer(), stage)(ClassificationModule(make_network()), loader)
