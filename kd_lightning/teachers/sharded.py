"""The place of a teacher that no rank has room for: its weights are sharded over the ranks by torch's FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from typing_extensions import override

from kd_lightning.functional.rows import is_sharded
from kd_lightning.teachers.calls import device_of
from kd_lightning.teachers.placement import Placement
from kd_lightning.teachers.weights import check_buffers, is_without_values, load_weights, open_safetensors

if TYPE_CHECKING:
    from kd_lightning.teachers.frozen import FrozenTeacher

__all__ = ["Blocks", "Sharded", "shard"]

Blocks = str | int | Sequence[str]


class Sharded(Placement):
    """Weights of which each rank holds a part (FSDP2): those of a block are gathered while that block runs.

    A rank needs memory for its part of the weights, for all weights outside of the blocks, and for the largest block
    twice: FSDP2 gathers a block into a buffer, copies the weights out of it, and keeps the buffer until the next block
    is gathered, so that gathering and computation overlap. Smaller blocks need less memory and more collectives. No
    gradient is kept or sent. Each forward gathers all weights once, which is a collective: every rank runs the teacher
    equally often. All ranks of the process group share the weights, and a process without a group keeps them whole.

    From a safetensors file each rank reads its own part, so that a network on the meta device is never whole anywhere;
    files of other kinds are read as a whole on each rank. The fingerprint is that of the whole weights, gathered one
    tensor at a time. For a type of its own, such as bfloat16, give ``FrozenTeacher(precision="bf16")``.

    Args:
        blocks: What is gathered at once: the name of a class, such as ``"LlamaDecoderLayer"``, the dotted name of a
            module or of a list of modules, such as ``"model.layers"``, several of these, or a number of parameters: the
            largest modules with parts of their own and at most so many. Weights outside of the blocks are gathered at
            the start of the forward.
        offload: Whether each rank's part stays on the host until its block runs.

    Raises:
        TypeError: If ``blocks`` is none of these.
        ValueError: If ``blocks`` is empty or not positive; at the teacher's construction, if the network has no such
            blocks, a weight is in two of them, the network is a program or is compiled, or the teacher has a cache.

    Example:
        >>> from kd_lightning import FrozenTeacher
        >>> from kd_lightning.models import CausalTransformer
        >>> with torch.device("meta"):
        ...     network = CausalTransformer(dim=32, depth=2)
        >>> FrozenTeacher(network, "teacher.safetensors", placement=Sharded("base_model.blocks")).placement
        Sharded(blocks='base_model.blocks')
    """

    releases = False

    def __init__(self, blocks: Blocks, offload: bool = False) -> None:
        check_blocks(blocks)
        self.blocks = blocks
        self.offload = offload

    @override
    def __repr__(self) -> str:
        return f"Sharded(blocks={self.blocks!r}{', offload=True' if self.offload else ''})"

    @override
    def check(self, teacher: FrozenTeacher) -> None:
        if isinstance(teacher.module, torch.jit.ScriptModule) or teacher.compile:
            raise ValueError(
                f"placement={self!r} gathers weights while the network runs, which neither a program nor a compiled "
                "network allows: give the network itself, without compile."
            )
        if teacher.cache is not None:
            raise ValueError(
                f"placement={self!r} runs the teacher on all ranks at once, but a rank whose samples are in the cache "
                "does not run it, and the others would wait. Fill the cache first with a teacher that is whole, such "
                "as placement='offload', or leave out the cache."
            )
        blocks_of(teacher.module, self.blocks)

    @override
    def place(self, module: nn.Module) -> None:
        if dist.is_initialized() and not isinstance(module, FSDPModule):
            offload = CPUOffloadPolicy(torch.accelerator.is_available()) if self.offload else OffloadPolicy()
            shard(module, self.blocks, mesh_of_all_ranks(), reshard_after_forward=True, offload_policy=offload)

    @override
    def load(self, module: nn.Module, checkpoint: str, prefix: str | None) -> None:
        if not dist.is_initialized() or Path(checkpoint).suffix != ".safetensors":
            load_weights(module, checkpoint, prefix)
            return
        with open_safetensors(module, checkpoint, prefix) as weights:
            check_buffers(module, weights, checkpoint)
            on_meta = is_without_values(module)
            self.place(module)
            if on_meta:
                module.to_empty(device="cpu" if self.offload else mesh_of_all_ranks().device_type)
            for name, tensor in module.state_dict().items():
                _read_part(tensor, weights[name])

    @override
    def move(self, module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a cast only, because FSDP2 has put the weights on the device of its ranks."""
        if not is_without_values(module):
            self.place(module)
        module._apply(lambda tensor: tensor.to(fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).dtype))

    @override
    def fingerprint(self, module: nn.Module) -> str:
        self.place(module)
        return super().fingerprint(module)

    @override
    def device_of_logits(self, inputs: Any, weight: Tensor | None) -> torch.device:
        return device_of(inputs)

    @override
    def call(self, run: Callable[[Any], Any], module: nn.Module, inputs: Any) -> Any:
        self.place(module)
        return run(inputs)


def mesh_of_all_ranks() -> DeviceMesh:
    """Return the mesh of one dimension over all ranks, on the devices that their process group serves."""
    accelerator = torch.accelerator.current_accelerator()
    device = "cpu" if accelerator is None or dist.get_backend() == "gloo" else accelerator.type
    return init_device_mesh(device, (dist.get_world_size(),))


