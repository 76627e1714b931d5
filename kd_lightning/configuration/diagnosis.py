"""Diagnosis of a command's settings: one paragraph about the first mistake in them, with its place.

jsonargparse reports a wrong setting once per type of a union, each time with the whole configuration. Here each class
and argument that was written is checked by itself, with jsonargparse's public functions alone.
"""

from __future__ import annotations

import difflib
import inspect
import re
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from torch import nn

from kd_lightning import models
from kd_lightning.configuration.annotations import (
    annotation_of,
    callables_of,
    class_names,
    classes_of,
    describe,
    plain_types,
    subclasses_of,
)
from kd_lightning.configuration.written import CommandLineError, Key, Written, dotted, guess
from kd_lightning.models.build import builds_module

_SPEC = ("class_path", "init_args", "dict_kwargs")
_SHOWN = ("DistillationModule", "DigitsDataModule", "AdamW", "CosineSchedule", "CSVLogger", "AdaptiveTemperature")
"""Classes that stand in examples."""


def diagnose(written: Written, owners: Mapping[str, Callable[..., Any]], error: Exception) -> str:
    """Return one paragraph about the first mistake in the settings.

    Args:
        written: The settings as the user wrote them.
        owners: The keys that the command accepts, each with the function that has an argument of this name.
        error: The parser's error, whose text is taken if no mistake is found here.
    """
    if written.mistakes:
        return written.mistakes[0]
    walk = _Walk(written, owners)
    # an option may stand in place of what is wrong in a file
    alone = _Walk(Written([str(written.command), *(f"--config={file}" for file in written.files)]), owners)
    for each in (walk, alone):
        try:
            each.look()
        except _Mistake as mistake:
            return f"{each.written.place(mistake.key)}: {mistake.text}"
    for key, text in walk.absent if "expected one argument" not in str(error) else []:
        return f"{written.place(key)}: {text}" if key else text
    return _shorten(str(error))


def refuse_helps(written: Written, owners: Mapping[str, Callable[..., Any]]) -> None:
    """Raise CommandLineError on a mistake in the class of an option ``--KEY.help CLASS``."""
    for option, key, named in written.helps:
        owner, annotation = owners.get(str(key[0])), None
        for length, name in enumerate(key, 1):
            annotation = None if owner is None else annotation_of(owner, str(name))
            owner = _written_class(written, key[:length], annotation)
        if annotation is None:
            continue
        if named is None:
            bases = classes_of(annotation)
            names = class_names(bases) or [base.__name__ for base in bases]
            text = f"name the class, as in {option} {_example(names)}.{_list('It may be', names)}"
            raise CommandLineError(f"{option}: {text}")
        try:
            _Walk(written, {}).in_class(named, {}, annotation, key, key)
        except _Mistake as mistake:
            raise CommandLineError(f"{option}: {mistake.text}") from None


def first_error(config: Any) -> Exception | None:
    """Return the first error when each class of a parsed configuration is built, those within others first.

    The error has an attribute ``key``, the place of the class that raised it.
    """
    try:
        _build(config, ())
    except Exception as error:
        return error
    return None


