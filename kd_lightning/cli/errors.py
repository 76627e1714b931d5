"""Which errors are messages to the user, told in one paragraph, and which keep their traceback."""

from __future__ import annotations

import dis
import re
import sysconfig
import traceback
from pathlib import Path
from types import FrameType

from kd_lightning.configuration.written import CommandLineError, Key, Written

__all__ = ["paragraph"]

_PACKAGE = str(Path(__file__).parents[1])
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_MESSAGES = ("ValueError", "TypeError", "FileNotFoundError", "MisconfigurationException")


def paragraph(error: Exception, args: list[str]) -> str | None:
    """Return an error as one paragraph with its place in the settings; None if its traceback is needed.

    A message to the user is an error that a ``raise`` statement of this library raises, or one of an installed package
    that is raised for what it was given: a ValueError, TypeError, FileNotFoundError or MisconfigurationException with
    no line of the user's own code between. An error that happens without ``raise``, and one that the user's own code
    raises, is a bug.

    Args:
        error: The error.
        args: The command line.
    """
    if isinstance(error, CommandLineError):
        return str(error)
    frames = list(traceback.walk_tb(error.__traceback__))
    ours = [index for index, (frame, _) in enumerate(frames) if frame.f_code.co_filename.startswith(_PACKAGE)]
    if not ours or isinstance(error, AssertionError) or not _raises(error):
        return None
    own = [(frame, line) for frame, line in frames[ours[0] :] if _of_user(frame)]
    if ours[-1] < len(frames) - 1 and (own or type(error).__name__ not in _MESSAGES):
        return None
    text = " ".join(str(error).split())
    text += "" if text.endswith((".", "!", "?")) else "."
    if own:
        frame, line = own[-1]
        return f"{text} It was called from {Path(frame.f_code.co_filename).name}, line {line}."
    place = _place(error, [frame for frame, _ in frames], Written(args), text)
    return f"{place}: {text}" if place else text


def _raises(error: Exception) -> bool:
    """Return True if the error comes from a ``raise`` statement in Python."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def _of_user(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return not file.startswith((_PACKAGE, "<", *_INSTALLED)) and "site-packages" not in file


def _place(error: Exception, frames: list[FrameType], written: Written, text: str) -> str:
    """Return where the class that raised the error, or its argument that the text is about, was written."""
    key: Key | None = getattr(error, "key", None)
    classes = list(written.classes())
    for frame in reversed(frames if key is None else []):
        name = type(frame.f_locals.get("self")).__name__
        keys = [where for where, path in classes if path.rpartition(".")[2] == name]
        if len(keys) == 1:
            key = keys[0]
            break
    found = written.at(("trainer",) if key is None else key)
    inner: Key = key or ("trainer",)
    if isinstance(found, dict) and "init_args" in found:
        inner = (*inner, "init_args")
    arguments = written.at(inner)
    if isinstance(arguments, dict):
        words = re.findall(r"\w+", text)
        received = re.search(r"got (\S+?)[.,;]?(?: |$)", text)
        same = [] if received is None else [name for name, value in arguments.items() if _same(value, received[1])]
        named = [word for word in words[: 3 if key is not None else None] if word in arguments]
        if named or len(same) == 1:
            return written.place((*inner, (named or same)[0]))
    return "" if key is None else written.place(key)


def _same(value: object, text: str) -> bool:
    """Return True if a message that received a text is about a value."""
    try:
        return not isinstance(value, (dict, list)) and float(str(value)) == float(text)
    except ValueError:
        return repr(value) == text
