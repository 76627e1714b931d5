"""The outputs of named layers, by forward hooks that are attached and detached in one place.

torchvision's ``create_feature_extractor`` traces the network by fx, which fails where control flow depends on data.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.hooks import RemovableHandle

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


class FeatureExtractor:
    """Reads what named layers give in the last forward of a network.

    .. code-block:: python

        with FeatureExtractor(network, ["layer1", "layer[23]"]) as extractor:
            logits = network(images)
            features = extractor.pop()  # {"layer1": ..., "layer2": ..., "layer3": ...}

    Hooks are on the layers from :meth:`attach` to :meth:`detach`, which the ``with`` statement calls. It is no
    ``nn.Module``: nothing of it is in a state dict, and a copy of a network with hooks on it records nothing.

    - Recorded is the last forward of the network that was begun, without the recomputation of checkpointed blocks.
    - A tuple or list gives its first tensor, a mapping its first value that is one, such as the hidden states of a
      transformer's block.
    - A layer that is called more than once in a forward (a shared ``ReLU``), and an output that is changed in place
      afterwards (``ReLU(inplace=True)``, ``out += shortcut``), are errors.
    - The names are those of the network within ``DistributedDataParallel``, ``torch.compile``, FSDP's and activation
      checkpoints' wrappers. A network that is compiled must be attached to before its first call.

    Args:
        module: The network.
        layers: Dotted names as in ``named_modules()``, or globs over them: ``*`` (dots included), ``?``, ``[ab]``.

    Raises:
        ValueError: If a name is unknown (the message has similar ones), or a glob matches nothing.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> with FeatureExtractor(network, ["1"]) as extractor:
        ...     _ = network(torch.ones(2, 4))
        ...     features = extractor.pop()
        >>> features["1"].shape
        torch.Size([2, 8])
        >>> FeatureExtractor(network, ["3"])
        Traceback (most recent call last):
        ...
        ValueError: Sequential has no layer '3'. Close to it: 0, 1, 2. ...
    """

    def __init__(self, module: nn.Module, layers: Sequence[str] | str) -> None:
        self._module, self._layers = _unwrapped(module), find_layers(module, layers)
        self._handles: list[RemovableHandle] = []
        self.attached = False  # beside the handles, which a compiled graph cannot look at
        self._recording = False
        self._features: dict[str, tuple[Tensor, int, int]] = {}  # each with its version, and the number of calls

    @property
    def names(self) -> tuple[str, ...]:
        """The layers, in the order of the network's modules."""
        return tuple(self._layers)

    def attach(self) -> FeatureExtractor:
        """Put the hooks on, if they are not."""
        if not self.attached:
            self.attached = True
            self._handles = [
                self._module.register_forward_pre_hook(self._begin),
                *(layer.register_forward_hook(_Record(self, name)) for name, layer in self._layers.items()),
                self._module.register_forward_hook(self._end),  # after the record of a layer that is the network itself
            ]
        return self

    def detach(self) -> None:
        """Take the hooks off, and let go of what was recorded."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.attached = self._recording = False
        self.clear()

    def clear(self) -> None:
        """Let go of what was recorded."""
        self._features = {}

    def pop(self) -> dict[str, Tensor]:
        """Return the features of the last forward by name, in the network's order, and keep them no longer.

        Raises:
            RuntimeError: If there are none, or a layer was called twice or its output changed in place.
        """
        features = self._features
        self.clear()
        for name in self._layers:
            if name not in features:
                raise RuntimeError(self._why_missing(name, bool(features)))
            feature, version, calls = features[name]
            if calls > 1:
                raise RuntimeError(
                    f"the layer {name!r} was called {calls} times in one forward of {self._kind}: its output is "
                    "ambiguous. Name the module around the call that is meant."
                )
            if version != _version(feature):
                raise RuntimeError(
                    f"the output of the layer {name!r} was changed in place after it, by a ReLU(inplace=True) or a += "
                    "say. Name the layer that changes it, or the block around both."
                )
        return {name: features[name][0] for name in self._layers}

    def _why_missing(self, name: str, others: bool) -> str:
        if not self.attached:
            return "no hooks are attached: use `with extractor:` or extractor.attach() before the forward."
        if others:
            return (
                f"the layer {name!r} gave no tensor in the last forward of {self._kind}: it was not called, or its "
                "output holds none. Name another."
            )
        return (
            f"there was no forward of {self._kind} since its features were last taken. Call it first; if it is "
            "compiled, attach the hooks before its first call, or call torch.compiler.reset()."
        )

    @property
    def _kind(self) -> str:
        return type(self._module).__name__

    def _begin(self, *_: Any) -> None:
        self.clear()
        self._recording = self.attached

    def _end(self, *_: Any) -> None:
        self._recording = False

    def record(self, name: str, output: Any) -> None:
        """Keep a layer's output; called by its hook."""
        if not self._recording:
            return
        tensor = _first_tensor(output)
        if tensor is not None:
            calls = self._features[name][2] if name in self._features else 0
            self._features[name] = tensor, _version(tensor), calls + 1

    def __enter__(self) -> FeatureExtractor:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: without hooks, and without the network, which it would copy along."""
        state = {"_handles": [], "_features": {}, "attached": False, "_recording": False}
        return {**vars(self), **state, "_module": None, "_layers": dict.fromkeys(self._layers)}

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        return f"{type(self).__name__}({self._kind}, layers={list(self.names)}, {state})"


class _Record:
    """The hook of one layer. A closure could not be pickled with the network, and a partial breaks a compiled graph."""

    def __init__(self, extractor: FeatureExtractor, name: str) -> None:
        self.extractor = extractor
        self.name = name

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.extractor.record(self.name, output)


def find_layers(module: nn.Module, layers: Sequence[str] | str) -> dict[str, nn.Module]:
    """Return the layers of these names, or that these globs match, in the order of the network's modules."""
    named = _named_layers(module)
    wanted: set[str] = set()
    for pattern in [layers] if isinstance(layers, str) else layers:
        found = {pattern} & named.keys() or {name for name in named if fnmatchcase(name, pattern)}
        if not found:
            kind = type(_unwrapped(module)).__name__
            is_glob = any(mark in pattern for mark in "*?[")
            near = difflib.get_close_matches(pattern, named, n=5, cutoff=0.5) or list(named)[:8]
            raise ValueError(
                (f"no layer of {kind} matches {pattern!r}." if is_glob else f"{kind} has no layer {pattern!r}.")
                + (f" Close to it: {', '.join(near)}." if near else " It has no layers.")
                + " All names: [name for name, _ in module.named_modules()]."
            )
        wanted |= found
    return {name: layer for name, layer in named.items() if name in wanted}