def import_class(path: str) -> Any:
    """Return the class or function at an import path."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _build(config: Any, key: Key) -> Any:
    if isinstance(config, (list, tuple)):
        return type(config)(_build(part, (*key, index)) for index, part in enumerate(config))
    if not isinstance(config, (dict, Namespace)):
        return config
    items = vars(config) if isinstance(config, Namespace) else config
    if not isinstance(items.get("class_path"), str):
        return {name: _build(part, (*key, name)) for name, part in items.items()}
    target = import_class(items["class_path"])
    arguments = _build(items.get("init_args") or {}, (*key, "init_args"))
    arguments.update(items.get("dict_kwargs") or {})
    try:
        inspect.signature(target).bind(**arguments)
    except TypeError:
        return partial(target, **arguments)  # an optimizer, whose parameters are given later
    try:
        return target(**arguments)
    except Exception as error:
        vars(error).setdefault("key", key)
        raise


# ---- the walk through the settings ---------------------------------------------------------------------------------


class _Mistake(Exception):
    """A mistake in the settings: its key and a text about it."""

    def __init__(self, key: Key, text: str) -> None:
        super().__init__(text)
        self.key, self.text = key, text


class _Walk:
    """A walk through settings that raises the first mistake, and keeps the required arguments that are absent.

    An absent argument counts if nothing else is wrong.
    """

    def __init__(self, written: Written, owners: Mapping[str, Callable[..., Any]]) -> None:
        self.written, self.owners = written, owners
        self.absent: list[tuple[Key, str]] = []

    def look(self) -> None:
        """Look at all settings."""
        written, owners = self.written, self.owners
        for name in written.tree:
            if name not in owners:
                close = guess(name, [*owners, "config"]) or self.elsewhere(name, (name,), similar=True)
                raise _Mistake((name,), f"{written.command} has no setting {name!r}.{close}{_list('It has', owners)}")
        for name, owner in owners.items():
            if name in written.tree:
                value = written.tree[name]
                if written.place((name,)).startswith("-") and not isinstance(value, (str, list, dict)):
                    value = [value] if describe(annotation_of(owner, name)).startswith("a list") else value
                self.in_argument(owner, name, value, (name,))
        required = [name for owner in {*owners.values()} for name in _required(owner) if owners.get(name) is owner]
        missing = sorted(name for name in required if name not in written.tree)
        if missing and not ("ckpt_path" in written.tree and missing == ["model"]):
            options = " and ".join(f"--{name}" for name in missing)
            text = f"{written.command} needs {options}, or a configuration with the same: --config FILE."
            self.absent.append(((), text))

    def in_arguments(self, function: Callable[..., Any], values: Mapping[str, Any], key: Key, given: int = 0) -> None:
        """Look at arguments of a function or class, of which the first ``given`` are not for the user."""
        accepted, title = _arguments(function)[given:], getattr(function, "__name__", str(function))
        for name in values:
            if name not in accepted:
                close = guess(str(name), accepted) or self.elsewhere(str(name), (*key, name), similar=False)
                text = f"{title} has no argument {name!r}.{close}{_list('It has', accepted)}"
                raise _Mistake((*key, name), text)
        for name, value in values.items():
            self.in_argument(function, name, value, (*key, name))
        missing = [name for name in _required(function) if name in accepted and name not in values]
        if missing:
            where = key[:-1] if key[-1:] == ("init_args",) else key
            self.absent.append((where, f"{title} needs {' and '.join(missing)}."))

    def in_argument(self, function: Callable[..., Any], name: str, value: Any, key: Key) -> None:
        annotation, before = annotation_of(function, name), len(self.absent)
        self.in_value(value, annotation, key)
        if len(self.absent) == before and annotation is not None and _refuses(function, name, value):
            shown = value.get("class_path", value) if isinstance(value, dict) else value
            text = f"must be {describe(annotation)}, got {_short(repr(shown), 100)}."
            if len(key) == 1 and describe(annotation) == "a list of numbers":
                text += f" Write the numbers with spaces, as in --{name} 1 2."
            raise _Mistake(key, text)

    def in_value(self, value: Any, annotation: Any, key: Key) -> None:
        bases = classes_of(annotation)
        if isinstance(value, list):
            for index, item in enumerate(value):
                self.in_value(item, annotation, (*key, index))
        elif isinstance(value, str) and bases and str not in plain_types(annotation) and not Path(value).is_file():
            self.in_class(value, {}, annotation, key, key)
        elif not isinstance(value, dict):
            return
        elif isinstance(value.get("class_path"), str):
            for name in set(value).difference(_SPEC):
                text = f"a class has class_path and init_args, not {name!r}.{guess(str(name), _SPEC)}"
                raise _Mistake((*key, name), text)
            where = (*key, "class_path"), (*key, "init_args")
            self.in_class(value["class_path"], value.get("init_args") or {}, annotation, *where)
        elif (bases and not set(value).isdisjoint(_SPEC)) or (value and len(bases) == 1 and not _arguments(bases[0])):
            text = f"class_path is missing, which names the class.{_list('It may be', class_names(bases))}"
            raise _Mistake(key, text)
        elif value and bases and [*callables_of(annotation)]:  # such as an optimizer's
            argument, shown = self.written.place((*key, next(iter(value)))), _example(class_names(bases))
            if argument.startswith("-"):
                raise _Mistake(key, f"the class is missing. Write {argument.rpartition('.')[0]} {shown} as well.")
            raise _Mistake(key, f"class_path is missing, which names the class, such as {shown}.")
        elif len(bases) == 1:
            self.in_arguments(bases[0], value, key)

    def in_class(self, path: str, arguments: Mapping[str, Any], annotation: Any, key: Key, arguments_key: Key) -> None:
        bases = classes_of(annotation)
        number = re.fullmatch(r"""['"]?([-+]?\d+(?:[.,]\d+)?(?:e[-+]?\d+)?)['"]?""", path, re.IGNORECASE)
        if number is not None and {int, float} & {*plain_types(annotation)}:
            way_out = f"{number[1].replace(',', '.')}, {'with a point' if ',' in path else 'without quotes'}"
            raise _Mistake(key, f"must be {describe(annotation)}, got the text {path!r}. Write {way_out}.")
        target = _target(path, key, annotation)
        if isinstance(target, type) and bases and not (issubclass(target, tuple(bases)) or [*callables_of(annotation)]):
            raise _Mistake(key, f"must be {describe(annotation)}, got {path!r}.")
        given = 0
        for parameters, result in callables_of(annotation):
            of_result = isinstance(target, type) and issubclass(target, tuple(classes_of(result)))
            given = len(parameters) if of_result and isinstance(parameters, list) else given
        self.in_arguments(target, arguments, arguments_key, given)

    def elsewhere(self, name: str, key: Key, similar: bool) -> str:
        """Return a sentence that proposes the setting of this name in another place, with a space before it, or ""."""
        written = self.written
        classes = [((part,), annotation_of(owner, part)) for part, owner in self.owners.items()]
        classes += [(where, None) for where, _ in written.classes()]
        known: dict[str, str] = {}
        for where, annotation in classes:
            cls = _written_class(written, where, annotation)
            place = dotted(tuple(part for part in where if part != "init_args" and not isinstance(part, int)))
            for argument in () if cls is None else _arguments(cls):
                known.setdefault(argument, f"{place}.{argument}")

        def similarity(other: str) -> float:
            return difflib.SequenceMatcher(None, name, other).ratio()

        best = name if name in known else max(known, key=similarity, default="")
        if best != name and not (similar and similarity(best) > 0.7):
            return ""
        return f" Did you mean {'--' if written.place(key).startswith('-') else ''}{known[best]}?"


