"""The command ``kd-lightning``: LightningCLI over this library's parts."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kd_lightning.cli.main import main

if TYPE_CHECKING:
    from kd_lightning.configuration.parser import Command, KDLightningCLI, SaveRunConfig

__all__ = ["Command", "KDLightningCLI", "SaveRunConfig", "main"]


def __getattr__(name: str) -> Any:
    if name not in ("Command", "KDLightningCLI", "SaveRunConfig"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("kd_lightning.configuration.parser"), name)
