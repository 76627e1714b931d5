"""The entry point of ``kd-lightning fit|validate|test|predict|export|sweep|…``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import ArgsType

from kd_lightning.cli.parser import KDLightningCLI, SaveRunConfig

__all__ = ["main"]


def main(args: ArgsType = None) -> None:
    """Run the command ``kd-lightning``.

    Args:
        args: Command line arguments. None: those of the process.
    """
    # imported here because the commands import the sweep, whose runs import this package for its parser
    from kd_lightning.cli.commands import COMMANDS

    options: dict[str, Any] = {"overwrite": False, "config_filename": "run_config.yaml"}
    KDLightningCLI(
        commands=COMMANDS,
        save_config_callback=SaveRunConfig,
        save_config_kwargs=options,
        seed_everything_default=42,
        auto_configure_optimizers=False,
        args=args,
    )