def _written_class(written: Written, key: Key, annotation: Any) -> type | None:
    """Return the class that was written under a key, or else the only one that the annotation has."""
    bases, value = classes_of(annotation), written.at(key)
    path = value.get("class_path") if isinstance(value, dict) else value
    try:
        found = _target(path, key, annotation) if isinstance(path, str) else None
    except (ImportError, _Mistake):
        found = None
    return found if isinstance(found, type) else bases[0] if len(bases) == 1 else None


def _target(path: str, key: Key, annotation: Any) -> Any:
    """Return the class or function of a path or of a short name, or raise a mistake about a name that has none."""
    if Path(path).suffix in (".yaml", ".yml", ".json"):
        raise _Mistake(key, f"there is no file {path!r} (from the folder {str(Path.cwd())!r}).")
    if "." not in path.strip("."):
        found = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in _named(path, classes_of(annotation))}
        if len(found) > 1:
            raise _Mistake(key, f"{path!r} is the name of several classes. Write {' or '.join(found)}.")
        if not found:
            raise _Mistake(key, _no_class(path, key, annotation))
        return next(iter(found.values()))
    module, _, name = path.rpartition(".")
    try:
        room = import_module(module)
    except ModuleNotFoundError as error:
        raise _Mistake(key, _absent_module(path, error)) from None
    target = getattr(room, name, None)
    if target is None:
        names = [other for other, value in vars(room).items() if callable(value) and other[0] != "_"]
        close = f" Did you mean {name}?" if _named(name, classes_of(annotation)) else guess(name, names)
        raise _Mistake(key, f"the module {module} has no {name!r}.{close}")
    return target


