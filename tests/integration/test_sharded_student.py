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
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, parallelize_module
from torch.utils.data import DataLoader

from kd_lightning import DistillationModule, FrozenTeacher, ShardedDistillationModule, TeacherEnsemble
from kd_lightning.functional.sharded import sharded_as
from kd_lightning.losses import FusedLinearKDLoss
from kd_lightning.teachers import EMATeacher, Sharded
from kd_lightning.teachers.sharded import mesh_of_all_ranks, shard
from kd_lightning.temperature import CosineSchedule, EntropyTemperature, LearnableTemperature
from tests.helpers import InOrder, LearnedTemperature, assert_same, make_network, make_teacher, on_ranks

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


def make(temperature: Any = 4.0, average: bool = False) -> ShardedDistillationModule:
    torch.manual_seed(5)
    student, teacher = make_network(norm=False).double(), make_network(norm=False).double()
    for parameter in teacher.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return ShardedDistillationModule(
        blocks=BLOCKS,
        student=student,
        teacher=EMATeacher(0.9) if average else FrozenTeacher(teacher, placement=Sharded(BLOCKS)),
        temperature=copy.deepcopy(temperature),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    )


def make_ensemble() -> ShardedDistillationModule:
    """A sharded teacher and a whole one, of which the label chooses or both teach."""
    module = make()
    torch.manual_seed(9)
    other = make_network(norm=False).double()
    for parameter in other.parameters():
        parameter.data += 0.5
    module.teacher = TeacherEnsemble([module.teacher, other], [2.0, 6.0], [0.75, 0.25], routing=[range(6), range(3, 6)])
    return module


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


