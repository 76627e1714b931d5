"""The settings in a checkpoint are data: what they may name of which something is built."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

from kd_lightning._lightning import load_file
from kd_lightning.models.build import builds_module, locate
from kd_lightning.schedules import Schedule
from kd_lightning.teachers import Renormalize, Teacher, TeacherCache
from kd_lightning.teachers.weights import no_torch_file

_KINDS = (nn.Module, Schedule, Teacher, TeacherCache, Renormalize, Optimizer, LRScheduler)


def read_checkpoint(path: str | Path | IO[bytes], weights_only: bool = True) -> Any:
    """Return the content of a checkpoint on the CPU, without reading the weights of a local file."""
    local = Path(path) if isinstance(path, (str, Path)) and "://" not in str(path) else None
    if local is not None and not local.exists():
        raise FileNotFoundError(f"there is no checkpoint at {str(path)!r} (from the folder {str(Path.cwd())!r}).")
    if local is not None and local.is_dir():
        inside = ", ".join(sorted(file.name for file in local.rglob("*.ckpt"))) or "none"
        raise ValueError(f"{str(path)!r} is a folder, and a checkpoint is a file. Its files *.ckpt: {inside}.")
    try:
        if isinstance(path, (str, Path)):
            if local is not None and zipfile.is_zipfile(local):
                return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
            return load_file(path, weights_only)
        position = path.tell()
        content = load_file(path, weights_only)
        path.seek(position)
        return content
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError) as error:
        source = path if isinstance(path, (str, Path)) else "the file"
        if local is not None and (kind := no_torch_file(local)):
            raise ValueError(f"{source} is no checkpoint: {kind}. Give a file that the Trainer wrote.") from error
        if not isinstance(error, pickle.UnpicklingError):
            raise ValueError(f"{source} cannot be read as a checkpoint: it is truncated or damaged.") from error
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{source} cannot be read as data: {f'it holds {named[1]}' if named else 'it is damaged'}. A checkpoint is "
            "read without running code. If you trust its origin, read it with load_from_checkpoint(..., "
            "weights_only=False)."
        ) from error


def check_settings(
    settings: Mapping[str, Any],
    source: object,
    kind: type[LightningModule] = LightningModule,
    given: Iterable[str] = (),
) -> None:
    """Raise if the settings of a module in a checkpoint name something that is no part of a model.

    They may name ``nn.Module`` classes (policies, losses and layer terms among them), functions annotated as returning
    an ``nn.Module``, schedules, teachers, optimisers and their schedulers. Each ``class_path`` is checked when its
    module is imported, which runs that module's top-level code, and before it is called; modules of the standard
    library are not imported. Then the settings are parsed as LightningCLI parses them, which calls nothing, and what
    they turn out to name otherwise, in a string or for an argument that is a function, is checked in the same way.

    Args:
        settings: The checkpoint's ``hyper_parameters``, with the module's ``_class_path`` if there is one.
        source: The checkpoint, for messages.
        kind: The class of the module, without ``_class_path``.
        given: The names of settings that the caller gave instead.

    Raises:
        ValueError: If something else is named.

    Example:
        >>> from kd_lightning import DistillationModule
        >>> check_settings({"student": {"class_path": "os.system"}}, "a.ckpt", DistillationModule)
        Traceback (most recent call last):
            ...
        ValueError: a.ckpt names os.system as student, and settings in a checkpoint may name parts of a model only: ...
    """
    given = set(given)
    arguments = {name: value for name, value in settings.items() if not name.startswith("_")}
    model = {"model": settings["_class_path"]} if "_class_path" in settings else {}
    for where, named in [*model.items(), *_named({n: value for n, value in arguments.items() if n not in given})]:
        _check(named, where, source)
    parsed = _parse(kind, settings.get("_class_path"), arguments)
    for where, named in _named({name: value for name, value in parsed.items() if name not in given}):
        _check(named, where, source)


def _parse(kind: type[LightningModule], class_path: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a module as LightningCLI parses them, with the functions that strings stand for."""
    parser = ArgumentParser(exit_on_error=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # because jsonargparse warns of os.system and the like, which is refused here
        if class_path is None:
            parser.add_class_arguments(kind, "model", fail_untyped=False)
            return parser.parse_object({"model": arguments}).model.as_dict()
        parser.add_subclass_arguments(kind, "model", fail_untyped=False)
        model = parser.parse_object({"model": {"class_path": class_path, "dict_kwargs": arguments}}).model.as_dict()
        return {**model.get("init_args", {}), **model.get("dict_kwargs", {})}


def _named(value: object, where: str = "") -> Iterator[tuple[str, object]]:
    """Yield what a value names, by ``class_path`` or as a callable, with the place where it does."""
    if isinstance(value, Mapping):
        if "class_path" in value:
            yield where, value["class_path"]
        for name, part in value.items():
            if name != "class_path":
                yield from _named(part, f"{where}.{name}".removeprefix("."))
    elif isinstance(value, (list, tuple, set, frozenset)):
        for index, part in enumerate(value):
            yield from _named(part, f"{where}[{index}]")
    elif callable(value):
        yield where, value


def _check(named: object, where: str, source: object) -> None:
    found, name = named, str(named)
    if isinstance(named, str):
        try:
            found = locate(named)
        except (TypeError, ValueError):  # of the standard library; no dotted path
            found = None
    elif callable(named):
        name = f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', type(named).__name__)}"
    known = issubclass(found, _KINDS) if isinstance(found, type) else isinstance(found, _KINDS) or builds_module(found)
    if not known:
        raise ValueError(
            f"{source} names {name} as {where}, and settings in a checkpoint may name parts of a model only: classes "
            "of modules, schedules, policies, losses, teachers, optimisers and schedulers, and functions annotated as "
            f"returning a module. Nothing was built. If you want it, give {where.partition('.')[0].partition('[')[0]} "
            "yourself, in a file after --config or as an argument of load_from_checkpoint."
        )