def _named(name: str, bases: Iterable[type]) -> list[type]:
    return [cls for base in bases for cls in subclasses_of(base) if cls.__name__ == name]


def _absent_module(path: str, error: ModuleNotFoundError) -> str:
    """Return a text about a class path whose import fails for an absent module."""
    module, absent = path.rpartition(".")[0], error.name or ""
    if f"{module}.".startswith(f"{absent}."):
        close = guess(absent, [file.stem for file in Path.cwd().glob("*.py")])
        text = f"there is no module {absent!r} for {path!r}.{close} Modules are looked for in the folder"
        return f"{text} {str(Path.cwd())!r} and among the installed packages."
    package = absent.partition(".")[0]
    if not package or find_spec(package) is not None:
        raise error
    frame = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")][-1]
    return (
        f"{Path(frame.filename).name}, line {frame.lineno}, imports {package!r}, which is not installed. Install it, "
        f"as in pip install {package}, or correct the import."
    )


def _no_class(path: str, key: Key, annotation: Any) -> str:
    """Return a text about a short name that no known class has."""
    bases = classes_of(annotation)
    names = class_names(bases)
    argument = next((str(part) for part in reversed(key) if part != "class_path" and not isinstance(part, int)), "")
    close = guess(path, names)
    if any(issubclass(nn.Module, base) for base in bases) and builds_module(getattr(models, path, None)):
        close = f" Did you mean {models.__name__}.{path}?"
    kind = argument.rpartition("_")[2]
    own = [name for name in class_names(bases, own=True) if kind in name.lower()]
    known = _list("Known are", names) or _list("Known are among others", own, most=50)
    text = f"{path!r} names no {' or '.join(base.__name__ for base in bases)}.{close or known}"
    if plain_types(annotation) != [type(None)] and plain_types(annotation):
        text += f" Allowed is {describe(annotation)}."
    if not close and path[:1].isupper():
        text += f" A class of your own is written with its module, such as mine.{path}."
    return text


# ---- what jsonargparse accepts -------------------------------------------------------------------------------------


def _arguments(function: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments that jsonargparse finds, those that are passed on by ``**kwargs`` included."""
    return [name.partition(".")[2] for name in _add(ArgumentParser(exit_on_error=False), function, set())]


def _required(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]


def _refuses(function: Callable[..., Any], name: str, value: Any) -> bool:
    """Return True if jsonargparse refuses a value for an argument."""
    parser = ArgumentParser(exit_on_error=False)
    _add(parser, function, set(_arguments(function)) - {name})
    try:
        parser.parse_object({"of": {name: value}})
    except (ArgumentError, TypeError, ValueError, KeyError):
        return True
    return False


def _add(parser: ArgumentParser, function: Callable[..., Any], skip: set[str]) -> list[str]:
    add = parser.add_class_arguments if isinstance(function, type) else parser.add_function_arguments
    return add(function, "of", fail_untyped=False, sub_configs=True, skip=skip)  # pyright: ignore[reportArgumentType]


# ---- texts ---------------------------------------------------------------------------------------------------------


def _example(names: list[str]) -> str:
    """Return the name that stands in examples, or else the first."""
    return next((name for name in _SHOWN if name in names), [*names, "CLASS"][0])


def _list(start: str, names: Iterable[str], most: int = 30) -> str:
    """Return a sentence with all names, with a space before it; empty if they are more than a reader looks through."""
    names = sorted(set(names))
    return f" {start} {', '.join(names)}." if 0 < len(names) <= most else ""


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _shorten(text: str) -> str:
    """Return a text of jsonargparse as one paragraph, without the whole configuration in it."""
    text = re.sub(r"Given value type: .*", "", text, flags=re.DOTALL)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = " ".join(text.replace('Parser key "', '"').split())
    return _short(text, 600).rstrip(".") + "."
