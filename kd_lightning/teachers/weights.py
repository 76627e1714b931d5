"""Loading, checking and fingerprinting a network's weights."""

from __future__ import annotations

import difflib
import hashlib
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kd_lightning.functional.rows import gathered, is_sharded

_Primitive: TypeAlias = bool | int | float | str | bytes | torch.dtype | None
_KEYS = (
    *("state_dict", "model", "model_state_dict", "net", "module", "params", "student", "teacher"),
    *("state_dict_ema", "model_ema", "ema"),
)


def fingerprint(module: nn.Module) -> str:
    """Hash the names, types, shapes and bytes of a module's parameters and persistent buffers.

    A quantized tensor counts as its integers with their scales and zero points, packed weights as the tensors in them,
    a tensor subclass, such as torchao's, as its inner tensors, and a sharded tensor as the whole, which is gathered:
    a collective, one tensor at a time.

    Weights on the meta device or in the constants of TorchScript, and values that cannot be hashed, are errors.
    """
    if isinstance(module, torch.jit.ScriptModule) and not module.state_dict():
        raise ValueError(
            "the teacher's weights are constants of its TorchScript (torch.jit.freeze), where they cannot be "
            "hashed. Name them and their version: FrozenTeacher(module, fingerprint='model v3')."
        )
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        for part in _plain_parts(name, value):
            if isinstance(part, Tensor):
                digest.update(f"{name} {part.dtype} {tuple(part.shape)} ".encode())
                digest.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            else:
                digest.update(f"{name} {part!r} ".encode())
    return digest.hexdigest()


def hashed(text: str) -> str:
    """Return a short hash of a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _plain_parts(name: str, value: Any) -> Iterator[Tensor | _Primitive]:
    """Yield the plain tensors and primitives that a value of a state dict is made of."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _plain_parts(name, part)
    elif isinstance(value, Tensor) and value.is_meta:
        raise ValueError(
            f"the teacher's {name} is on the meta device and has no values: give FrozenTeacher(module, "
            "checkpoint=...), load the weights first (module.to_empty(device='cpu'), then load_state_dict), "
            "or, of a module that accelerate offloads, name the weights: FrozenTeacher(module, fingerprint='model v3')."
        )
    elif isinstance(value, Tensor) and value.is_quantized:
        yield value.int_repr()
        if value.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
            yield value.q_per_channel_scales()
            yield value.q_per_channel_zero_points()
        else:
            yield value.q_scale()
            yield value.q_zero_point()
    elif is_sharded(value):
        yield gathered(value).detach()
    elif isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        names, context = value.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
        yield repr(context)
        for inner in names:
            yield from _plain_parts(f"{name}.{inner}", getattr(value, inner))
    elif isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, torch.dtype) or value is None or isinstance(value, (bool, int, float, str, bytes)):
        yield value
    else:
        raise ValueError(
            f"the teacher's state dict holds a {type(value).__name__} under {name}, which cannot be hashed. Name the "
            "weights and their version: FrozenTeacher(module, fingerprint='model v3')."
        )


def load_weights(module: nn.Module, checkpoint: str | Path, prefix: str | None = None) -> None:
    """Load a file's weights into a module, or raise and leave the module unchanged.

    Args:
        module: The module that receives the weights.
        checkpoint: Safetensors, a ``.pt`` state dict (bare, or under ``state_dict``, ``model``,
            ``model_state_dict``, ``net``, ``module``, ``params``, ``student``, ``teacher``, ``state_dict_ema``,
            ``model_ema`` or ``ema``), or a Lightning ``.ckpt``.
        prefix: Prefix of the module's names in the file. None detects it. Where the file has several of these keys,
            the prefix starts with one, such as ``"ema."``.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file holds no weights, or if names or shapes do not fit the module (all are listed).
    """
    wanted = module.state_dict()
    found = _of_module(_read_state_dict(Path(checkpoint)), module, checkpoint, prefix)
    meta = any(isinstance(value, Tensor) and value.is_meta for value in wanted.values())
    if meta:  # nothing can be copied into a tensor without storage: the file's tensors take its place
        found = {name: value.to(wanted[name].dtype) if name in wanted else value for name, value in found.items()}
    state = OrderedDict(found)
    if not all(isinstance(value, Tensor) for value in found.values()):  # packed weights are read by their version
        state._metadata = wanted._metadata  # pyright: ignore[reportAttributeAccessIssue]
    module.load_state_dict(state, assign=meta)
    check_buffers(module, state, checkpoint)


