"""A student that is sharded over 2 and 4 processes (FSDP2, gloo) trains as in one process."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, parallelize_module
from torch.utils.data import DataLoader

from kd_lightning import DistillationModule, FrozenTeacher, ShardedDistillationModule
from kd_lightning.teachers import EMATeacher, Sharded
from kd_lightning.temperature import CosineSchedule, EntropyTemperature
from tests.helpers import InOrder, LearnedTemperature, make_network, make_teacher, on_ranks

BLOCKS = ["0", "2"]
TEMPERATURES: dict[str, Any] = {
    "constant": 4.0,
    "scheduled": CosineSchedule(8, 2),
    "per sample": EntropyTemperature(),
    "learned": LearnedTemperature(),
}


class Doubles(InOrder):
    def dataset(self, count: int, seed: int) -> Any:
        return [(inputs.double(), target) for inputs, target in super().dataset(count, seed)]  # pyright: ignore


def make(temperature: Any = 4.0) -> ShardedDistillationModule:
    torch.manual_seed(5)
    student, teacher = make_network(norm=False).double(), make_network(norm=False).double()
    for parameter in teacher.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return ShardedDistillationModule(
        blocks=BLOCKS,
        student=student,
        teacher=FrozenTeacher(teacher, placement=Sharded(BLOCKS)),
        temperature=copy.deepcopy(temperature),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    )


def fit(
    module: LightningModule, world: int, folder: Path, ckpt_path: Any = None, whole: bool = True, **options: Any
) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    strategy: Any = options.pop("strategy", "auto")
    if world > 1 and strategy == "auto":
        strategy = ModelParallelStrategy(world, 1, save_distributed_checkpoint=not whole)
    data = options.pop("data", Doubles)()
    settings: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 0, **quiet, **options}
    trainer = Trainer(
        accelerator="cpu", devices=world, strategy=strategy, use_distributed_sampler=False,
        default_root_dir=folder, **settings,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def values(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for name, value in module.state_dict().items()
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights that one process ends with."""
    folder = tmp_path_factory.mktemp("alone")
    for name, temperature in TEMPERATURES.items():
        module = make(temperature)
        fit(module, 1, folder)
        torch.save(values(module), folder / f"{name}.pt")
    module = make(TEMPERATURES["learned"])
    fit(module, 1, folder, gradient_clip_val=0.05)
    torch.save(values(module), folder / "clipped.pt")
    module = make(TEMPERATURES["learned"])
    fit(module, 1, folder, max_epochs=2)
    torch.save(values(module), folder / "resumed.pt")
    return folder


def check(module: nn.Module, file: Path, exact: bool = True) -> None:
    have, want = values(module), torch.load(file, weights_only=True)
    assert any("student" in name for name in want)
    for name, value in want.items():
        tolerance = 1e-12 if exact and value.dtype == torch.float64 else 1e-6  # temperatures are float32
        torch.testing.assert_close(have[name], value, rtol=tolerance, atol=tolerance)


def check_ranks(world: int, folder: Path) -> None:
    for name, temperature in TEMPERATURES.items():
        module = make(temperature)
        fit(module, world, folder)
        assert all(isinstance(parameter, DTensor) for parameter in module.student.parameters())
        check(module, folder / f"{name}.pt", exact=name != "learned")
    module = make(TEMPERATURES["learned"])
    fit(module, world, folder, gradient_clip_val=0.05)
    check(module, folder / "clipped.pt", exact=False)
    module = make()
    fit(module, world, folder, strategy="ddp")  # a whole student, and a sharded teacher
    check(module, folder / "constant.pt")
    assert all(isinstance(parameter, DTensor) for parameter in module.teacher.parameters())
    for whole in (True, False):
        module = make(TEMPERATURES["learned"])
        trainer = fit(module, world, folder, whole=whole)
        trainer.save_checkpoint(folder / f"{world}-{whole}.ckpt")


def check_resumed(before: int, folder: Path) -> None:
    """Resume on 4 ranks what 2 have trained, and the other way round."""
    for whole in (True, False):
        module = make(TEMPERATURES["learned"])
        fit(module, 6 - before, folder, folder / f"{before}-{whole}.ckpt", whole, max_epochs=2)
        check(module, folder / "resumed.pt", exact=False)


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_ranks_train_as_one(world: int, alone: Path) -> None:
    on_ranks(world, lambda _: check_ranks(world, alone))
    on_ranks(6 - world, lambda _: check_resumed(world, alone))


class Partly(DistillationModule):
    def configure_model(self) -> None:
        fully_shard(self.student[0])  # pyright: ignore[reportIndexIssue]


def check_errors(folder: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"^ModelParallelStrategy reduces the gradients of sharded parameters alone, but the student has whole "
        r"ones, which would differ between ranks: 2\.weight, 2\.bias\. Take ShardedDistillationModule",
    ):
        fit(Partly(student=make_network(norm=False), teacher=make_teacher(norm=False)), 2, folder)
    copies = "keeps a copy of the student, which FSDP2 does not allow for a sharded one. Leave it out, or train a whole"
    warnings.simplefilter("ignore")  # Lightning warns of this too
    with pytest.raises(ValueError, match=f"^EMAWeightAveraging {re.escape(copies)}"):
        fit(make(), 2, folder, callbacks=[EMAWeightAveraging()])
    module = make()
    module.teacher = EMATeacher()
    module.teacher.follow(module.student)
    with pytest.raises(ValueError, match=f"^EMATeacher {re.escape(copies)}"):
        fit(module, 2, folder)
    module = make()
    strategy = ModelParallelStrategy(1, 2)
    with pytest.raises(
        ValueError, match=r"^ShardedDistillationModule shards over data-parallel ranks, but the strategy has "
        r"tensor_parallel_size=2\. Set tensor_parallel_size=1, or override configure_model",
    ):  # fmt: skip
        fit(module, 2, folder, strategy=strategy)


def test_what_is_not_sharded_is_an_error(tmp_path: Path) -> None:
    on_ranks(2, lambda _: check_errors(tmp_path))


class Same(Doubles):
    """The same batches on every rank."""

    def loader(self, count: int, seed: int) -> DataLoader[Any]:
        return DataLoader(self.dataset(count, seed), batch_size=16)


class ByTensor(DistillationModule):
    """A student whose hidden layer and classes are sharded: tensor parallelism."""

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        plan: dict[str, ParallelStyle] = {
            "0": ColwiseParallel(output_layouts=Replicate()),
            "2": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        }
        parallelize_module(self.student, self.device_mesh["tensor_parallel"], plan)


def test_tensor_parallel_ranks_train_as_one(tmp_path: Path) -> None:
    module = make()
    trainer = fit(module, 1, tmp_path, data=Same, limit_val_batches=2)
    torch.save(values(module), tmp_path / "one.pt")
    accuracy = trainer.callback_metrics["val_acc"].item()

    def check_two(rank: int) -> None:
        whole = make()
        sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
        module = ByTensor(student=whole.student, teacher=whole.teacher, optimizer=sgd)
        strategy = ModelParallelStrategy(1, 2)
        trainer = fit(module, 2, tmp_path, strategy=strategy, data=Same, limit_val_batches=2)
        check(module, tmp_path / "one.pt")
        assert trainer.callback_metrics["val_acc"].item() == pytest.approx(accuracy)
        assert "train_acc" not in trainer.callback_metrics

    on_ranks(2, check_two)
