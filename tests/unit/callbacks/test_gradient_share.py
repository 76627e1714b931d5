"""The callback that holds distillation's share of the gradient."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.nn import functional as F

from kd_lightning import DistillationModule
from kd_lightning.callbacks import DistillationCallback, GradientShare
from kd_lightning.callbacks.gradient_share import gradient_share
from kd_lightning.functional import kd_loss
from kd_lightning.losses import FusedLinearKDLoss, KDLoss
from kd_lightning.models import CausalTransformer
from kd_lightning.temperature import CosineSchedule, Progress
from tests.helpers import assert_same, make_loader, make_network, make_teacher
from tests.unit.callbacks.helpers import Save


class Record(Callback):
    """The share in the gradient of each step, and the weight that it was made with."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self.weights: list[float] = []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        holder: Any = next((x for x in (pl_module, *trainer.callbacks) if hasattr(x, "distiller")), None)  # pyright: ignore
        student = [p for p in pl_module.parameters() if p.requires_grad]
        self.shares.append(gradient_share(holder.last_output, student).item())
        self.weights.append(holder.last_output.kd_weight)


def module(**options: Any) -> DistillationModule:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "temperature": CosineSchedule(8.0, 1.0), "kd_loss": KDLoss(scale="none"),
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.01),
    }  # fmt: skip
    return DistillationModule(make_network(), make_teacher(), **(defaults | options))


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 5, "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "log_every_n_steps": 1,
        "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0,
    }  # fmt: skip
    return Trainer(**(defaults | options), callbacks=[*callbacks])


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.2, 0.9])
def test_holds_the_share_while_the_temperature_moves(target):
    """At scale "none" distillation's gradient grows 64-fold on the way from T = 8 to T = 1."""
    record = Record()
    whole = make_loader(batch_size=64)
    trainer(record, GradientShare(target, decay=0.0), max_epochs=100).fit(module(), whole)
    assert (torch.tensor(record.shares[1:]) - target).abs().max() < 0.03


def test_without_it_the_share_moves():
    record = Record()
    trainer(record, max_epochs=20).fit(module(), make_loader(batch_size=64))
    assert max(record.shares) - min(record.shares) > 0.2


def test_weight_by_the_formula():
    """Return the norms of the first step, by autograd over the loss written out in float64."""
    plain = module(temperature=3.0, kd_weight=0.7, task_weight=0.3)
    student, teacher = plain.student, plain.teacher.module.eval()
    loader = make_loader()
    x, y = next(iter(loader))
    wide: Any = student.double().train()
    z = wide(x.double())
    with torch.no_grad():
        t = teacher.double()(x.double())
    norms = [
        torch.cat([g.flatten() for g in torch.autograd.grad(term, list(wide.parameters()), retain_graph=True)]).norm()
        for term in (kd_loss(z, t, 3.0, scale="none"), F.cross_entropy(z, y))
    ]
    callback = GradientShare(0.25)
    student.float()
    teacher.float()
    trainer(callback, max_epochs=1, limit_train_batches=1).fit(plain, loader)
    assert callback.kd_weight is not None
    assert callback.kd_weight == pytest.approx((0.3 * norms[1] / norms[0] / 3).item(), rel=1e-3)
    assert plain.kd_weight(Progress()) == callback.kd_weight


def test_averages_the_logarithm():
    weights = {}
    for decay in (0.0, 0.5):
        record = Record()
        trainer(record, GradientShare(decay=decay), max_epochs=1, limit_train_batches=3).fit(module(), make_loader())
        weights[decay] = record.weights
    assert weights[0.0][1] == weights[0.5][1]  # nothing to average with
    assert weights[0.0][2] != weights[0.5][2]


def test_steps_that_do_not_log_leave_the_weight():
    record = Record()
    trainer(record, GradientShare(), max_epochs=1, log_every_n_steps=3, limit_train_batches=7).fit(
        module(), make_loader(batch_size=4)
    )
    changes = [i for i in range(1, 7) if record.weights[i] != record.weights[i - 1]]
    assert changes == [1, 3, 6]  # after the first step, the third and the sixth


