"""Metrics follow what the task is: labels, one logit, values and soft labels, in the modules and the callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import ClassificationModule, DistillationModule
from kd_lightning.callbacks import DistillationCallback
from kd_lightning.functional import kd_loss
from kd_lightning.losses import BernoulliKDLoss, CrossEntropyLoss, MSELogitsLoss

MakeTrainer = Callable[..., Trainer]

INPUTS = torch.tensor([[2.0, -1.0, 3.0], [-1.0, 1.5, 0.5], [1.0, 1.0, -1.0], [-2.0, -1.0, -0.5]])


class Scaled(nn.Module):
    """Gives its inputs, times a number, as logits."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([factor]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def loader(inputs: Tensor, targets: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(inputs, targets), batch_size=2)


def measure(module: LightningModule, data: DataLoader[Any], make_trainer: MakeTrainer) -> dict[str, float]:
    (values,) = make_trainer().validate(module, data, verbose=False)
    return dict(values)


@pytest.mark.parametrize(
    ("targets", "loss", "accuracy"),
    [
        ((INPUTS > 0).float(), nn.BCEWithLogitsLoss(), 1.0),
        ((INPUTS < 0).float(), nn.BCEWithLogitsLoss(), 0.0),
        (INPUTS.softmax(-1), None, 1.0),
        (INPUTS.argmax(-1), None, 1.0),
        (INPUTS.argmax(-1).int(), None, 1.0),
        (INPUTS.argmax(-1).to(torch.uint8), None, 1.0),
        (INPUTS, nn.MSELoss(), None),
        (torch.full((4,), -100), None, None),
    ],
)
def test_several_logits(
    targets: Tensor, loss: nn.Module | None, accuracy: float | None, make_trainer: MakeTrainer
) -> None:
    data = loader(INPUTS, targets)
    module = DistillationModule(
        student=Scaled(), teacher=Scaled(2.0), task_loss=loss, kd_loss=MSELogitsLoss(), optimizer=None
    )
    values = measure(module, data, make_trainer)
    plain = measure(ClassificationModule(Scaled(), task_loss=loss), data, make_trainer)
    assert values.get("val_acc") == plain.get("val_acc") == accuracy
    assert values.get("val_agreement") == (None if accuracy is None else 1.0)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize(
    ("targets", "accuracy"), [((INPUTS[:, 0] > 0).float(), 1.0), ((INPUTS[:, 0] < 0).float(), 0.0)]
)
def test_one_logit(shape: tuple[int, ...], targets: Tensor, accuracy: float, make_trainer: MakeTrainer) -> None:
    class Loss(nn.BCEWithLogitsLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return super().forward(input, target.reshape(input.shape))

    data = loader(INPUTS[:, :1], targets.reshape(shape))
    module = DistillationModule(
        student=Scaled(), teacher=Scaled(-2.0), task_loss=Loss(), kd_loss=BernoulliKDLoss(), kd_weight=0.5
    )
    values = measure(module, data, make_trainer)
    assert (values["val_acc"], values["val_teacher_acc"], values["val_agreement"]) == (accuracy, 1 - accuracy, 0.0)
    assert "val_acc_top5" not in values


class WithoutTeacher(LightningModule):
    """A module that knows nothing of distillation."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.net, self.loss = Scaled(), loss

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def scores(
    module: LightningModule, callback: DistillationCallback, make_trainer: MakeTrainer, train: Any, *others: Any
) -> dict[str, float]:
    trainer = make_trainer(callbacks=[callback], max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(module, train, [train, *others])
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val_")}


def test_one_logit_with_the_callback(make_trainer: MakeTrainer) -> None:
    callback = DistillationCallback(Scaled(-1.0), kd_loss=BernoulliKDLoss(), validate=True)
    data = loader(INPUTS[:, :1], (INPUTS[:, :1] > 0).float())
    values = scores(WithoutTeacher(nn.BCEWithLogitsLoss()), callback, make_trainer, data)
    assert values["val_agreement"] == 0.0


def test_agreement_with_the_callback_is_over_labelled_positions(make_trainer: MakeTrainer) -> None:
    """Student and teacher predict opposite classes; without a label there is nothing to agree on."""
    callback = DistillationCallback(Scaled(-1.0), validate=True)
    nowhere = loader(INPUTS, torch.full((4,), -100))
    values = scores(WithoutTeacher(CrossEntropyLoss()), callback, make_trainer, nowhere)
    assert not values
    targets = INPUTS.argmax(-1)
    half = loader(INPUTS, torch.where(torch.arange(4) < 2, targets, -100))
    values = scores(WithoutTeacher(CrossEntropyLoss()), callback, make_trainer, loader(INPUTS, targets), half)
    assert set(values) == {
        f"val_{name}/dataloader_idx_{index}" for name in ("kd_loss", "agreement") for index in (0, 1)
    }
    rows = kd_loss(INPUTS, -INPUTS, 4.0, reduction="none")
    assert values["val_kd_loss/dataloader_idx_0"] == pytest.approx(float(rows.mean()), rel=1e-5)
    assert values["val_kd_loss/dataloader_idx_1"] == pytest.approx(float(rows[:2].mean()), rel=1e-5)


def test_targets_of_the_callback_may_be_lists(make_trainer: MakeTrainer) -> None:
    targets = torch.where(torch.arange(4) < 2, INPUTS.argmax(-1), -100)
    rows = kd_loss(INPUTS, -INPUTS, 4.0, reduction="none")
    for collate in (list, np.array):
        data = DataLoader(
            [(x, int(y)) for x, y in zip(INPUTS, targets, strict=True)],  # pyright: ignore[reportArgumentType]
            batch_size=4,
            collate_fn=lambda rows, collate=collate: (torch.stack([x for x, _ in rows]), collate([y for _, y in rows])),
        )

        class Module(WithoutTeacher):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return self(batch[0]).square().mean()

        callback = DistillationCallback(Scaled(-1.0), validate=True)
        values = scores(Module(nn.Identity()), callback, make_trainer, data)
        assert values["val_kd_loss"] == pytest.approx(float(rows[:2].mean()), rel=1e-5)


def test_labels_with_the_callback_are_told_by_the_modules_loss(make_trainer: MakeTrainer) -> None:
    """Each row has one label, as class probabilities would: a third of the signs agree."""
    logits = torch.tensor([[2.0, 1.0, 0.5]])
    data = loader(logits, torch.tensor([[1.0, 0.0, 0.0]]))

    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.tensor([0.0, -3.0, -3.0]))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift

    callback = DistillationCallback(Teacher(), validate=True)
    values = scores(WithoutTeacher(nn.BCEWithLogitsLoss()), callback, make_trainer, data)
    assert values["val_agreement"] == pytest.approx(1 / 3)


def test_a_regression_of_one_value(make_trainer: MakeTrainer) -> None:
    """No softmax is taken, so one column is enough; at T = 1 the teacher that is right costs what the targets do."""
    values = INPUTS[:, :1]
    module = DistillationModule(
        Scaled(3.0), Scaled(), temperature=1.0, kd_loss=MSELogitsLoss(), task_loss=nn.MSELoss(), kd_weight=0.5
    )
    measured = measure(module, loader(values, values), make_trainer)
    assert measured["val_kd_loss"] == measured["val_task_loss"] == pytest.approx(4 * values.square().mean().item())
    assert "val_acc" not in measured
