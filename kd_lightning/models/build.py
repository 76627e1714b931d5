"""A network by the dotted path of the function or class that builds it."""

from difflib import get_close_matches
from importlib import import_module
from typing import Any

from torch import nn


def build_model(factory: str, num_classes: int | None = None, **kwargs: Any) -> nn.Module:
    """Builds a network with a function or class of any library, named by its dotted path.

    LightningCLI takes a function as ``class_path`` only if its return is annotated with a module class, which
    ``timm.create_model`` and many others lack. This one has the annotation and passes everything on. In YAML, what
    the factory takes beyond ``num_classes`` goes to ``dict_kwargs``::

        student:
          class_path: kd_lightning.models.build_model
          init_args: {factory: timm.create_model, num_classes: 100}
          dict_kwargs: {model_name: resnet18}

    Args:
        factory: dotted path of a function or class, such as ``torchvision.models.resnet18``.
        num_classes: number of logits, handed to the factory only if given.
        **kwargs: all other arguments of the factory.

    Returns:
        The network, as the factory made it.

    Raises:
        ImportError: where nothing has that path; close matches are named.
        TypeError: if what has that path cannot be called, or returns something other than a ``torch.nn.Module``.
        ValueError: if ``factory`` is not a dotted path.

    Example:
        >>> model = build_model("torchvision.models.resnet18", num_classes=7)
        >>> model.fc.out_features
        7
    """
    build = _locate(factory)
    if not callable(build):
        raise TypeError(f"{factory} is a {type(build).__name__}: name a function or class that builds a network.")
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    model = build(**kwargs)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{factory} must return a torch.nn.Module, got a value of type {type(model).__name__}. "
            "Name the function or class that builds the network itself."
        )
    return model


def _locate(path: str) -> Any:
    """The object of a dotted path: the longest importable prefix, then its attributes."""
    names = path.split(".")
    if len(names) < 2 or not all(name.isidentifier() for name in names):
        raise ValueError(
            f"factory must be a dotted path such as 'torchvision.models.resnet18', got {path!r}. "
            "Put the module's name in front of the function's."
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
            if error.name != name:  # the module is there, something that it imports is not
                raise
            if module is None:
                raise ImportError(
                    f"Looked for {'.'.join(names)}: there is no module {name!r} in this environment. "
                    "Install its package or correct the spelling."
                ) from error
            return module, names[length - 1 :]
    return module, []
