"""FSDP2 (ModelParallelStrategy) on two CPU processes: the student is sharded, and trains as in one process."""

from __future__ import annotations

import copy
import functools
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from kd_lightning import DistillationModule
from kd_lightning.losses import FusedLinearKDLoss
from kd_lightning.models import CausalTransformer
from tests.helpers import InOrder, LearnedTemperature, make_network

pytestmark = pytest.mark.slow


class Sharded(DistillationModule):
    """A module as users of FSDP2 write it: the student's blocks and then its root are sharded by hand."""

    def configure_model(self) -> None:
        blocks = getattr(getattr(self.student, "base_model", self.student), "blocks", self.student)
        for block in blocks.children():
            if any(True for _ in block.parameters()):
                fully_shard(block)
        fully_shard(self.student)


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value.clone()  # pyright: ignore


class Tokens(InOrder):
    """Sequences of 10 tokens out of 13, each of them its own label."""

    def dataset(self, count: int, seed: int) -> Any:
        tokens = torch.randint(13, (count, 10), generator=torch.Generator().manual_seed(seed))
        return [{"input_ids": row, "labels": row} for row in tokens]


def fit(rank: int, world: int, port: int, make: Callable[[], DistillationModule], data: InOrder, folder: Path) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
    }
    module = make()
    strategy = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1) if world > 1 else "auto"
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        max_epochs=2,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **quiet,  # pyright: ignore[reportArgumentType]
    )
    trainer.fit(module, datamodule=data)
    torch.save({name: whole(value) for name, value in module.state_dict().items()}, folder / f"{world}-{rank}.pt")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def check_that_two_processes_train_as_one(make: Callable[..., DistillationModule], data: InOrder, folder: Path) -> None:
    """``make`` gets the class to make: the plain module for one process, the sharded one for two."""
    states = []
    for world in (1, 2):
        kind = (DistillationModule, Sharded)[world - 1]
        arguments = (world, free_port(), functools.partial(make, kind), data, folder)
        mp.start_processes(fit, arguments, nprocs=world, start_method="fork")  # pyright: ignore
        states += [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]
    one, first, second = states
    fresh = make(DistillationModule).state_dict()
    assert any(not torch.equal(one[name], value) for name, value in fresh.items() if name.startswith("student"))
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_a_learned_temperature_is_the_same_on_every_rank(teacher: nn.Module, tmp_path: Path) -> None:
    student = make_network(norm=False)

    def make(kind: type[DistillationModule]) -> DistillationModule:
        return kind(
            student=copy.deepcopy(student),
            teacher=copy.deepcopy(teacher),
            temperature=LearnedTemperature(),
            optimizer=lambda params: torch.optim.SGD(params, lr=0.05),
        )

    check_that_two_processes_train_as_one(make, InOrder(), tmp_path)


def test_the_fused_loss_trains_a_sharded_student(tmp_path: Path) -> None:
    torch.manual_seed(3)
    student, teacher = (CausalTransformer(13, dim=8, depth=2, heads=2, max_length=10) for _ in range(2))
    for parameter in [*student.parameters(), *teacher.parameters()]:
        parameter.data += 0.3 * torch.randn_like(parameter)  # stands for training

    def make(kind: type[DistillationModule]) -> DistillationModule:
        return kind(
            student=copy.deepcopy(student),
            teacher=copy.deepcopy(teacher),
            kd_loss=FusedLinearKDLoss(),
            shift_labels=True,
            optimizer=lambda params: torch.optim.SGD(params, lr=0.05),
        )

    check_that_two_processes_train_as_one(make, Tokens(), tmp_path)
