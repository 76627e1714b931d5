"""What is wrong with the settings of a command: the first mistake in them, told in one paragraph with its place.

jsonargparse knows that a setting is wrong, but reports it once per type of a union with the whole configuration.
Here each class and argument that was written is checked by itself, with jsonargparse's public functions alone.
"""

from __future__ import annotations

import collections.abc
import inspect
import re
import sys
import types
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, Namespace
from typing_extensions import is_typeddict

from kd_lightning.configuration.written import Key, Written, guess

__all__ = ["diagnose", "first_error", "import_class"]

_SPEC = ("class_path", "init_args", "dict_kwargs")
_NOUNS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def diagnose(written: Written, owners: Mapping[str, Callable[..., Any]], error: Exception) -> str:
    """Return one paragraph about the first mistake in the settings.

    Args:
        written: What the user wrote.
        owners: The keys that the command accepts, each with the function that has an argument of this name.
        error: The parser's error, whose text is taken if no mistake is found here.
    """
    if written.stray:
        return f"{written.stray[0]!r} belongs to no option. Write --config FILE or --key=value."
    absent: _Absent = []
    for key, text in _in_top(written, owners, absent):
        return f"{written.place(key)}: {text}"
    alone = Written([str(written.command), *(f"--config={file}" for file in written.files)])
    for key, text in _in_top(alone, owners, []):  # an option may stand in place of what is wrong in a file
        return f"{alone.place(key)}: {text}"
    for key, text in absent:
        return f"{written.place(key)}: {text}" if key else text
    return _shorten(str(error))


def first_error(config: Any) -> Exception | None:
    """Return the first error when each class of a parsed configuration is built, those within others first.

    The error has an attribute ``key``: where the class that raised it stands.

    Args:
        config: The parsed configuration.
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

_Mistakes = Iterator[tuple[Key, str]]
_Absent = list[tuple[Key, str]]  # required arguments that were not written, told where nothing else is wrong


def _in_top(written: Written, owners: Mapping[str, Callable[..., Any]], absent: _Absent) -> _Mistakes:
    for name in written.tree:
        if name not in owners:
            yield (name,), f"{written.command} has no setting {name!r}.{guess(name, owners)}{_list('It has', owners)}"
    for name, owner in owners.items():
        if name in written.tree:
            yield from _in_argument(owner, name, written.tree[name], (name,), absent)
    required = [name for owner in {*owners.values()} for name in _required(owner) if owners.get(name) is owner]
    missing = sorted(name for name in required if name not in written.tree)
    if missing and not ("ckpt_path" in written.tree and missing == ["model"]):
        options = " and ".join(f"--{name}" for name in missing)
        absent.append(((), f"{written.command} needs {options}, or a configuration with the same: --config FILE."))


def _in_arguments(
    function: Callable[..., Any], values: Mapping[str, Any], key: Key, absent: _Absent, given: int = 0
) -> _Mistakes:
    """Yield the mistakes in arguments of a function or class, of which the first ``given`` are not for the user."""
    accepted, title = _arguments(function)[given:], getattr(function, "__name__", str(function))
    for name in values:
        if name not in accepted:
            text = f"{title} has no argument {name!r}.{guess(str(name), accepted)}{_list('It has', accepted)}"
            yield (*key, name), text
    for name, value in values.items():
        yield from _in_argument(function, name, value, (*key, name), absent)
    missing = [name for name in _required(function) if name in accepted and name not in values]
    if missing:
        absent.append((key[:-1] if key[-1:] == ("init_args",) else key, f"{title} needs {' and '.join(missing)}."))


def _in_argument(function: Callable[..., Any], name: str, value: Any, key: Key, absent: _Absent) -> _Mistakes:
    annotation, before = _annotation(function, name), len(absent)
    inner = list(_in_value(value, annotation, key, absent))
    yield from inner
    if not inner and len(absent) == before and annotation is not None and _refuses(function, name, value):
        shown = value.get("class_path", value) if isinstance(value, dict) else value
        yield key, f"must be {_describe(annotation)}, got {_short(repr(shown), 100)}."


def _in_value(value: Any, annotation: Any, key: Key, absent: _Absent) -> _Mistakes:
    bases = _classes(annotation)
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _in_value(item, annotation, (*key, index), absent)
    elif isinstance(value, str) and bases and str not in _plain(annotation) and not Path(value).is_file():
        yield from _in_class(value, {}, annotation, key, key, absent)
    elif isinstance(value, dict) and isinstance(value.get("class_path"), str):
        for name in set(value).difference(_SPEC):
            yield (*key, name), f"a class has class_path and init_args, not {name!r}.{guess(str(name), _SPEC)}"
        where = (*key, "class_path"), (*key, "init_args")
        yield from _in_class(value["class_path"], value.get("init_args") or {}, annotation, *where, absent)
    elif isinstance(value, dict) and bases and not set(value).isdisjoint(_SPEC):
        yield key, f"class_path is missing, which names the class.{_list('It may be', _names(bases))}"
    elif isinstance(value, dict) and len(bases) == 1:
        yield from _in_arguments(bases[0], value, key, absent)


def _in_class(
    path: str, arguments: Mapping[str, Any], annotation: Any, key: Key, arguments_key: Key, absent: _Absent
) -> _Mistakes:
    bases = _classes(annotation)
    if "." in path:
        module, _, name = path.rpartition(".")
        try:
            found = import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise  # an import within the user's own module
            close = guess(error.name, [file.stem for file in Path.cwd().glob("*.py")])
            text = f"there is no module {error.name!r} for {path!r}.{close} Modules are looked for in the folder"
            yield key, f"{text} {str(Path.cwd())!r} and among the installed packages."
            return
        target = getattr(found, name, None)
        if target is None:
            names = [other for other, value in vars(found).items() if callable(value) and other[0] != "_"]
            yield key, f"the module {module} has no {name!r}.{guess(name, names)}"
            return
    else:
        target = next((cls for base in bases for cls in _subclasses(base) if cls.__name__ == path), None)
        if target is None:
            wanted = " or ".join(base.__name__ for base in bases)
            close = guess(path, _names(bases))
            text = f"{path!r} names no {wanted}.{close or _list('Known are', _names(bases))}"
            if _plain(annotation) != [type(None)] and _plain(annotation):
                text += f" Allowed is {_describe(annotation)}."
            if not close and path[:1].isupper():
                text += f" A class of your own is written with its module, such as mine.{path}."
            yield key, text
            return
    if isinstance(target, type) and bases and not (issubclass(target, tuple(bases)) or [*_callables(annotation)]):
        yield key, f"must be {_describe(annotation)}, got {path!r}."
        return
    given = 0
    for parameters, result in _callables(annotation):
        if isinstance(target, type) and isinstance(parameters, list) and issubclass(target, tuple(_classes(result))):
            given = len(parameters)
    yield from _in_arguments(target, arguments, arguments_key, absent, given)


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


# ---- annotations ---------------------------------------------------------------------------------------------------


def _annotation(function: Callable[..., Any], name: str) -> Any:
    """Return the annotation of an argument, of a base class if it is passed on; None if it is not found."""
    functions = [cls.__init__ for cls in function.__mro__] if isinstance(function, type) else [function]
    for one in functions:
        try:
            hints = get_type_hints(one)
        except (NameError, TypeError):
            continue
        if name in hints:
            return hints[name]
    return None


def _leaves(annotation: Any) -> Iterator[Any]:
    """Yield the types of which an annotation consists, the results of callables included."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal or not arguments:
        yield annotation
    for argument in () if get_origin(annotation) is Literal else arguments:
        if not isinstance(argument, list):
            yield from _leaves(argument)


