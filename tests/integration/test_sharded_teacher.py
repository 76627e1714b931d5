"""A teacher that is sharded over 2 and 4 processes (FSDP2, gloo) is the whole one."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from kd_lightning import Distiller, FrozenTeacher, LayerTerm
from kd_lightning.fused_distiller import FusedDistiller
from kd_lightning.losses import FusedLinearKDLoss, HintLoss
from kd_lightning.models import CausalTransformer
from kd_lightning.teachers import Sharded
from kd_lightning.teachers.calls import hidden_states
from tests.helpers import on_ranks

WIDTH = 64


class Block(nn.Module):
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("shift", torch.full((1,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x + self.shift)))


class Network(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def trained() -> Network:
    torch.manual_seed(0)
    network = Network()
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return network


def on_meta() -> Network:
    with torch.device("meta"):
        return Network()


class Peak(TorchDispatchMode):
    """The most bytes of tensors that there were at once, in any operation, beside those at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self.before = 0, self.bytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.most = max(self.most, self.bytes() - self.before)
        return result

    @staticmethod
    def bytes() -> int:
        tensors = [x for x in gc.get_objects() if isinstance(x, Tensor) and type(x) in (Tensor, nn.Parameter)]
        storages = {x.untyped_storage() for x in tensors if not x.is_meta}
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def check_weights(rank: int, world: int, folder: Path) -> None:
    whole, inputs = FrozenTeacher(trained()), torch.randn(3, WIDTH)
    file = folder / "teacher.safetensors"
    for network, checkpoint, placement in (
        (on_meta(), file, Sharded("Block")),
        (Network(), file, Sharded("blocks")),
        (on_meta(), folder / "teacher.pt", Sharded(["blocks.0", "blocks.2"])),
        (trained(), None, Sharded(2 * WIDTH * (WIDTH + 1))),
        (on_meta(), file, Sharded("Block", offload=True)),
    ):
        teacher = FrozenTeacher(network, checkpoint, placement=placement)
        torch.testing.assert_close(teacher(inputs), whole(inputs), rtol=1e-5, atol=1e-6)
        assert teacher.fingerprint() == whole.fingerprint()
        parts: list[Any] = list(teacher.parameters())
        assert parts[0].to_local().shape[0] == WIDTH // world
        assert not any(parameter.requires_grad for parameter in parts)
        assert f"placement={placement!r}" in repr(teacher)
    narrow = FrozenTeacher(on_meta(), file, placement=Sharded("Block"), precision="bf16")
    narrow.to(torch.float64)
    want = FrozenTeacher(trained(), precision="bf16")
    torch.testing.assert_close(narrow(inputs), want(inputs))
    double = FrozenTeacher(on_meta(), file, placement=Sharded("Block")).to(torch.float64)
    assert double(inputs.double()).dtype == torch.float64


def check_sharded_before(rank: int, world: int, folder: Path) -> None:
    network = trained()
    want = FrozenTeacher(copy.deepcopy(network))
    for part in (*network.blocks, network):
        fully_shard(part, mesh=init_device_mesh("cpu", (world,)))
    teacher = FrozenTeacher(network)
    assert teacher.fingerprint() == want.fingerprint()
    teacher.module.get_parameter("head.bias").data.mul_(torch.nan)
    with pytest.raises(ValueError, match=r"^the teacher \w+ has weights that are NaN or infinite .*: head.bias\."):
        FrozenTeacher(teacher.module)