@contextmanager
def open_safetensors(module: nn.Module, checkpoint: str, prefix: str | None) -> Iterator[dict[str, Any]]:
    """Open a file of safetensors to read parts of a module's weights: by the module's names, ``weights[name][a:b]``."""
    from safetensors import SafetensorError, safe_open

    _check_exists(Path(checkpoint))
    try:
        file = safe_open(checkpoint, "pt")
    except SafetensorError as error:
        raise ValueError(f"{checkpoint} is no readable safetensors file: {error}.") from error
    with file as opened:
        stored = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
        shapes = {name: torch.empty(value.get_shape(), device="meta") for name, value in stored.items()}
        names = {id(value): name for name, value in shapes.items()}
        found = _of_module(shapes, module, checkpoint, prefix)
        yield {name: stored[names[id(value)]] for name, value in found.items()}


def _of_module(saved: Mapping[str, Any], module: nn.Module, checkpoint: str | Path, prefix: str | None) -> Any:
    """Return the weights of a file by the module's names, or raise if they do not fit."""
    wanted = module.state_dict()
    if prefix is None:
        prefix = _find_prefix(saved, wanted, checkpoint)
    found = {name[len(prefix) :]: value for name, value in saved.items() if name.startswith(prefix)}
    found = {name: value for name, value in found.items() if isinstance(value, Tensor) or name in wanted}
    differences = misfit(found, wanted)
    if differences:
        what = f"the weights in {checkpoint}" + (f" under the prefix {prefix!r}" if prefix else "")
        raise ValueError(f"{what} do not fit {type(module).__name__}: {differences}")
    return found


def check_buffers(module: nn.Module, found: Mapping[str, Any], checkpoint: str | Path) -> None:
    """Raise if a buffer has no values, and the file has none for it."""
    lost = [name for name, buffer in module.named_buffers() if buffer.is_meta and name not in found]
    if lost:
        raise ValueError(
            f"{checkpoint} has no values for {_listing(lost)}, buffers that state dicts leave out and that are on the "
            "meta device. Build the module on a real device."
        )


def no_torch_file(path: Path) -> str:
    """Return what a file is that cannot be one of ``torch.save``, by its first bytes; empty if it may be one."""
    with path.open("rb") as file:
        start = file.read(20)
    if not start or start.startswith((b"PK\x03\x04", b"\x80")):
        return ""
    return f"it is no file of torch.save, and begins with {start.decode(errors='replace')!r}"