def layer_depths(module: nn.Module, names: Sequence[str]) -> dict[str, float]:
    """Return each layer's depth among these: 0 for the first to end, 1 for the last, evenly between.

    The order is that in which the network lists its modules; a block ends with the last module within it. One layer
    alone is in the middle, 0.5.

    Example:
        >>> network = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 8), nn.Linear(8, 3))
        >>> layer_depths(network, ["2", "0", "0.0"])
        {'0.0': 0.0, '0': 0.5, '2': 1.0}
    """
    position = {name: index for index, name in enumerate(_named_layers(module))}
    ends: dict[str, int] = {}
    for name in names:
        ends[name] = max(index for other, index in position.items() if f"{other}.".startswith(f"{name}."))
    ordered = sorted(ends, key=lambda name: (ends[name], -position[name]))
    if len(ordered) == 1:
        return {ordered[0]: 0.5}
    return {name: index / (len(ordered) - 1) for index, name in enumerate(ordered)}


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the network within what other tools wrap around it."""
    while True:
        if isinstance(module, (DistributedDataParallel, DataParallel)):
            module = module.module
        elif name := next((name for name in _WRAPPERS if name in module._modules), None):
            module = module.get_submodule(name)
        else:
            return module


def _named_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Modules by their names in the network, those of wrappers left out: ``layer1._orig_mod.0`` is ``layer1.0``."""
    named: dict[str, nn.Module] = {}
    for name, layer in _unwrapped(module).named_modules():
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if plain:
            named.setdefault(plain, layer)
    return named


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "values"):
        output = output.values()
    elif not isinstance(output, (tuple, list)):
        return None
    return next((value for value in output if isinstance(value, Tensor)), None)


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; 0 in a compiled graph, where that is not known."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version
