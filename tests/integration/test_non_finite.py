"""A loss that is not finite stops the run, before weights are NaN; or its step is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import ClassificationModule, DistillationModule, FrozenTeacher
from kd_lightning.callbacks import DistillationCallback, SkipNonFinite
from kd_lightning.modules.non_finite import NonFiniteWatch
from kd_lightning.output import DistillationOutput
from tests.helpers import make_data, make_network, make_teacher, snapshot

MakeTrainer = Callable[..., Trainer]


def loader(bad_batch: int | None = 2, value: float = float("nan"), rows: int = 3) -> DataLoader[Any]:
    inputs, targets = make_data(64).tensors
    if bad_batch is not None:
        inputs[16 * bad_batch : 16 * bad_batch + rows] = value
    return DataLoader(TensorDataset(inputs, targets), batch_size=16)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def module_of(kind: str, student: nn.Module, teacher: nn.Module) -> tuple[LightningModule, list[Any]]:
    if kind == "module":
        return DistillationModule(student=student, teacher=teacher, optimizer=sgd), []
    return ClassificationModule(student, optimizer=sgd), [DistillationCallback(teacher)]


@pytest.mark.parametrize("kind", ["module", "callback"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_run_stops_before_its_weights_are_damaged(kind: str, value: float, make_trainer: MakeTrainer) -> None:
    student = make_network(norm=False)
    module, callbacks = module_of(kind, student, make_teacher(norm=False))
    trainer = make_trainer(max_epochs=2, callbacks=callbacks)
    match = (
        r"the loss of step 2 is not finite \(kd_loss nan, task_loss .*\): 3 of 16 rows of the student's logits are NaN "
        r"or infinite and 3 of 16 rows of the teacher's"
    )
    with pytest.raises(FloatingPointError, match=match):
        trainer.fit(module, loader(value=value))
    assert trainer.global_step == 2
    assert all(parameter.isfinite().all() for parameter in student.parameters())


def test_steps_are_left_out(make_trainer: MakeTrainer) -> None:
    """Weights and moments are as if the batch had not been there."""
    states = []
    for bad, epochs in ((3, 1), (None, 1)):
        torch.manual_seed(0)
        module = DistillationModule(student=make_network(norm=False), teacher=make_teacher(norm=False), optimizer=sgd)
        skip = SkipNonFinite()
        data = loader(bad)
        trainer = make_trainer(max_epochs=epochs, callbacks=[skip], limit_train_batches=1.0 if bad else 3)
        if bad:
            with pytest.warns(UserWarning, match="step 3 is left out, because its gradients are not finite"):
                trainer.fit(module, data)
        else:
            trainer.fit(module, data)
        assert skip.skipped == (1 if bad else 0)
        states.append((snapshot(module.student), trainer.optimizers[0].state_dict()["state"]))
    for name, value in states[0][0].items():
        assert torch.equal(value, states[1][0][name]), name
    for one, two in zip(states[0][1].values(), states[1][1].values(), strict=True):
        assert torch.equal(one["momentum_buffer"], two["momentum_buffer"])


@pytest.mark.filterwarnings("ignore:step .* is left out")
def test_many_steps_in_a_row_stop_the_run(make_trainer: MakeTrainer) -> None:
    module = DistillationModule(student=make_network(norm=False), teacher=make_teacher(norm=False), optimizer=sgd)
    data = loader(0, rows=64)
    with pytest.raises(FloatingPointError, match="3 steps in a row had gradients that are not finite"):
        make_trainer(max_epochs=1, callbacks=[SkipNonFinite(max_consecutive=2)]).fit(module, data)


def test_on_an_accelerator_only_steps_that_log_are_read() -> None:
    class Elsewhere(Tensor):
        """Says that it is not on the CPU, and counts what is read from it."""

        reads = 0
        is_cpu = False  # pyright: ignore

        def item(self) -> Any:
            Elsewhere.reads += 1
            return super().item()

    def out(loss: float) -> DistillationOutput:
        value, logits = torch.tensor(loss).as_subclass(Elsewhere), torch.zeros(2, 3)
        return DistillationOutput(value, torch.tensor(loss), torch.tensor(0.0), None, logits, logits, 1.0, 0.0)  # pyright: ignore

    watch = NonFiniteWatch()
    for step, loss in enumerate((1.0, float("nan"), 1.0, float("nan"))):
        watch.check(out(loss), step, reads=False)
    assert Elsewhere.reads == 0
    with pytest.raises(FloatingPointError, match=r"the loss of step 1 is not finite .* all logits are finite"):
        watch.check(out(2.0), 4, reads=True)


def test_a_teacher_whose_weights_are_not_finite(tmp_path: Any) -> None:
    network = make_teacher()
    network.get_parameter("0.weight").data[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"has weights that are NaN or infinite \(weights in place\): 0.weight. Its trai"
    ):
        FrozenTeacher(network)
    torch.save(network.state_dict(), tmp_path / "teacher.pt")
    with pytest.raises(ValueError, match=r"has weights that are NaN or infinite \(.*teacher.pt\): 0.weight"):
        FrozenTeacher(make_teacher(), tmp_path / "teacher.pt").load()