def misfit(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return in what saved weights differ from a module's, by names and shapes, in sentences; empty if they fit.

    Example:
        >>> misfit({"weight": torch.ones(3, 2)}, nn.Linear(2, 3).state_dict())
        'missing in the file: bias. Is it another architecture? An argument prefix names the part of the file.'
    """
    missing = [name for name in wanted if name not in saved]
    unexpected = [name for name in saved if name not in wanted]
    reshaped = [name for name in wanted if name in saved and _shape(saved[name]) != _shape(wanted[name])]
    shapes = [f"{name} {_shape(saved[name])} in the file, {_shape(wanted[name])} in the module" for name in reshaped]
    parts = [f"missing in the file: {_listing(missing, most=4)}"] if missing else []
    parts += [f"not in the module: {_listing(unexpected, most=4)}"] if unexpected else []
    parts += [f"other shapes: {_listing(shapes, '; ', most=4)}"] if shapes else []
    if not parts:
        return ""
    advice = "Is it another architecture? An argument prefix names the part of the file."
    both = [(_shape(saved[name]), _shape(wanted[name])) for name in reshaped]
    counts = {(have[0], want[0]) for have, want in both if have and want}
    if not missing and not unexpected and len(counts) == 1 and len(reshaped) <= 2:
        have, want = counts.pop()
        advice = f"Most likely the class counts differ: {have} in the file, {want} in the module."
    return f"{'; '.join(parts)}. {advice}"


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _read_state_dict(path: Path) -> dict[str, Any]:
    _check_exists(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no readable safetensors file: {error}.") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, OSError) as error:
        raise ValueError(f"{path} {_why_unreadable(path, error)}") from error
    named = content if isinstance(content, Mapping) else {}
    parts = {key: named[key] for key in _KEYS if isinstance(named.get(key), Mapping)}
    if len(parts) == 1:
        (content,) = parts.values()
    elif parts:  # keep the keys in the names, because the prefix then tells an average from the weights themselves
        content = {f"{key}.{name}": value for key, part in parts.items() for name, value in part.items()}
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        keys = f" with keys {_listing(list(map(str, content)))}" if isinstance(content, Mapping) else ""
        raise ValueError(f"{path} holds no state dict but a {type(content).__name__}{keys}.")
    return {str(name): value for name, value in content.items()}


def _why_unreadable(path: Path, error: Exception) -> str:
    """Return why torch.load failed, and what to give instead."""
    unread = "could not be read as weights"
    if kind := no_torch_file(path):
        return f"{unread}: {kind}. Give a file of torch.save, a Lightning checkpoint or safetensors."
    if isinstance(error, EOFError) or "PytorchStreamReader failed" in str(error):
        size = f"{path.stat().st_size:,}"
        return f"{unread}: its {size} bytes are truncated or no file of torch.save. Copy or save it again."
    if "TorchScript" in str(error):
        way_out = "Give FrozenTeacher(torch.jit.load(path))."
        return f"holds a TorchScript program, which is a network and not weights. {way_out}"
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"{unread}: it must hold tensors and primitives only (read with weights_only=True). Save a state dict, "
        f"torch.save(model.state_dict(), path), not the model. torch says: {said}"
    )


def _check_exists(path: Path) -> None:
    given = f"a teacher's checkpoint is a file, and {str(path)!r} is a"
    if path.is_dir():
        raise FileNotFoundError(f"{given} folder. Name the file in it.")
    if re.match(r"\w{2,}:/", str(path)):
        raise FileNotFoundError(f"{given} URL. Download the file first, and name it.")
    if not path.is_file():
        here = [str(file) for file in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(str(path), here, n=3, cutoff=0.5)
        raise FileNotFoundError(
            f"there is no teacher checkpoint at {str(path)!r} (from the folder {str(Path.cwd())!r})."
            + (f" Close to it: {', '.join(near)}." if near else " Train the teacher first, or correct the path.")
        )


def _find_prefix(saved: Mapping[str, Any], wanted: Mapping[str, Any], checkpoint: str | Path) -> str:
    """Return the prefix under which the file has all of the module's names, or else most of them."""
    if not wanted:
        return ""
    hits: dict[str, int] = {}
    for name in saved:
        for start in [0, *(index + 1 for index, char in enumerate(name) if char == ".")]:
            if name[start:] in wanted:
                hits[name[:start]] = hits.get(name[:start], 0) + 1
    complete = [prefix for prefix, count in hits.items() if count == len(wanted)]
    if "" in complete:
        return ""
    if len(complete) > 1:
        raise ValueError(
            f"{checkpoint} holds weights for this network under several prefixes, {', '.join(map(repr, complete))}. "
            "Say which to take: FrozenTeacher(..., prefix=...)."
        )
    return complete[0] if complete else max(hits, key=lambda prefix: (hits[prefix], -len(prefix)), default="")


def _listing(names: list[str], separator: str = ", ", most: int = 8) -> str:
    more = f"{separator}… ({len(names) - most} more)" if len(names) > most else ""
    return separator.join(names[:most]) + more


def is_without_values(module: nn.Module) -> bool:
    """Return True if parameters of a network are on the meta device, or partitioned by DeepSpeed (ZeRO 3)."""
    return any(parameter.is_meta or hasattr(parameter, "ds_tensor") for parameter in module.parameters())


def check_finite(module: nn.Module, source: str) -> None:
    """Raise if a parameter of a teacher is not finite, or a buffer NaN; the message names where they come from."""
    bad: list[str] = []
    for name, parameter in module.named_parameters():
        if _is_plain(parameter, sharded=True) and (~torch.isfinite(parameter.detach())).any():
            bad.append(name)
    for name, buffer in module.named_buffers():
        if _is_plain(buffer) and torch.isnan(buffer).any():
            bad.append(name)
    if bad:
        raise ValueError(
            f"the teacher {type(module).__name__} has weights that are NaN or infinite ({source}): {_listing(bad)}. "
            "Its training diverged, or the file is damaged: take an earlier checkpoint."
        )


def _is_plain(tensor: Tensor, sharded: bool = False) -> bool:
    known = type(tensor) in (Tensor, nn.Parameter) or (sharded and is_sharded(tensor))
    return tensor.is_floating_point() and not tensor.is_meta and known


def looks_untrained(module: nn.Module) -> bool:
    """Return True if the weights look like torch's default initialisation.

    Normalisation layers decide if the module has any: untrained, their tensors are exactly 1 and 0. Otherwise all
    linear and convolution weights must lie within the bound of torch's default, 1/√fan_in; training usually exceeds it.
    """
    norms = [part for part in module.modules() if hasattr(part, "running_mean") or "Norm" in type(part).__name__]
    marks = [
        (tensor, value)
        for part in norms
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0))
        if isinstance(tensor := getattr(part, name, None), Tensor)
    ]
    if marks:
        return all(bool((tensor == value).all()) for tensor, value in marks)
    layers = [part for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    for weight in (part.weight for part in layers if part.weight.numel()):
        if not _is_plain(weight):
            return False  # because nobody quantizes a network before its training
        if (weight.abs() > weight[0].numel() ** -0.5).any():
            return False
    return bool(layers)
