"""The student's own moving average as a teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from kd_lightning import DistillationModule, Distiller, TeacherEnsemble
from kd_lightning.callbacks import DistillationCallback
from kd_lightning.fused_distiller import FusedDistiller
from kd_lightning.losses import FusedLinearKDLoss
from kd_lightning.models import CausalTransformer
from kd_lightning.teachers import EMATeacher
from kd_lightning.teachers.calls import hidden_states
from tests.helpers import InOrder, assert_same, make_data, make_loader, make_network

Make = Callable[..., DistillationModule]
MakeTrainer = Callable[..., Trainer]


def average_of(teacher: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in teacher.state_dict()["average"].items()}


def expected(history: list[dict[str, Tensor]], decay: float, warmup: bool) -> dict[str, Tensor]:
    """Sum the weights that each state has in the average, in float64."""
    shares = [1.0]
    for step in range(1, len(history)):
        d = min(decay, step / (step + 1)) if warmup else decay
        shares = [d * share for share in shares] + [1 - d]
    assert sum(shares) == pytest.approx(1)
    return {
        name: sum(share * state[name].double() for share, state in zip(shares, history, strict=True))  # pyright: ignore
        if value.is_floating_point()
        else history[-1][name]
        for name, value in history[0].items()
    }


class History(Callback):
    """Keeps the student's weights before training and after each optimiser step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def keep(self, student: nn.Module) -> None:
        self.states.append({name: value.detach().clone() for name, value in student.state_dict().items()})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.keep(getattr(pl_module, "student", pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == len(self.states):  # not of a batch that is accumulated
            self.keep(getattr(pl_module, "student", pl_module))


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_average_in_a_run(decay: float, warmup: bool, make_module: Make, make_trainer: MakeTrainer) -> None:
    teacher, history = EMATeacher(decay, warmup), History()
    make_trainer(max_epochs=3, callbacks=[history]).fit(make_module(teacher=teacher), make_loader())
    assert len(history.states) == 13
    for name, value in expected(history.states, decay, warmup).items():
        torch.testing.assert_close(average_of(teacher)[name], value.to(average_of(teacher)[name].dtype))


def test_accumulated_batches_are_one_step(make_module: Make, make_trainer: MakeTrainer) -> None:
    teacher, history = EMATeacher(0.9), History()
    trainer = make_trainer(max_epochs=3, accumulate_grad_batches=2, callbacks=[history])
    trainer.fit(make_module(teacher=teacher), make_loader())
    assert len(history.states) == 7
    assert teacher.state_dict()["updates"] == 6
    for name, value in expected(history.states, 0.9, True).items():
        torch.testing.assert_close(average_of(teacher)[name], value.to(average_of(teacher)[name].dtype))


def test_it_teaches_what_it_says(make_module: Make, make_trainer: MakeTrainer) -> None:
    """Loss and gradient against the formula, with a temperature of the average's own."""
    student = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5)).double()
    teacher = EMATeacher(0.5, warmup=False, temperature=2.0)
    teacher.follow(student)
    first = copy.deepcopy(student.state_dict())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += torch.randn_like(parameter)
    teacher.update()
    x = torch.randn(5, 8, dtype=torch.float64)
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    out = Distiller(teacher, temperature=4.0, task_weight=0.0, kd_weight=1.0)(x, logits)
    (gradient,) = torch.autograd.grad(out.loss, logits)

    average = {name: (first[name] + value) / 2 for name, value in student.state_dict().items()}
    p = ((x @ average["0.weight"].T + average["0.bias"]) / 2).softmax(1)
    q = (logits.detach() / 4).softmax(1)
    torch.testing.assert_close(out.loss, 4 * 2 * (p * (p.log() - q.log())).sum(1).mean())
    torch.testing.assert_close(gradient, 2 * (q - p) / 5)
    assert not teacher.logits(x.clone().requires_grad_()).requires_grad
    assert float(out.temperatures[0].teacher) == 2


def test_bfloat16_weights_do_not_stand_still() -> None:
    student = nn.Linear(1, 1, bias=False).bfloat16()
    student.weight.data.fill_(0.0)
    teacher = EMATeacher(0.999, warmup=False)
    teacher.follow(student)
    student.weight.data.fill_(1.0)
    for _ in range(1000):
        teacher.update()
    assert float(teacher.logits(torch.ones(1, 1, dtype=torch.bfloat16))) == pytest.approx(1 - 0.999**1000, rel=0.01)
    twin = EMATeacher(0.999, warmup=False)
    twin.load_state_dict(teacher.state_dict())
    twin.follow(copy.deepcopy(student))
    twin.update()
    teacher.update()
    assert torch.equal(average_of(twin)["weight"], average_of(teacher)["weight"])


