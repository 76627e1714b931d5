"""The entry point of ``kd-lightning fit|validate|test|predict|export|sweep|…``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_lightning.cli.quick import answer
from kd_lightning.configuration.written import CommandLineError

if TYPE_CHECKING:
    from lightning.pytorch.cli import ArgsType


def main(args: ArgsType = None) -> None:
    """Run the command ``kd-lightning``.

    A mistake is told in one paragraph on stderr, with the exit status 2; the option ``--traceback`` shows where it was
    raised. Called with ``args``, errors beyond the command line itself are raised.

    Args:
        args: Command line arguments. None: those of the process.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it: class_path: mine.Policy
    given = sys.argv[1:] if args is None else args
    if not isinstance(given, list):
        _run(given)
        return
    try:
        _run([arg for arg in given if arg != "--traceback"])
    except Exception as error:
        from kd_lightning.cli.errors import is_drawing, paragraph  # torch, which help and init do without

        known = args is None or isinstance(error, CommandLineError)
        text = paragraph(error, given) if known else None
        if text is None or "--traceback" in given:
            raise
        print("\n" * is_drawing(error) + f"error: {text}", file=sys.stderr)
        sys.exit(2)


def _run(args: Any) -> None:
    if isinstance(args, list) and answer(args):
        return
    # imported here because Lightning takes seconds
    from kd_lightning.cli.commands import COMMANDS
    from kd_lightning.configuration.parser import KDLightningCLI, SaveRunConfig

    KDLightningCLI(
        commands=COMMANDS,
        save_config_callback=SaveRunConfig,
        save_config_kwargs={"overwrite": False, "config_filename": "run_config.yaml"},
        seed_everything_default=42,
        auto_configure_optimizers=False,
        args=args,
    )
