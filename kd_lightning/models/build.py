"""Building a network from the dotted path of a function or class."""

from typing import Any

from torch import nn

from kd_lightning.models.named import builds_module, locate


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
