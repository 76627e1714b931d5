"""Loading, checking and fingerprinting a network's weights."""

from __future__ import annotations

import difflib
import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["fingerprint", "load_weights", "looks_untrained"]


def fingerprint(module: nn.Module) -> str:
    """Hash the names, types, shapes and bytes of a module's parameters and persistent buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_weights(module: nn.Module, checkpoint: str | Path, prefix: str | None = None) -> None:
    """Load a file's weights into a module, or raise and leave the module unchanged.

    Args:
        module: The module that receives the weights.
        checkpoint: Safetensors, a ``.pt`` state dict (bare, or under ``state_dict`` or ``model``), or a Lightning
            ``.ckpt``.
        prefix: Prefix of the module's names in the file. None detects it.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file holds no weights, or if names or shapes do not fit the module (all are listed).
    """
    saved = _read_state_dict(Path(checkpoint))
    wanted = module.state_dict()
    if prefix is None:
        prefix = _find_prefix(saved, wanted, checkpoint)
    found = {name[len(prefix) :]: tensor for name, tensor in saved.items() if name.startswith(prefix)}

    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    reshaped = [name for name in wanted if name in found and found[name].shape != wanted[name].shape]
    if missing or unexpected or reshaped:
        what = f"the weights in {checkpoint}" + (f" under the prefix {prefix!r}" if prefix else "")
        lines = [f"{what} do not fit {type(module).__name__}:"]
        if missing:
            lines.append(f"  missing in the file: {_listing(missing)}")
        if unexpected:
            lines.append(f"  not in the module: {_listing(unexpected)}")
        if reshaped:
            shapes = [f"{name} {tuple(found[name].shape)} in the file, {tuple(wanted[name].shape)} in the module"
                      for name in reshaped]  # fmt: skip
            lines.append(f"  other shapes: {_listing(shapes, '; ')}")
        counts = {(found[name].shape[0], wanted[name].shape[0]) for name in reshaped if wanted[name].dim() > 0}
        if not missing and not unexpected and len(counts) == 1 and len(reshaped) <= 2:
            (have, want), *_ = counts
            lines.append(f"Most likely the class counts differ: {have} in the file, {want} in the module.")
        else:
            lines.append("Is it another architecture? FrozenTeacher(..., prefix=...) names the part of the file.")
        raise ValueError("\n".join(lines))
    module.load_state_dict(found)


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        here = [str(file) for file in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(str(path), here, n=3, cutoff=0.5)
        raise FileNotFoundError(
            f"there is no teacher checkpoint at {str(path)!r} (from the folder {str(Path.cwd())!r})."
            + (f" Close to it: {', '.join(near)}." if near else " Train the teacher first, or correct the path.")
        )
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no readable safetensors file: {error}.") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} could not be read as weights: it must hold tensors and primitives only (read with "
            "weights_only=True). Save a state dict, torch.save(model.state_dict(), path), not the model. "
            f"torch says: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        keys = f" with keys {_listing(list(map(str, content)))}" if isinstance(content, Mapping) else ""
        raise ValueError(f"{path} holds no state dict but a {type(content).__name__}{keys}.")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _find_prefix(saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor], checkpoint: str | Path) -> str:
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
    return bool(layers) and all(
        bool((part.weight.abs() <= part.weight[0].numel() ** -0.5).all()) for part in layers if part.weight.numel()
    )
