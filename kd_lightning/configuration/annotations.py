"""The values that a type annotation allows: its plain types, its classes, and both in words."""

from __future__ import annotations

import collections.abc
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse.typing import PositiveInt
from torch import Tensor
from typing_extensions import is_typeddict

_NOUNS = {
    int: "an integer",
    PositiveInt: "a positive integer",
    float: "a number",
    bool: "true or false",
    str: "a text",
    type(None): "null",
}


def annotation_of(function: Callable[..., Any], name: str) -> Any:
    """Return the annotation of an argument, of a base class if it is passed on; None if it is not found."""
    functions = [cls.__init__ for cls in function.__mro__] if isinstance(function, type) else [function]

    def stand_in() -> None: ...

    for one in functions:
        written = getattr(one, "__annotations__", {})
        if name in written:  # alone, because a name under TYPE_CHECKING in another one cannot be evaluated
            stand_in.__annotations__ = {name: written[name]}
            try:
                return get_type_hints(stand_in, getattr(one, "__globals__", {}))[name]
            except (NameError, TypeError):
                return None
    return None


def _leaves(annotation: Any) -> Iterator[Any]:
    """Yield the types of which an annotation consists, the results of callables included."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal or not arguments:
        yield annotation
    for argument in () if get_origin(annotation) is Literal else arguments:
        if not isinstance(argument, list):
            yield from _leaves(argument)


def plain_types(annotation: Any) -> list[Any]:
    """Return the numbers, texts and the like that an annotation allows."""
    return [leaf for leaf in _leaves(annotation) if leaf in _NOUNS or get_origin(leaf) is Literal]


def classes_of(annotation: Any) -> list[type]:
    """Return the classes of an annotation whose subclasses a user may name."""
    classes = [leaf for leaf in _leaves(annotation) if isinstance(leaf, type) and leaf.__module__ != "builtins"]
    return [
        cls
        for cls in dict.fromkeys(classes)
        if cls not in _NOUNS and not is_typeddict(cls) and not issubclass(cls, (PurePath, Tensor))
    ]


def callables_of(annotation: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the parameters and the result of each function that an annotation allows."""
    if get_origin(annotation) is collections.abc.Callable:
        yield get_args(annotation)[0], get_args(annotation)[1]
    elif get_origin(annotation) is not Literal:
        for argument in get_args(annotation):
            yield from callables_of(argument)


def describe(annotation: Any) -> str:
    """Return the values that an annotation allows, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _NOUNS:
        return _NOUNS[annotation]
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (Union, types.UnionType):
        choices = tuple(
            value for argument in arguments if get_origin(argument) is Literal for value in get_args(argument)
        )
        kinds = [argument for argument in arguments if get_origin(argument) is not Literal]
        words = [f"one of {', '.join(map(repr, choices))}"] if choices else []
        words = [*dict.fromkeys([*words, *map(describe, kinds)])]
        return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    if origin is collections.abc.Callable:
        return f"a function that gives {describe(arguments[1])}" if arguments else "a function"
    if origin in (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable):
        inner = [argument for argument in arguments if argument is not Ellipsis]
        words = [f"{describe(part)}s" if part in (int, float, str) else describe(part) for part in dict.fromkeys(inner)]
        return re.sub(r" of an? ", " of ", f"a list of {' and '.join(dict.fromkeys(words))}")
    if origin is dict and arguments:
        return f"a mapping from {describe(arguments[0])} to {describe(arguments[1])}"
    name = getattr(annotation, "__name__", str(annotation)).rpartition(".")[2]
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def subclasses_of(base: type) -> Iterator[type]:
    """Yield a class and its subclasses that are known by now."""
    yield base
    for subclass in base.__subclasses__():
        yield from subclasses_of(subclass)


def class_names(bases: Iterable[type], own: bool = False) -> list[str]:
    """Return the names that a user may write for one of the base classes, of this library alone if ``own``."""
    classes = [cls for base in bases for cls in subclasses_of(base) if cls is not base and not inspect.isabstract(cls)]
    rooms = [sys.modules.get(".".join(cls.__module__.split(".")[:2])) for cls in classes]
    return [
        cls.__name__
        for cls, room in zip(classes, rooms, strict=True)
        if (cls.__name__ in getattr(room, "__all__", ()) and not cls.__module__.startswith("kd_lightning._"))
        or not (own or cls.__name__.startswith("_") or cls.__module__.startswith(("kd_lightning", "_")))
    ]
