"""The checks of all projects: that they distil, and that nothing else is changed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from kd_lightning.callbacks import DistillationCallback

MakeTrainer = Callable[..., Trainer]


def trained(
    network: nn.Module, loss: Callable[[], Tensor], steps: int = 10, lr: float = 0.01, head: str | None = None
) -> None:
    """Train a network for a few steps: a teacher with weights that are not those of the initialisation.

    With the name of its ``head`` it is also as sure of itself as many steps would make it.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    if head is not None:
        cast(nn.Linear, network.get_submodule(head)).weight.data.mul_(20)
    network.eval()


class Losses(Callback):
    """Keeps the losses of each step."""

    def __init__(self, callback: DistillationCallback) -> None:
        self.callback = callback
        self.total: list[float] = []
        self.kd: list[float] = []
        self.task: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        out = self.callback.last_output
        assert out is not None
        for kept, value in ((self.total, out.loss), (self.kd, out.kd_loss), (self.task, out.task_loss)):
            kept.append(value.item())


def distil(
    module: LightningModule,
    callback: DistillationCallback,
    data: Any,
    make_trainer: MakeTrainer,
    folder: Path,
    weights_only: bool = True,
    reload: dict[str, Any] | None = None,
    **options: Any,
) -> Losses:
    """Fit, and check what holds for every project.

    Both losses go down, the teacher is untouched bit for bit, and the checkpoint has the module's own keys and loads
    into its own class, strictly.
    """
    assert callback.distiller.teacher is not None
    frozen: Any = callback.distiller.teacher
    teacher = frozen.load().module
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    keys = list(module.state_dict())
    losses = Losses(callback)
    trainer = make_trainer(**{"callbacks": [callback, losses], "max_epochs": 5, **options})
    trainer.fit(module, *data) if isinstance(data, tuple) else trainer.fit(module, data)

    quarter = max(len(losses.kd) // 4, 1)
    for name in ("total", "kd"):
        values = getattr(losses, name)
        assert statistics.fmean(values[-quarter:]) < 0.9 * statistics.fmean(values[:quarter]), (name, values)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert list(module.state_dict()) == keys
    trainer.save_checkpoint(folder / "last.ckpt")
    saved = torch.load(folder / "last.ckpt", weights_only=weights_only)
    assert list(saved["state_dict"]) == keys
    again = type(module).load_from_checkpoint(
        folder / "last.ckpt", strict=True, weights_only=weights_only, **(reload or {})
    )
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name]), name
    return losses
