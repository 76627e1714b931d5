"""The command ``kd-lightning``: LightningCLI over this library's parts."""

from kd_lightning.cli.main import main
from kd_lightning.cli.parser import Command, KDLightningCLI, SaveRunConfig

__all__ = ["Command", "KDLightningCLI", "SaveRunConfig", "main"]