@pytest.mark.parametrize("ensemble", [False, True])
def test_resume_is_exact(
    ensemble: bool, teacher: nn.Module, make_module: Make, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def module() -> DistillationModule:
        ema = EMATeacher(0.8, temperature=None if ensemble else 3.0)
        fixed = copy.deepcopy(teacher)
        return make_module(teacher=TeacherEnsemble([fixed, ema]) if ensemble else ema)

    def checkpoints() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)

    torch.manual_seed(5)
    whole = module()
    make_trainer(max_steps=8, max_epochs=-1, enable_checkpointing=True, callbacks=[checkpoints()]).fit(
        whole, make_loader()
    )
    torch.manual_seed(5)
    resumed = module()
    middle = (tmp_path / "step=4.ckpt").rename(tmp_path.parent / f"{tmp_path.name}-middle.ckpt")
    (tmp_path / "step=8.ckpt").unlink()
    trainer = make_trainer(max_steps=8, max_epochs=-1, enable_checkpointing=True, callbacks=[checkpoints()])
    trainer.fit(resumed, make_loader(), ckpt_path=str(middle))
    assert_same(whole.student.state_dict(), resumed.student.state_dict())
    one, two = whole.teacher.state_dict(), resumed.teacher.state_dict()
    if ensemble:
        one, two = one["1"], two["1"]
    assert one["updates"] == two["updates"] == 8
    assert_same(one["average"], two["average"])
    loaded = torch.load(middle, weights_only=True)
    assert not any("teacher" in key or "average" in key for key in loaded["state_dict"] if "temperatures" not in key)


def test_a_checkpoint_is_validated_with_its_average(
    make_module: Make, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(max_epochs=2)
    trainer.fit(make_module(teacher=EMATeacher(0.8)), make_loader(), make_loader(32, seed=1))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = make_module(teacher=EMATeacher(0.8))
    (values,) = make_trainer().validate(again, make_loader(32, seed=1), ckpt_path=str(tmp_path / "last.ckpt"))
    assert values["val_kd_loss"] == pytest.approx(float(trainer.callback_metrics["val_kd_loss"]))


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net = make_network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("layer", [None, "net"])
def test_in_a_callback(layer: str | None, make_module: Make, make_trainer: MakeTrainer) -> None:
    teacher, history, plain = EMATeacher(0.9), History(), Plain()
    make_trainer(callbacks=[history, DistillationCallback(teacher, student_layer=layer)]).fit(plain, make_loader())
    average = average_of(teacher)
    for name, value in expected(history.states, 0.9, True).items():
        key = name if layer is None else name.removeprefix("net.")
        torch.testing.assert_close(average[key], value.to(average[key].dtype))
    other = EMATeacher(0.9)
    make_trainer().fit(make_module(teacher=other), make_loader())  # the same student, data and optimiser
    for name, value in average_of(other).items():
        torch.testing.assert_close(average[name if layer else f"net.{name}"], value)


def test_a_second_fit_goes_on_and_leaves_no_hook(make_module: Make, make_trainer: MakeTrainer) -> None:
    teacher = EMATeacher(0.9)
    module = make_module(teacher=teacher)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, make_loader())
    trainer.optimizers[0].step()
    assert teacher.state_dict()["updates"] == 4
    make_trainer(max_epochs=1).fit(module, make_loader())
    assert teacher.state_dict()["updates"] == 8


def test_a_copy_has_an_average_of_its_own(make_module: Make) -> None:
    module = make_module(teacher=EMATeacher(0.5, warmup=False))
    twin = copy.deepcopy(module)
    before = average_of(module.teacher)
    with torch.no_grad():
        twin.student[0].weight += 1  # pyright: ignore
    twin.teacher.update()
    assert_same(average_of(module.teacher), before)
    torch.testing.assert_close(average_of(twin.teacher)["0.weight"], before["0.weight"] + 0.5)


class Ranks(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        torch.save(average_of(pl_module.teacher), self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


def test_two_ranks_have_one_average(make_trainer: MakeTrainer, make_module: Make, tmp_path: Path) -> None:
    for norm in (False, True):  # without batch norm, two ranks are one with the whole batch
        for devices in (1, 2):
            options: dict[str, Any] = {"strategy": "ddp_fork"} if devices == 2 else {}
            module = make_module(make_network(norm=norm), teacher=EMATeacher(0.9))
            torch.manual_seed(2)
            with torch.no_grad():
                for parameter in module.student.parameters():
                    parameter.copy_(torch.randn_like(parameter) / 4)
            trainer = make_trainer(
                devices=devices, callbacks=[Ranks(tmp_path)], use_distributed_sampler=False, **options
            )
            trainer.fit(module, datamodule=InOrder())
        assert_same(torch.load(tmp_path / "2-0.pt"), torch.load(tmp_path / "2-1.pt"))
        if not norm:
            for name, value in torch.load(tmp_path / "1-0.pt").items():
                torch.testing.assert_close(value, torch.load(tmp_path / "2-0.pt")[name], rtol=1e-4, atol=1e-5)


def test_a_distiller_in_a_bare_loop() -> None:
    student = make_network()
    teacher = EMATeacher(0.9)
    distiller = Distiller(teacher)
    teacher.follow(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for inputs, targets in make_loader():
        distiller(inputs, student(inputs), targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        teacher.update()
    assert teacher.logits(make_data(4).tensors[0]).shape == (4, 6)


def test_with_the_fused_loss() -> None:
    student = CausalTransformer(dim=16, depth=1)
    teacher = EMATeacher(0.5, warmup=False)
    teacher.follow(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    teacher.update()
    tokens = torch.randint(0, 200, (2, 7))
    fused = FusedDistiller(teacher, 2.0, FusedLinearKDLoss(), task_weight=0.0)
    plain = Distiller(teacher, 2.0, task_weight=0.0)
    loss = fused(tokens, hidden_states(student, tokens), tokens).loss  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(loss, plain(tokens, student(tokens), tokens).loss, rtol=1e-4, atol=1e-6)
