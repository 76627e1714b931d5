"""Metrics follow what the task is: labels, one logit, values and soft labels, in the modules and the callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import ClassificationModule, DistillationModule
from kd_lightning.callbacks import DistillationCallback
from kd_lightning.losses import BernoulliKDLoss, MSELogitsLoss

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


def test_one_logit_with_the_callback(make_trainer: MakeTrainer) -> None:
    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Scaled()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    callback = DistillationCallback(Scaled(-1.0), kd_loss=BernoulliKDLoss(), validate=True)
    data = loader(INPUTS[:, :1], (INPUTS[:, :1] > 0).float())
    trainer = make_trainer(callbacks=[callback], max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(Module(), data, data)
    assert trainer.callback_metrics["val_agreement"] == 0.0
