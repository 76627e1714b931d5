"""Looking up a dotted path, and building a network with the function or class that it names."""

import functools
import inspect
import sys
from difflib import get_close_matches
from importlib import import_module
from typing import Any, get_type_hints

from torch import nn


def build_model(factory: str, num_classes: int | None = None, **kwargs: Any) -> nn.Module:
    """Build a network with a class or function of any library, named by its dotted path.

    LightningCLI checks the arguments of a ``class_path`` against its signature, so it refuses the further arguments
    that factories such as ``timm.create_model`` accept. ``build_model`` passes them on, in YAML from ``dict_kwargs``::

        student:
          class_path: kd_lightning.models.build_model
          init_args: {factory: timm.create_model, num_classes: 100}
          dict_kwargs: {model_name: resnet18}

    Args:
        factory: Dotted path of a ``torch.nn.Module`` class, or of a function whose return is annotated as one, such as
            ``torchvision.models.resnet18``. Anything else is refused without being called.
        num_classes: Number of logits, passed to the factory only if given.
        **kwargs: All other arguments of the factory.

    Returns:
        The network, as the factory made it.

    Raises:
        ImportError: If the path leads nowhere; the message names close matches.
        TypeError: If the factory is neither a module class nor annotated as returning a module, or if it returns
            something else.
        ValueError: If ``factory`` is not a dotted path.

    Example:
        >>> model = build_model("torchvision.models.resnet18", num_classes=7)
        >>> model.fc.out_features
        7
    """
    build = locate(factory)
    if not callable(build):
        raise TypeError(f"{factory} is a {type(build).__name__}: name a function or class that builds a network.")
    if not builds_module(build):
        raise TypeError(
            f"{factory} is neither a torch.nn.Module class nor annotated as returning one, and was not called. "
            "Annotate it with `-> nn.Module`, or name a function of your own that is annotated and calls it."
        )
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    model = build(**kwargs)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{factory} must return a torch.nn.Module, got a value of type {type(model).__name__}. "
            "Name the function or class that builds the network itself."
        )
    return model


def locate(path: str) -> Any:
    """Return the object at a dotted path: the attributes that follow its longest importable prefix.

    Importing a module runs its top-level code, so the standard library, which builds no network, is not imported.

    Raises:
        ImportError: If the path leads nowhere; the message names close matches.
        TypeError: If the path leads into the standard library.
        ValueError: If ``path`` is not a dotted path.
    """
    names = path.split(".")
    if len(names) < 2 or not all(name.isidentifier() for name in names):
        raise ValueError(
            f"factory must be a dotted path such as 'torchvision.models.resnet18', got {path!r}. "
            "Put the module's name in front of the function's."
        )
    if names[0] in sys.stdlib_module_names:
        raise TypeError(
            f"{path} is of Python's standard library, which builds no network, and was not looked up. Name a "
            "torch.nn.Module class, or a function that is annotated as returning one."
        )
    found, attributes = _import_prefix(names)
    for name in attributes:
        if not hasattr(found, name):
            owner = getattr(found, "__name__", type(found).__name__)
            close = get_close_matches(name, dir(found), n=3)
            hint = f" Close matches: {', '.join(close)}." if close else ""
            raise ImportError(f"Looked for {path}: {owner} has no {name!r}.{hint}")
        found = getattr(found, name)
    return found


def _import_prefix(names: list[str]) -> tuple[Any, list[str]]:
    module = None
    for length in range(1, len(names) + 1):
        name = ".".join(names[:length])
        try:
            module = import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:  # because the module exists and one of its own imports does not
                raise
            if module is None:
                raise ImportError(
                    f"Looked for {'.'.join(names)}: there is no module {name!r} in this environment. "
                    "Install its package, correct the spelling, or start where its file is."
                ) from error
            return module, names[length - 1 :]
    return module, []


def builds_module(found: object) -> bool:
    """Return True for a ``torch.nn.Module`` class, and for a callable whose return is annotated as one.

    Example:
        >>> builds_module(nn.Linear), builds_module(print)
        (True, False)
    """
    while isinstance(found, functools.partial):
        found = found.func
    if isinstance(found, type):
        return issubclass(found, nn.Module)
    if not callable(found):
        return False
    function: Any = found if inspect.isroutine(found) else type(found).__call__
    returned = getattr(function, "__annotations__", {}).get("return")
    if isinstance(returned, str):
        returned = _evaluate(returned, getattr(inspect.unwrap(function), "__globals__", {}))
    return isinstance(returned, type) and issubclass(returned, nn.Module)


def _evaluate(annotation: str, names: dict[str, Any]) -> Any:
    """Return the type of an annotation; None if its names are unknown at run time, as under ``TYPE_CHECKING``."""

    def returns() -> None: ...

    returns.__annotations__ = {"return": annotation}
    try:
        return get_type_hints(returns, names)["return"]
    except (NameError, AttributeError, TypeError, SyntaxError):
        return None