def values(module: DistillationModule) -> dict[str, Tensor]:
    """The whole state of a module and its teacher."""
    networks: list[nn.Module] = [module, *module.teacher.modules()]
    return {
        f"{index}.{name}": (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for index, network in enumerate(networks)
        for name, value in network.state_dict().items()
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
    module = make(average=True)
    fit(module, 1, folder, max_epochs=2)
    torch.save(values(module), folder / "averaged.pt")
    module = make_ensemble()
    fit(module, 1, folder)
    torch.save(values(module), folder / "ensemble.pt")
    return folder


def check(module: DistillationModule, file: Path, exact: bool = True) -> None:
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
    module = make_ensemble()
    fit(module, world, folder)
    check(module, folder / "ensemble.pt")
    for whole in (True, False):
        module = make(TEMPERATURES["learned"])
        trainer = fit(module, world, folder, whole=whole)
        trainer.save_checkpoint(folder / f"{world}-{whole}.ckpt")
        fit(make(average=True), world, folder, whole=whole).save_checkpoint(folder / f"{world}-{whole}-average.ckpt")


def check_resumed(before: int, folder: Path) -> None:
    """Resume on 4 ranks what 2 have trained, and the other way round."""
    for whole in (True, False):
        module = make(TEMPERATURES["learned"])
        fit(module, 6 - before, folder, folder / f"{before}-{whole}.ckpt", whole, max_epochs=2)
        check(module, folder / "resumed.pt", exact=False)
        module = make(average=True)
        fit(
            module, 6 - before, folder, folder / f"{before}-{whole}-average.ckpt", whole, max_epochs=2,
            limit_val_batches=2,
        )  # fmt: skip
        assert all(isinstance(parameter, DTensor) for parameter in module.teacher.parameters())
        check(module, folder / "averaged.pt")


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
    with pytest.raises(ValueError, match=f"^EMAWeightAveraging {re.escape(copies)}"):
        fit(make(), 2, folder, callbacks=[EMAWeightAveraging()])
    module = make()
    strategy = ModelParallelStrategy(1, 2)
    with pytest.raises(
        ValueError, match=r"^ShardedDistillationModule shards over data-parallel ranks, but the strategy has "
        r"tensor_parallel_size=2\. Set tensor_parallel_size=1, or override configure_model",
    ):  # fmt: skip
        fit(module, 2, folder, strategy=strategy)
    parallel = ByTensor(student=make_network(norm=False), teacher=EMATeacher())
    with pytest.raises(
        ValueError, match=r"^a copy of Sequential follows weights that are whole or sharded by fully_shard, but "
        r"0\.weight has been replaced or sharded in another way\. Train the student under ddp or FSDP2",
    ):  # fmt: skip
        fit(parallel, 2, folder, strategy=ModelParallelStrategy(1, 2), data=Same)


def check_average() -> None:
    """An average in float32 of bfloat16 weights that were made on the meta device and filled later."""
    whole = make_network().bfloat16()
    with torch.device("meta"):
        sharded = make_network().bfloat16()
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    averages = []
    for student in (whole, sharded):
        teacher, again = EMATeacher(0.9), EMATeacher(0.9)
        teacher.follow(student)
        again.follow(student)
        if student is sharded:
            shard(student, ["0"], mesh_of_all_ranks())
            for name, value in student.to_empty(device="cpu").state_dict().items():
                value.copy_(sharded_as(value, start[name]))
            with pytest.raises(
                ValueError, match=r"^an EMATeacher copies the student, and a network that is sharded ov"
            ):
                EMATeacher().follow(student)
            with torch.no_grad():
                student.eval()(torch.ones(2, 8, dtype=torch.bfloat16))  # after it the root's weights are whole
        teacher.follow(student)
        for step in range(4):
            for value in student.state_dict().values():
                value.mul_(2).add_(step)
            if step == 2:  # resumed
                state = [teacher.state_dict()]
                dist.broadcast_object_list(state)
                again.load_state_dict(state[0])
                again.follow(student)
                teacher = again
            teacher.update()
        averages.append(teacher.state_dict())
        assert teacher.logits(torch.ones(2, 8, dtype=torch.bfloat16)).shape == (2, 6)
    want, have = averages
    assert want["updates"] == have["updates"] == 4
    assert want["average"]["0.weight"].dtype == torch.float32
    for name, value in want["average"].items():
        rows = (
            0 if dist.get_rank() and name in dict(sharded.named_parameters()) else len(value) if value.dim() else None
        )
        assert torch.equal(have["average"][name], value if rows is None else value[:rows])


class Unfilled(DistillationModule):
    """A student that was made on the meta device, to which Lightning gives values."""

    def configure_model(self) -> None:
        fully_shard(self.student)


def check_meta(folder: Path) -> None:
    for teacher in (make_teacher(norm=False), EMATeacher()):
        with torch.device("meta"):
            student = make_network(norm=False)
        module = Unfilled(student=student, teacher=teacher, temperature=3.0)
        fit(module, 2, folder, data=InOrder, strategy=ModelParallelStrategy(2, 1))
        if isinstance(teacher, nn.Module):
            assert_same(module.teacher.module.state_dict(), teacher.state_dict())
        assert module.temperature.multiplier.item() == 1.0
        assert all(torch.isfinite(value).all() for value in values(module).values())


def test_copies_and_what_is_not_sharded(tmp_path: Path) -> None:
    def check_all(rank: int) -> None:
        check_average()
        warnings.simplefilter("ignore")  # Lightning's, of copies and of what is made on the meta device
        check_meta(tmp_path)
        check_errors(tmp_path)

    on_ranks(2, check_all)


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


class Tokens(Same):
    """Sequences of 5 tokens out of 13, each of them its own label."""

    def dataset(self, count: int, seed: int) -> Any:
        tokens = torch.randint(13, (count, 5), generator=torch.Generator().manual_seed(seed))
        return [(row, row) for row in tokens]


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_model = nn.Sequential(nn.Embedding(13, 8), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 13)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.base_model(tokens))


class LanguageByTensor(DistillationModule):
    """Both networks are parallel, and leave the logits sharded by class."""

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        plan: dict[str, ParallelStyle] = {
            "base_model.0": ColwiseParallel(output_layouts=Replicate()),
            "base_model.1": ColwiseParallel(output_layouts=Replicate()),
            "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        }
        for network in (self.student, self.teacher.module):
            parallelize_module(network, self.device_mesh["tensor_parallel"], plan)


def test_the_fused_loss_trains_tensor_parallel_ranks_as_one(tmp_path: Path) -> None:
    def train(kind: type[DistillationModule], **options: Any) -> tuple[DistillationModule, Trainer]:
        torch.manual_seed(3)
        student, teacher = Language().double(), Language().double()
        for parameter in teacher.parameters():
            parameter.data += torch.randn_like(parameter)
        module = kind(
            student=student, teacher=teacher, temperature=LearnableTemperature(), kd_loss=FusedLinearKDLoss(7),
            shift_labels=True, optimizer=functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9),
        )  # fmt: skip
        return module, fit(module, options.pop("world", 1), tmp_path, data=Tokens, limit_val_batches=2, **options)

    module, trainer = train(DistillationModule)
    torch.save(values(module), tmp_path / "one.pt")
    loss = trainer.callback_metrics["val_loss"].item()

    def check_two(rank: int) -> None:
        module, trainer = train(LanguageByTensor, world=2, strategy=ModelParallelStrategy(1, 2))
        assert all(isinstance(part, DTensor) for part in [*module.student.parameters(), *module.teacher.parameters()])
        check(module, tmp_path / "one.pt", exact=False)
        assert trainer.callback_metrics["val_loss"].item() == pytest.approx(loss)

    on_ranks(2, check_two)