@pytest.mark.slow
def test_in_someone_elses_module():
    class Theirs(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = make_network()

        def training_step(self, batch: Any) -> torch.Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    record = Record()
    options: dict[str, Any] = {"temperature": CosineSchedule(8.0, 1.0), "kd_loss": KDLoss(scale="none")}
    distil = DistillationCallback(make_teacher(), "net", **options)
    trainer(distil, record, GradientShare(0.4, decay=0.0), max_epochs=100).fit(Theirs(), make_loader(batch_size=64))
    assert (torch.tensor(record.shares[1:]) - 0.4).abs().max() < 0.03


def test_a_checkpoint_with_another_weight_is_no_change_of_settings(tmp_path: Path):
    """A changed schedule would warn, which is an error here: in the process that trained, and in another."""
    share, model = GradientShare(), module()
    fitter = trainer(share, StopAfter(1))
    fitter.fit(model, make_loader())
    fitter.save_checkpoint(tmp_path / "early.ckpt")
    trained = share.kd_weight
    fitter.fit_loop.max_epochs = 2
    fitter.fit(model, make_loader())
    assert share.kd_weight != trained
    other = GradientShare()
    for tester, tested in ((fitter, model), (trainer(other), module())):
        tester.validate(tested, make_loader(), ckpt_path=tmp_path / "early.ckpt", verbose=False)
    assert other.kd_weight == trained


class StopAfter(Callback):
    """Ends a run early, so that its schedules are those of the whole run."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 == self.epochs


def test_resumed_is_as_if_never_stopped(tmp_path: Path):
    def run(*callbacks: Callback, path: Any = None) -> tuple[DistillationModule, GradientShare]:
        share, model = GradientShare(), module()
        fitter = trainer(share, *callbacks)
        fitter.fit(model, make_loader(), ckpt_path=path)
        fitter.save_checkpoint(tmp_path / "last.ckpt")
        return model, share

    through, of_through = run()
    _, of_half = run(StopAfter(2))
    resumed, of_resumed = run(path=tmp_path / "last.ckpt")
    assert of_half.kd_weight != of_through.kd_weight
    assert of_resumed.kd_weight == of_through.kd_weight
    assert_same(resumed.student.state_dict(), through.student.state_dict())


@pytest.mark.slow
def test_the_same_weight_on_two_ranks(tmp_path: Path):
    share = GradientShare()
    trainer(
        share, Save(tmp_path, lambda _: share.state_dict()),
        max_epochs=2, devices=2, strategy="ddp_fork", log_every_n_steps=2,
    ).fit(module(temperature=2.0), make_loader(batch_size=4))  # fmt: skip
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first == second
    assert first["kd_weight"] != 0.9


def test_errors():
    with pytest.raises(ValueError, match="task_weight is 0"):
        trainer(GradientShare()).fit(module(task_weight=0.0), make_loader())


def test_sharded_parameters_are_an_error():
    sharded = Trainer(accelerator="cpu", devices=1, strategy=ModelParallelStrategy(), logger=False)
    message = (
        "GradientShare differentiates by whole parameters, which ModelParallelStrategy shards. Take ddp, or a schedule "
        "for kd_weight."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        GradientShare().on_fit_start(sharded, module())


def test_the_fused_loss_gives_no_terms():
    student, teacher = CausalTransformer(dim=8, depth=1), CausalTransformer(dim=8, depth=1)
    _ = [parameter.data.mul_(3.0) for parameter in teacher.parameters()]
    model = DistillationModule(student, teacher, 2.0, FusedLinearKDLoss())
    tokens = [(torch.zeros(5, dtype=torch.long),) * 2] * 2
    with pytest.raises(RuntimeError, match="FusedLinearKDLoss gives the gradient of their sum alone"):
        trainer(GradientShare(), max_epochs=1).fit(model, torch.utils.data.DataLoader(tokens, batch_size=2))  # pyright: ignore


@pytest.mark.parametrize("off", ["weight of 0", "distillation off", "gradient of 0"])
def test_without_a_gradient_the_weight_stays(off):
    model, share = module(temperature=2.0), GradientShare()
    if off == "weight of 0":
        model.kd_weight = 0.0
    elif off == "distillation off":
        model.distiller.kd_enabled = False
    else:
        model.kd_loss = _Constant()
    before = model.kd_weight(Progress())
    trainer(share, max_epochs=1).fit(model, make_loader())
    assert share.kd_weight is None
    assert model.kd_weight(Progress()) == before


class _Constant(KDLoss):
    def forward(self, *args: Any, **options: Any) -> torch.Tensor:
        return 0.0 * super().forward(*args, **options)
