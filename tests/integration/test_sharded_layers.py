"""Layer terms between a student and a teacher that are both sharded over 2 processes (FSDP2, gloo)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kd_lightning import FrozenTeacher, LayerTerm, ShardedDistillationModule
from kd_lightning.losses import HintLoss, SimilarityKDLoss, SimilarityPreservingLoss
from kd_lightning.teachers import Sharded
from tests.helpers import InOrder, LearnedTemperature, on_ranks

BLOCKS = ["0", "1", "2"]
LAYERS: dict[str, Any] = {
    "blocks": lambda: [LayerTerm("0", "0", HintLoss()), LayerTerm("1", "1", HintLoss(), weight=0.5)],
    "within blocks": lambda: [LayerTerm("1.0", "1.0", HintLoss()), LayerTerm("0.1", "1.1", HintLoss())],
    "a learned temperature": lambda: [LayerTerm("1", "1", SimilarityKDLoss(sync=True), LearnedTemperature())],
    "samples": lambda: [LayerTerm("1.1", "1.1", SimilarityPreservingLoss(sync=True))],
    "layers alone": lambda: [LayerTerm("1", "1", HintLoss())],
}


class Doubles(InOrder):
    def dataset(self, count: int, seed: int) -> Any:
        return [(inputs.double(), target) for inputs, target in super().dataset(count, seed)]  # pyright: ignore


def network(width: int) -> nn.Sequential:
    blocks = [nn.Sequential(nn.Linear(sizes, width), nn.Tanh()) for sizes in (8, width)]
    return nn.Sequential(*blocks, nn.Linear(width, 6)).double()


def make(name: str) -> ShardedDistillationModule:
    torch.manual_seed(5)
    student, teacher = network(10), network(14)
    for parameter in teacher.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    weight = 0.0 if name == "layers alone" else 1.0
    return ShardedDistillationModule(
        blocks=BLOCKS,
        student=student,
        teacher=FrozenTeacher(teacher, placement=Sharded(BLOCKS)),
        layers=LAYERS[name](),
        kd_weight=weight,
        task_weight=weight,
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    )


def fit(name: str, module: ShardedDistillationModule, world: int, folder: Path) -> dict[str, Tensor]:
    quiet: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu", devices=world, strategy=ModelParallelStrategy(world, 1) if world > 1 else "auto",
        max_epochs=2, limit_val_batches=2 if name == "blocks" else 0, log_every_n_steps=1,
        use_distributed_sampler=False, default_root_dir=folder, **quiet,
    )  # fmt: skip
    torch.manual_seed(7 + trainer.global_rank)  # for the projectors, which rank 0 gives to all
    trainer.fit(module, datamodule=Doubles())
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for name, value in module.state_dict().items()
    }


def check(rank: int, folder: Path) -> None:
    for name in LAYERS:
        module = make(name)
        have, want = fit(name, module, 2, folder), torch.load(folder / f"{name}.pt", weights_only=True)
        assert all(isinstance(part, DTensor) for part in [*module.student.parameters(), *module.teacher.parameters()])
        assert have.keys() == want.keys()
        for key, value in want.items():
            tolerance = 1e-6 if name == "a learned temperature" else 1e-12  # temperatures are float32
            torch.testing.assert_close(have[key], value, rtol=tolerance, atol=tolerance, msg=f"{name}: {key}")


@pytest.mark.slow
def test_sharded_layers_train_as_in_one_process(tmp_path: Path) -> None:
    for name in LAYERS:
        fresh = make(name).state_dict()
        state = fit(name, make(name), 1, tmp_path)
        changed = {key for key, value in fresh.items() if not torch.equal(value, state[key])}
        assert changed >= {"student.0.0.weight", "student.1.0.weight"} or name == "layers alone"
        assert any("projector" in key for key in state) == (name not in ("a learned temperature", "samples"))
        torch.save(state, tmp_path / f"{name}.pt")
    on_ranks(2, partial(check, folder=tmp_path))
