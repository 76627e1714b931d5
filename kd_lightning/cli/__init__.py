"""The command ``kd-lightning``: LightningCLI over this library's parts."""

from kd_lightning.cli.main import CommandTrainer, KDLightningCLI, SaveRunConfig, main

__all__ = ["CommandTrainer", "KDLightningCLI", "SaveRunConfig", "main"]