def allocated(run: Callable[[], object]) -> int:
    """Return the most bytes that the allocator gave out at once during a call, buffers of gloo's own among them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events: Any = recorded.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def check_memory(rank: int, world: int, folder: Path) -> None:
    layer = 4 * WIDTH * (WIDTH + 1)
    block = 2 * layer + 4
    whole = 4 * block + 4 * 6 * (WIDTH + 1)
    head = 4 * -(-6 // world) * world * (WIDTH + 1)  # padded to rows that all ranks have
    inputs = torch.ones(1, WIDTH)
    activations = 4 * inputs.nbytes
    teacher = None
    for blocks, largest, outside in (("Block", block, head), ("Linear", layer, 0)):
        del teacher
        gc.collect()
        gc.freeze()  # the scans see what is made from here on
        with Peak() as peak:
            teacher = FrozenTeacher(on_meta(), folder / "teacher.safetensors", placement=Sharded(blocks)).load()
        assert whole / world < peak.most < whole / world + block
        with peak:
            teacher(inputs)
            teacher(inputs)
        # a block's weights and the buffer that they were copied from, or two blocks' buffers
        bound = outside + 2 * largest + activations
        assert bound - layer < peak.most - whole / world < bound
        gloo = 2 * largest  # gathers into a buffer of its own, and may free the one before late, in another thread
        assert min(allocated(lambda teacher=teacher: teacher(inputs)) for _ in range(3)) < bound + gloo


def check_distillers(rank: int, world: int, folder: Path) -> None:
    student, inputs, targets = nn.Linear(WIDTH, 6), torch.randn(4, WIDTH), torch.tensor([0, 1, 2, 5])
    losses = []
    for teacher in (
        FrozenTeacher(trained()),
        FrozenTeacher(on_meta(), folder / "teacher.safetensors", placement=Sharded("Block")),
    ):
        torch.manual_seed(0)
        network = nn.Sequential(student, nn.Linear(6, WIDTH), nn.Linear(WIDTH, 6))
        distiller = Distiller(teacher, layers=[LayerTerm("1", "blocks.3", HintLoss())])
        distiller.build_projectors(network, inputs)
        with distiller.attach(network):
            losses.append(distiller(inputs, network(inputs), targets).loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)

    torch.manual_seed(1)
    language = [CausalTransformer(13, dim=8, depth=2, heads=2, max_length=10) for _ in range(2)]
    for parameter in language[1].parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    tokens = torch.randint(13, (2, 10))
    losses = []
    for placement in (None, Sharded("base_model.blocks"), Sharded(["base_model.blocks", "head"])):
        teacher = FrozenTeacher(copy.deepcopy(language[1]), placement=placement)
        distiller = FusedDistiller(teacher, kd_loss=FusedLinearKDLoss())
        taken = distiller.run_student(language[0], language[0], tokens)
        losses.append(distiller(tokens, taken, tokens).loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-6, atol=0)


def check_heads(rank: int, world: int, folder: Path) -> None:
    """An output layer that is sharded by itself: gathered for a teacher, an error for a student."""
    tokens = torch.randint(13, (2, 10))
    warnings.simplefilter("ignore")  # FSDP2's, of an output layer that returns a view
    for names in (["head"], ["head", ""], ["base_model", "head", ""]):
        network = CausalTransformer(13, dim=8, depth=1, heads=2, max_length=10)
        whole = hidden_states(network, tokens)
        weight = whole.weight.detach().clone()
        for name in names:
            fully_shard(network.get_submodule(name), mesh=init_device_mesh("cpu", (world,)))
        with torch.no_grad():
            states = hidden_states(network, tokens)
        assert torch.equal(states.weight, weight)
        torch.testing.assert_close(states.hidden, whole.hidden)
        with pytest.raises(
            ValueError, match=r"^the fused loss reads .* Leave it to the root: shard the blocks, then the"
        ):
            hidden_states(network, tokens)


@pytest.mark.parametrize("world", [2, 4])
def test_a_sharded_teacher_is_the_whole_one(world: int, tmp_path: Path) -> None:
    weights = trained().state_dict()
    save_file({f"net.{name}": value for name, value in weights.items()}, tmp_path / "teacher.safetensors")
    torch.save(weights, tmp_path / "teacher.pt")

    def check(rank: int) -> None:
        for part in (check_weights, check_sharded_before, check_memory, check_distillers, check_heads):
            part(rank, world, tmp_path)

    on_ranks(world, check)


def test_without_a_process_group_weights_are_whole(tmp_path: Path) -> None:
    save_file(trained().state_dict(), tmp_path / "teacher.safetensors")
    teacher = FrozenTeacher(on_meta(), tmp_path / "teacher.safetensors", placement=Sharded("Block"))
    whole = FrozenTeacher(trained())
    torch.testing.assert_close(teacher(torch.ones(1, WIDTH)), whole(torch.ones(1, WIDTH)))
    assert teacher.fingerprint() == whole.fingerprint()