def check_blocks(blocks: object) -> None:
    """Raise if a value names no blocks.

    Raises:
        TypeError: If the value is no text, number or sequence of texts.
        ValueError: If the value is empty or not positive.
    """
    names = [blocks] if isinstance(blocks, str) else blocks
    named = isinstance(names, Sequence) and all(isinstance(name, str) for name in names)
    if not named and (isinstance(blocks, bool) or not isinstance(blocks, int)):
        raise TypeError(
            f"blocks must be the name of a class or of a module, several of them, or a number of parameters, got "
            f"{blocks!r}."
        )
    if not names or not (all(names) if isinstance(names, Sequence) else blocks > 0):  # pyright: ignore
        raise ValueError(
            "blocks must name at least one class or module, such as 'LlamaDecoderLayer' or 'model.layers', or be a "
            f"positive number of parameters, got {blocks!r}."
        )


def blocks_of(module: nn.Module, blocks: Blocks) -> list[nn.Module]:
    """Return the parts of a network that are sharded by themselves, the innermost first.

    Raises:
        ValueError: If the network has none of a name, or one weight is in two parts.
    """
    if isinstance(blocks, int):
        found = list(_up_to(module, blocks))
        if not found:
            raise ValueError(
                f"{type(module).__name__} has no part of several modules with at most {blocks:,} parameters. Give a "
                "greater number, or the name of a class or module."
            )
    else:
        parts = dict(module.named_modules())
        found = []
        for name in [blocks] if isinstance(blocks, str) else blocks:
            of_name = [parts[name]] if name in parts else [x for x in parts.values() if type(x).__name__ == name]
            if of_name and isinstance(of_name[0], nn.ModuleList):
                of_name = list(of_name[0])
            if not of_name:
                classes = sorted({type(part).__name__ for part in parts.values()})
                raise ValueError(
                    f"{type(module).__name__} has no module or class {name!r} to shard. Its classes are "
                    f"{', '.join(classes[:12])}{', …' if len(classes) > 12 else ''}."
                )
            found += of_name
    wanted = {id(part) for part in found if part is not module and any(True for _ in part.parameters())}
    parts = [part for part in reversed(list(module.modules())) if id(part) in wanted]
    _check_shared(module, parts)
    return parts


def _check_shared(module: nn.Module, parts: Sequence[nn.Module]) -> None:
    """Raise if a weight is in two of the parts, the innermost first, or in one of them and outside."""
    part_of: dict[nn.Module, nn.Module] = {}
    for part in (*parts, module):
        part_of = dict.fromkeys(part.modules(), part) | part_of
    seen: dict[Tensor, tuple[str, nn.Module]] = {}
    for prefix, child in module.named_modules():
        for name, parameter in child.named_parameters(prefix, recurse=False):
            first, owner = seen.setdefault(parameter, (name, part_of[child]))
            if owner is not part_of[child]:
                raise ValueError(
                    f"{first!r} and {name!r} of {type(module).__name__} are one weight, which cannot be sharded in two "
                    "blocks. Leave the modules of both out of the blocks, or name a module around them."
                )


def _up_to(module: nn.Module, size: int) -> Iterator[nn.Module]:
    """Yield the largest modules with parts of their own; a layer alone may be read past its forward, as embeddings."""
    for child in module.children():
        if any(True for _ in child.children()):
            runs = not isinstance(child, (nn.ModuleList, nn.ModuleDict))
            small = sum(parameter.numel() for parameter in child.parameters()) <= size
            yield from [child] if runs and small else _up_to(child, size)


def shard(module: nn.Module, blocks: Blocks, mesh: DeviceMesh, **options: Any) -> None:
    """Shard the blocks of a network, then the rest, by ``fully_shard`` with these options."""
    for part in (*blocks_of(module, blocks), module):
        fully_shard(part, mesh=mesh, **options)


def shard_as(module: nn.Module, like: nn.Module) -> None:
    """Shard the parts of a copied network that FSDP2 shards in the original, whose weights are sharded afterwards.

    Raises:
        ValueError: If a weight of the original is sharded in another way, as by tensor parallelism or FSDP1.
    """
    for name, part in reversed(list(like.named_modules())):
        if isinstance(part, FSDPModule):
            part.reshard()  # because the root's weights stay whole after a forward without a backward
            if not isinstance(twin := module.get_submodule(name), FSDPModule):
                mesh = next(filter(is_sharded, part.parameters())).device_mesh  # pyright: ignore
                fully_shard(twin, mesh=mesh, reshard_after_forward=True)
    copied, original = (
        {name: (parameter.shape, getattr(parameter, "placements", None)) for name, parameter in each.named_parameters()}
        for each in (module, like)
    )
    if differing := [name for name, layout in copied.items() if original.get(name) != layout]:
        raise ValueError(
            f"a copy of {type(like).__name__} follows weights that are whole or sharded by fully_shard, but "
            f"{differing[0]} has been replaced or sharded in another way. Train the student under ddp or FSDP2 "
            "(ShardedDistillationModule), or take a teacher that keeps no copy of it."
        )


@torch.no_grad()
def _read_part(tensor: Tensor, stored: Any) -> None:
    """Copy this rank's part of a tensor in a file: rows, as torch.chunk cuts them."""
    if not isinstance(tensor, DTensor):
        tensor.copy_(stored[...])
        return
    local, mesh = tensor.to_local(), tensor.device_mesh
    first = min(-(-tensor.shape[0] // mesh.size()) * mesh.get_local_rank(), tensor.shape[0])
    if len(local):
        local.copy_(stored[first : first + len(local)])