def _plain(annotation: Any) -> list[Any]:
    return [leaf for leaf in _leaves(annotation) if leaf in _NOUNS or get_origin(leaf) is Literal]


def _classes(annotation: Any) -> list[type]:
    classes = [leaf for leaf in _leaves(annotation) if isinstance(leaf, type) and leaf.__module__ != "builtins"]
    return [cls for cls in dict.fromkeys(classes) if not is_typeddict(cls) and not issubclass(cls, PurePath)]


def _callables(annotation: Any) -> Iterator[tuple[Any, Any]]:
    if get_origin(annotation) is collections.abc.Callable:
        yield get_args(annotation)[0], get_args(annotation)[1]
    elif get_origin(annotation) is not Literal:
        for argument in get_args(annotation):
            yield from _callables(argument)


def _describe(annotation: Any) -> str:
    """Return the values that an annotation allows, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _NOUNS:
        return _NOUNS[annotation]
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (Union, types.UnionType):
        words = list(dict.fromkeys(_describe(argument) for argument in arguments))
        return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    if origin is collections.abc.Callable:
        return f"a function that gives {_describe(arguments[1])}" if arguments else "a function"
    if origin in (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable):
        inner = [argument for argument in arguments if argument is not Ellipsis]
        return f"a list of {' and '.join(dict.fromkeys(map(_describe, inner)))}".replace(" of a ", " of ")
    name = getattr(annotation, "__name__", str(annotation))
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _subclasses(base: type) -> Iterator[type]:
    """Yield a class and its subclasses that are known by now."""
    yield base
    for subclass in base.__subclasses__():
        yield from _subclasses(subclass)


def _names(bases: Iterable[type]) -> list[str]:
    """Return the names of the classes that a user may write for one of the base classes."""
    classes = [cls for base in bases for cls in _subclasses(base) if cls is not base and not inspect.isabstract(cls)]
    rooms = [sys.modules.get(".".join(cls.__module__.split(".")[:2])) for cls in classes]
    return [
        cls.__name__
        for cls, room in zip(classes, rooms, strict=True)
        if cls.__name__ in getattr(room, "__all__", ()) or not cls.__module__.startswith(("kd_lightning", "_"))
    ]


# ---- texts ---------------------------------------------------------------------------------------------------------


def _list(start: str, names: Iterable[str]) -> str:
    """Return a sentence with all names, with a space before it; empty if they are more than a reader looks through."""
    names = sorted(set(names))
    return f" {start} {', '.join(names)}." if 0 < len(names) <= 30 else ""


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _shorten(text: str) -> str:
    """Return a text of jsonargparse as one paragraph, without the whole configuration in it."""
    text = re.sub(r"Given value type: .*", "", text, flags=re.DOTALL)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = " ".join(text.replace('Parser key "', '"').split())
    return _short(text, 600).rstrip(".") + "."
