"""The places of a teacher's weights: the protocol, a device, the host, accelerate's device map, no memory at all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from typing_extensions import override

from kd_lightning.teachers.calls import device_of
from kd_lightning.teachers.weights import fingerprint, is_without_values, load_weights

if TYPE_CHECKING:
    from kd_lightning.teachers.frozen import FrozenTeacher


class Placement:
    """The place of a :class:`FrozenTeacher`'s weights. This one follows the moves of the module around: the default.

    A subclass is another place, given as ``FrozenTeacher(network, placement=...)``. Its ``repr`` is what messages show.

    Example:
        >>> from kd_lightning import FrozenTeacher
        >>> class Half(Placement):
        ...     '''Follows moves, and halves the weights whenever they are put in place.'''
        ...     def place(self, module):
        ...         module.half()
        >>> network = nn.Linear(2, 2)
        >>> _ = network.weight.data.mul_(9.0)  # stands for training
        >>> FrozenTeacher(network, placement=Half()).module.weight.dtype
        torch.float16
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    releases: bool = True
    """True if the weights may be dropped and read again."""
    has_weights: bool = True
    """False while the weights are in no memory."""

    def check(self, teacher: FrozenTeacher) -> None:
        """Raise if an option of the teacher, whose attributes are all set, does not go with this place."""

    def check_features(self) -> None:
        """Raise if layers cannot have the network's features on the inputs' device."""

    def place(self, module: nn.Module) -> None:
        """Put weights that have values in their place: at construction, or once the checkpoint is read."""

    def load(self, module: nn.Module, checkpoint: str, prefix: str | None) -> None:
        """Read the weights of a file into the network; :meth:`place` follows."""
        load_weights(module, checkpoint, prefix)

    def move(self, module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a move or cast of the module around, given as a function of a tensor."""
        module._apply(fn)

    def fingerprint(self, module: nn.Module) -> str:
        """Return the hash of the weights, which does not depend on the place."""
        return fingerprint(module)

    def device_of_logits(self, inputs: Any, weight: Tensor | None) -> torch.device:
        """Return the device on which the logits of these inputs are expected, given a weight of the network."""
        return device_of(inputs) if weight is None else weight.device

    def call(self, run: Callable[[Any], Any], module: nn.Module, inputs: Any) -> Any:
        """Return the outputs of ``run``, which calls the network with the inputs."""
        return run(inputs)


class Dispatched(Placement):
    """Weights that accelerate has placed, whose hooks bring each layer's inputs to its device: nothing is moved."""

    releases = False

    def move(self, module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
        """Leave the weights where they are."""


class OnDevice(Placement):
    """Weights that stay on a device of their own: inputs are copied to it, outputs to where the inputs were."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __repr__(self) -> str:
        return repr(str(self.device))

    def check_features(self) -> None:
        """Raise, since features are on the device of the weights."""
        raise ValueError(
            f"layers need the teacher's features on the student's device, but the teacher has placement={self!r}: "
            "leave it out, or take placement='offload'."
        )

    def place(self, module: nn.Module) -> None:
        """Move the weights to the device."""
        module.to(self.device)

    def move(self, module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a cast only."""
        module._apply(lambda tensor: tensor.to(fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).dtype))

    def device_of_logits(self, inputs: Any, weight: Tensor | None) -> torch.device:
        """Return the inputs' device."""
        return device_of(inputs)

    def call(self, run: Callable[[Any], Any], module: nn.Module, inputs: Any) -> Any:
        """Return the outputs, computed on the device of the weights and on the inputs' device."""
        home = device_of(inputs)
        outputs = run(tree_map_only(Tensor, lambda tensor: tensor.to(self.device), inputs))
        return tree_map_only(Tensor, lambda tensor: tensor.to(home), outputs)


class Offloaded(OnDevice):
    """Weights that stay on the host, and are all on the inputs' device during a call."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def __repr__(self) -> str:
        return repr(next((name for name, kind in _NAMED.items() if type(self) is kind), type(self).__name__))

    def check(self, teacher: FrozenTeacher) -> None:
        """Raise if the network is a program, whose tensors cannot be replaced."""
        if isinstance(teacher.module, torch.jit.ScriptModule):
            raise ValueError(
                f"placement={self!r} replaces the weights of a network's modules, which a TorchScript program does not "
                "allow: give the network itself, or a device as placement."
            )
        if teacher.compile:
            raise ValueError(
                f"placement={self!r} moves weights while the network runs, which a compiled network does not allow: "
                "leave out compile or placement."
            )

    def check_features(self) -> None:
        """Accept layers, since features come out on the inputs' device."""

    def call(self, run: Callable[[Any], Any], module: nn.Module, inputs: Any) -> Any:
        """Return the outputs, computed on the inputs' device."""
        device = device_of(inputs)
        with ExitStack() as stack:
            stack.enter_context(_BringWeights(module, device))
            self.fetch(module, device, stack)
            outputs = run(inputs)
            # a language model's output layer is among the outputs of a call for its hidden states
            return tree_map_only(Tensor, lambda tensor: tensor.to(device), outputs)

    def fetch(self, module: nn.Module, device: torch.device, stack: ExitStack) -> None:
        """Bring the weights to the device until the stack is closed."""
        weights = _Weights([slot for part in module.modules() for slot in _slots(part)], device)
        weights.fetch()
        stack.callback(weights.release)


class OffloadedByLayer(Offloaded):
    """Weights that stay on the host: those of a layer are on the inputs' device while that layer runs.

    Hooks are on the module during a call only. A layer is a module with parameters or buffers of its own.
    """

    def fetch(self, module: nn.Module, device: torch.device, stack: ExitStack) -> None:
        """Put hooks on the layers until the stack is closed."""
        for part in module.modules():
            if own := _slots(part):
                weights = _Weights(own, device)
                handles = (
                    part.register_forward_pre_hook(weights.fetch),
                    part.register_forward_hook(weights.release, always_call=True),
                )
                for handle in handles:
                    stack.callback(handle.remove)


_NAMED = {"offload": OffloadedByLayer, "offload_whole": Offloaded}


class _Weights:
    """Tensors of modules that are on a device between ``fetch`` and ``release``; one tensor under two names is one."""

    def __init__(self, slots: list[tuple[dict[str, Any], str]], device: torch.device) -> None:
        self.slots = slots
        self.device = device
        self.on_host: list[Tensor] = []

    def fetch(self, *_: Any) -> None:
        self.on_host = [tensors[name] for tensors, name in self.slots]
        different = {id(tensor): tensor for tensor in self.on_host}
        copies = {key: tensor.to(self.device, non_blocking=True) for key, tensor in different.items()}
        for (tensors, name), tensor in zip(self.slots, self.on_host, strict=True):
            tensors[name] = copies[id(tensor)]

    def release(self, *_: Any) -> None:
        for (tensors, name), tensor in zip(self.slots, self.on_host, strict=False):  # none where fetch did not come
            tensors[name] = tensor
        self.on_host = []


def _slots(part: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Return the dictionaries and names under which a module has its own tensors."""
    owned = (part._parameters, part._buffers)
    return [(tensors, name) for tensors in owned for name, tensor in tensors.items() if tensor is not None]


class _BringWeights(TorchFunctionMode):
    """Copies weights that are on the host to the device of what they are computed with.

    Some modules read other tensors than those that they own: attention its output projection's, an LSTM a list of its
    own, a language model the weights of its embedding, an exported program all.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.weights = {_storage(slots[name]) for part in module.modules() for slots, name in _slots(part)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if len({tensor.device for tensor in tensors}) > 1:
            args, kwargs = tree_map_only(Tensor, self.bring, (args, kwargs))
        return func(*args, **kwargs)

    def bring(self, tensor: Tensor) -> Tensor:
        """Return a copy of a weight on the device, and other tensors as they are."""
        on_host = tensor.device.type == "cpu" and _storage(tensor) in self.weights
        return tensor.to(self.device, non_blocking=True) if on_host else tensor


def _storage(tensor: Tensor) -> int:
    """Return a number that a weight has in common with its views."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return tensor.untyped_storage().data_ptr() if plain else id(tensor)


class Absent(Placement):
    """Parameters on the meta device, and the device to which they belong; buffers stay. A call reads the weights again.

    Args:
        teacher: The teacher, whose parameters are replaced by parameters without values.
        fingerprint: The fingerprint of the teacher with its weights.
    """

    releases = has_weights = False

    def __init__(self, teacher: FrozenTeacher, fingerprint: str) -> None:
        self.teacher = teacher
        self.home = teacher._place
        self.of_teacher = fingerprint
        parameters = [parameter for parameter in teacher.module.parameters() if is_plain(parameter)]
        self.device = parameters[0].device if parameters else torch.device("cpu")
        empty: dict[int, nn.Parameter] = {}  # by identity, because one parameter may have two names
        for parameter in parameters:
            on_meta = parameter.detach().to("meta")
            empty[id(parameter)] = nn.Parameter(on_meta, requires_grad=parameter.requires_grad)
        for part in teacher.module.modules():
            for name, parameter in part._parameters.items():
                part._parameters[name] = empty.get(id(parameter), parameter)

    @override
    def move(self, module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
        def follow(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                return fn(tensor)
            moved = fn(torch.empty(0, dtype=tensor.dtype, device=self.device))
            return tensor.to(moved.dtype)

        module._apply(follow)
        self.device = fn(torch.empty(0, device=self.device)).device

    @override
    def fingerprint(self, module: nn.Module) -> str:
        return self.of_teacher

    @override
    def device_of_logits(self, inputs: Any, weight: Tensor | None) -> torch.device:
        return self.device

    @override
    def call(self, run: Callable[[Any], Any], module: nn.Module, inputs: Any) -> Any:
        """Return the outputs, once the weights are back in their place."""
        teacher = self.teacher
        if not teacher.runs:
            raise FileNotFoundError(
                f"the teacher's weights {teacher.checkpoint} are absent, and only samples of its cache are known. Give "
                "the file, or batches of teacher.index(dataset)."
            )
        teacher.bring_back(self.home)
        self.home.move(module, lambda tensor: tensor.to(self.device))
        if teacher.fingerprint() != self.of_teacher:
            raise ValueError(
                f"the teacher's weights {teacher.checkpoint} have the fingerprint {teacher.fingerprint()[:8]}, but its "
                f"cache is of {self.of_teacher[:8]}. Give the weights that the cache was made with."
            )
        return self.home.call(run, module, inputs)


def is_plain(parameter: nn.Parameter) -> bool:
    """Return True for a dense tensor with values, which has no type of its own as packed and sharded weights have."""
    return type(parameter.data) is Tensor and not parameter.is_meta


def placement_of(placement: str | torch.device | Placement | None, module: nn.Module, has_file: bool) -> Placement:
    """Return the place that a user gave to a network's weights, which may be read from a file, or raise."""
    # accelerate's hooks bring each layer's inputs to its device, so that a move would break the placement
    spread = len(set((getattr(module, "hf_device_map", None) or {}).values())) > 1
    dispatched = spread or (not has_file and is_without_values(module))
    named = str(placement) if isinstance(placement, torch.device) else placement
    if dispatched and placement is not None:
        raise ValueError(
            f"a teacher's weights have one place, got placement={named!r} and accelerate's device map: leave one out."
        )
    if placement is None:
        return Dispatched() if dispatched else Placement()
    if isinstance(placement, Placement):
        return placement
    if kind := _NAMED.get(str(named)):
        return kind()
    try:
        if not isinstance(placement, (str, torch.device)):
            raise TypeError(f"a {type(placement).__name__} names no place")
        place = torch.device(placement)
        torch.empty(0, device=place)
        if place.type == "meta":
            raise RuntimeError("the meta device has no values")
    except (RuntimeError, AssertionError, TypeError) as error:
        what = " ".join(str(error).split(". ")[0].split()).rstrip(".")
        if what.startswith("Expected one of"):  # because torch lists every device that it could have
            what = "no device has this name"
        raise ValueError(
            f"placement must be {', '.join(map(repr, _NAMED))}, a Placement or a device of this machine, such as 'cpu' "
            f"or 'cuda:1', got {named!r}: {what}."
        ) from None
    return OnDevice(place)
