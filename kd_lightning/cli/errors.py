"""Errors as messages to the user, one paragraph each, or with their traceback."""

from __future__ import annotations

import dis
import re
import sysconfig
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from kd_lightning.cli.foreign import explain
from kd_lightning.configuration.written import CommandLineError, Key, Written

_PACKAGE = str(Path(__file__).parents[1])
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_MESSAGES = {"ValueError", "TypeError", "FileNotFoundError", "MisconfigurationException", "ImportError"}
_MESSAGES |= {"ModuleNotFoundError"}
_YAML = {"True": "true", "False": "false", "None": "null"}


def paragraph(error: Exception, args: list[str]) -> str | None:
    """Return an error as one paragraph with its place in the settings; None if its traceback is needed.

    A message to the user is an error that a ``raise`` statement of this library raises, or one of an installed package
    that is raised for what it was given: a ValueError, TypeError, FileNotFoundError, ImportError or
    MisconfigurationException with no line of the user's own code between. :mod:`kd_lightning.cli.foreign` has the
    paragraphs for other errors that a user's settings cause in another package. Any other error that happens without
    ``raise``, and one that the user's own code raises, is a bug.
    """
    if isinstance(error, CommandLineError):
        return str(error)
    frames = list(traceback.walk_tb(error.__traceback__))
    ours = [index for index, (frame, _) in enumerate(frames) if frame.f_code.co_filename.startswith(_PACKAGE)]
    if not ours or isinstance(error, AssertionError):
        return None
    own = [(frame, line) for frame, line in frames[ours[0] :] if _of_user(frame)]
    calls, written, text = [frame for frame, _ in frames], Written(args), _sentence(error)
    foreign = ours[-1] < len(frames) - 1
    if (foreign or not _raises(error)) and not own and (told := explain(error, text, calls, written)) is not None:
        return told
    if not _raises(error) or (foreign and (own or type(error).__name__ not in _MESSAGES)):
        return None
    text = _as_settings(text, calls)
    if own:
        frame, line = own[-1]
        return f"{text} It was called from {Path(frame.f_code.co_filename).name}, line {line}."
    place = _place(error, calls, written, text)
    return (f"{place}: {text}" if place else text) + _first_step(text, written)


def is_drawing(error: Exception) -> bool:
    """Return True if a Trainer with a progress bar was running, in whose line the cursor stands."""
    trainers = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(getattr(trainer, "progress_bar_callback", None) is not None for trainer in trainers)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text.endswith((".", "!", "?")) else f"{text or type(error).__name__}."


def _as_settings(text: str, frames: list[FrameType]) -> str:
    """Return a message with arguments such as ``overwrite=True`` as options of the command, or as YAML has them."""
    commands = str(Path(__file__).with_name("commands.py"))
    codes = [frame.f_code for frame in frames if frame.f_code.co_filename == commands]
    options = {name for code in codes for name in code.co_varnames[: code.co_argcount]}

    def spell(match: re.Match[str]) -> str:
        before, name, value = text[: match.start()], match[1], _YAML[match[2]]
        if before.count("(") > before.count(")"):
            return match[0]  # an argument in a call, which is Python
        return f"--{name}={value}" if name in options else f"{name}: {value}"

    return re.sub(rf"\b(\w+)=({'|'.join(_YAML)})\b", spell, text)


def _first_step(text: str, written: Written) -> str:
    """Return a sentence that names the configuration that writes an absent teacher, with a space before it."""
    absent = re.match("there is no teacher checkpoint at '(.*?)'", text)
    for file in written.files if absent else ():
        for other in sorted(file.parent.glob("*.y*ml")):
            if other != file and absent is not None and _writes(other, Path(absent[1])):
                return f" kd-lightning fit --config {other} writes it, without fast_dev_run, which keeps no checkpoint."
    return ""


def _writes(configuration: Path, checkpoint: Path) -> bool:
    """Return True if a configuration has a ModelCheckpoint whose ``dirpath`` and ``filename`` are those of a file."""
    try:
        content: Any = yaml.safe_load(configuration.read_text(encoding="utf-8"))
        settings = [callback.get("init_args", {}) for callback in content["trainer"]["callbacks"]]
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, AttributeError):
        return False
    return any(Path(one.get("dirpath") or "") / f"{one.get('filename')}.ckpt" == checkpoint for one in settings)


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
    """Return the place of the class that raised the error, or of its argument that the text names."""
    key: Key | None = getattr(error, "key", None)
    if key is None:
        key = _class_key(frames, written, text)
    inner: Key = key or ("trainer",)
    if written.at((*inner, "init_args")) is not None:
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


def _class_key(frames: list[FrameType], written: Written, text: str) -> Key | None:
    """Return the key of the class that the text begins with, or else of the innermost one that was at work."""
    named_first = re.match(r"(\w+)(?:\.\w+)?(?::| returned| must)", text)
    if named_first is not None and (key := written.class_key(named_first[1])) is not None:
        return key  # a policy or loss whose value another class refuses
    for frame in reversed(frames):
        for name in ("self", "callback"):
            key = written.class_key(type(frame.f_locals.get(name)).__name__)
            if key is not None:
                return key
    return None


def _same(value: object, text: str) -> bool:
    """Return True if a message that received a text is about a value."""
    try:
        return not isinstance(value, (dict, list)) and float(str(value)) == float(text)
    except ValueError:
        return repr(value) == text
