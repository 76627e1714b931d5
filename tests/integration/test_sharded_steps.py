"""Optimiser steps of a student that is sharded over 2 processes (FSDP2, gloo): their mean, and steps left out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from kd_lightning import FrozenTeacher, ShardedDistillationModule
from kd_lightning.callbacks import SkipNonFinite
from kd_lightning.teachers import Sharded
from tests.helpers import InOrder, LearnedTemperature, make_network, on_ranks


class Damaged(Callback):
    """Makes the first sample of one step NaN, which is on rank 0."""

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1 and trainer.global_rank == 0:
            batch[0][0] = torch.nan


RUNS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "mean over the step": ({"mean_over": "step"}, dict),
    "accumulated and clipped": (
        {"mean_over": "step"},
        lambda: {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    ),
    "a step left out": ({}, lambda: {"callbacks": [Damaged(), SkipNonFinite()]}),
}


class Doubles(InOrder):
    @override
    def dataset(self, count: int, seed: int) -> Any:
        return [(inputs.double(), target) for inputs, target in super().dataset(count, seed)]  # pyright: ignore


def fit(name: str, world: int, folder: Path) -> dict[str, Tensor]:
    torch.manual_seed(5)
    student, teacher = make_network(norm=False).double(), make_network(norm=False).double()
    for parameter in teacher.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    options, trainer_options = RUNS[name]
    module = ShardedDistillationModule(
        blocks=["0", "2"],
        student=student,
        teacher=FrozenTeacher(teacher, placement=Sharded(["0", "2"])),
        temperature=LearnedTemperature(),
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        **options,
    )
    quiet: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu", devices=world, strategy=ModelParallelStrategy(world, 1) if world > 1 else "auto",
        max_epochs=2, limit_val_batches=0, use_distributed_sampler=False, default_root_dir=folder,
        **quiet, **trainer_options(),
    )  # fmt: skip
    trainer.fit(module, datamodule=Doubles())
    state = module.state_dict()
    return {key: (x.full_tensor() if isinstance(x, DTensor) else x).clone() for key, x in state.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:step 1 is left out")
def test_steps_are_those_of_one_process(tmp_path: Path) -> None:
    wanted = {name: fit(name, 1, tmp_path) for name in RUNS}

    def check(rank: int) -> None:
        for name, want in wanted.items():
            have = fit(name, 2, tmp_path)
            assert have.keys() == want.keys()
            for key, value in want.items():
                torch.testing.assert_close(have[key], value, rtol=1e-6, atol=1e-7, msg=f"{name}: {key}")

    on_ranks(2, check)
