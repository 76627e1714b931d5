"""The commands that need neither torch nor Lightning, whose imports take seconds: version, help, init and card."""

from __future__ import annotations

from kd_lightning import __version__
from kd_lightning.cli.help import HELP, describe_command, describe_commands
from kd_lightning.cli.project import write_project


def answer(args: list[str]) -> bool:
    """Answer the command line if it is one of these commands, and return True if it was."""
    first = args[0] if args else ""
    asks_for_help = not {"-h", "--help"}.isdisjoint(args)
    if first == "--version":
        print(f"kd-lightning {__version__}")
    elif first in ("-h", "--help"):
        print(describe_commands())
    elif first in HELP and asks_for_help:
        print(describe_command(first))
    elif first == "init":
        folder = write_project(args[1:])
        print((folder / "README.md").read_text(encoding="utf-8"), end="")
        print(f"\nThe project is in {folder}: cd {folder}")
    elif first == "card":
        from kd_lightning.card import card_of

        print(card_of(args[1:]))
    else:
        return False
    return True
