"""``kd-lightning init``: a project that runs, from templates that come with the library."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from kd_lightning.configuration.written import CommandLineError, guess

KINDS = ("digits", "cifar", "text", "drop-in")
_FILES = ("README.md", "teacher.yaml", "student.yaml", "mine.py")


def write_project(args: list[str]) -> Path:
    """Write a project and return its folder.

    Args:
        args: The folder; before it, if it is not ``digits``, the kind of project.
    """
    if len(args) not in (1, 2) or args in [[kind] for kind in KINDS] or any(arg.startswith("-") for arg in args):
        raise CommandLineError(
            f"init takes a folder: kd-lightning init [{'|'.join(KINDS)}] DIR, got {' '.join(args)!r}."
        )
    kind = args[0] if len(args) == 2 else "digits"
    if kind not in KINDS:
        raise CommandLineError(f"there is no template {kind!r}.{guess(kind, KINDS)} There are {', '.join(KINDS)}.")
    folder = Path(args[-1])
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CommandLineError(f"init writes to a new or an empty folder, and {str(folder)!r} is not empty.")
    folder.mkdir(parents=True, exist_ok=True)
    with as_file(files("kd_lightning.cli") / "templates") as templates:
        for name in _FILES:
            own = templates / kind.replace("-", "_") / name
            (folder / name).write_bytes((own if own.exists() else templates / name).read_bytes())
    return folder
