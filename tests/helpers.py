"""The small, real problem and the comparisons that test modules share."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from kd_lightning.temperature import Signals, Temperature, TemperaturePolicy

NUM_CLASSES, NUM_FEATURES = 6, 8


class LearnedTemperature(TemperaturePolicy):
    """A minimal policy with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(1))

    def compute(self, signals: Signals) -> Temperature:
        t = 1 + 8 * torch.sigmoid(self.raw)
        return Temperature(t, t)


def make_network(hidden: int = 16, norm: bool = True, num_classes: int = NUM_CLASSES) -> nn.Sequential:
    """A small network; batch norm is what stock callbacks damage in a registered teacher."""
    layers = [nn.Linear(NUM_FEATURES, hidden), *([nn.BatchNorm1d(hidden)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, num_classes))


def make_teacher(hidden: int = 16, norm: bool = True) -> nn.Sequential:
    """A network whose weights are not those of an initialisation."""
    network = make_network(hidden, norm)
    for parameter in network.parameters():
        parameter.data += 0.5
    return network


def make_data(count: int = 64, seed: int = 0) -> TensorDataset:
    """Gaussian classes that overlap a little."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(NUM_CLASSES, NUM_FEATURES, generator=torch.Generator().manual_seed(99)) * 1.5
    targets = torch.arange(count) % NUM_CLASSES
    return TensorDataset(centres[targets] + torch.randn(count, NUM_FEATURES, generator=generator), targets)


def make_loader(count: int = 64, batch_size: int = 16, seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(make_data(count, seed), batch_size=batch_size)


class InOrder(LightningDataModule):
    """Rank r of n takes samples r, r + n, …: each global batch is the one that a single process has.

    Lightning's own sampler would shuffle.
    """

    def dataset(self, count: int, seed: int) -> Dataset[Any]:
        return make_data(count, seed)

    def loader(self, count: int, seed: int) -> DataLoader[Any]:
        assert self.trainer is not None
        data, world, rank = self.dataset(count, seed), self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(data, num_replicas=world, rank=rank, shuffle=False)
        return DataLoader(data, batch_size=16 // world, sampler=sampler)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(64, seed=0)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(32, seed=1)


def fit_in_order(
    module: LightningModule, folder: Path, strategy: Any = "auto", ckpt_path: Path | None = None, **options: Any
) -> Trainer:
    """Fit quietly on the CPU, in one process or, with a strategy, in one of two, and return the trainer."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 2, **quiet, **options}
    devices = 1 if strategy == "auto" else 2
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, use_distributed_sampler=False,
        default_root_dir=folder, **settings,
    )  # fmt: skip
    trainer.fit(module, datamodule=InOrder(), ckpt_path=ckpt_path)
    return trainer


class Net(nn.Module):
    """Images (N, 1, 8, 8) to 5 classes, by two stages of maps and one of vectors."""

    def __init__(self, width: int = 4, stride: int = 1, hidden: int = 6) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride, padding=1), nn.BatchNorm2d(2 * width))
        self.hidden = nn.Linear(2 * width, hidden)
        self.fc = nn.Linear(hidden, 5)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stage2(self.stage1(images))
        return self.fc(self.dropout(torch.relu(self.hidden(maps.mean((2, 3))))))


def digits_config(**trainer: Any) -> Any:
    """Return configs/digits.yaml, parsed, for any current folder, without a logger and with settings of the Trainer."""
    configs = Path(__file__).parents[1] / "configs"
    config = yaml.safe_load((configs / "digits.yaml").read_text())
    config["model"]["init_args"]["teacher"]["init_args"]["checkpoint"] = str(configs / "digits_teacher.safetensors")
    config["trainer"] |= {"logger": False, **trainer}
    return config


def from_yaml(owner: type, settings: dict[str, Any]) -> Any:
    """Build a DistillationModule, with a linear student, or a DistillationCallback as the command does from YAML."""
    if issubclass(owner, LightningModule):
        settings["student"] = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 4, "out_features": 3}}
    parser = LightningArgumentParser()
    parser.add_subclass_arguments(owner, "owner")
    part = {"class_path": f"{owner.__module__}.{owner.__name__}", "init_args": settings}
    return parser.instantiate_classes(parser.parse_object({"owner": part}))["owner"]


def hooks(*modules: nn.Module) -> int:
    parts = [part for module in modules for part in module.modules()]
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in parts)


@contextmanager
def safe_to_fork() -> Iterator[None]:
    """Collect no garbage in the processes that are forked meanwhile, and let them compute in one thread.

    What has threads of its own, as a session of onnxruntime, waits for them when it is collected, and a fork has none.
    It lacks those of OpenMP too, of which a strategy of Lightning that launches processes sets as many as there are
    cores.
    """
    torch.set_num_threads(1)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def in_a_fork(function: Callable[[], object]) -> None:
    """Call a function in a process of its own; its exception comes through with its traceback."""
    with safe_to_fork():
        start_processes(lambda _: function(), nprocs=1, start_method="fork")


def on_ranks(world: int, function: Callable[[int], object]) -> None:
    """Call a function of the rank in processes of one group (gloo); an exception comes through with its traceback."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    with safe_to_fork():
        start_processes(_run_rank, (world, port, function), nprocs=world, start_method="fork")


def _run_rank(rank: int, world: int, port: int, function: Callable[[int], object]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0"}
    os.environ["TORCHELASTIC_RUN_ID"] = "test"  # so that Lightning creates no processes
    gc.freeze()  # because DeepSpeed collects garbage for each engine: a second with all that the parent has imported
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    function(rank)
    torch.distributed.destroy_process_group()


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """Compare state dicts bit for bit."""
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
