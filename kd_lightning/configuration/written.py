"""The settings as a user wrote them: configuration files and options, merged, each with its place."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

Key = tuple[str | int, ...]

_CONFIG = ("-c", "--config")
_YAML_HINTS = {
    "'\\t'": " Indent with spaces: YAML takes no tabs.",
    "mapping values are not allowed": " Indent the keys of a mapping alike, and put a space after each colon, also in "
    "the line before.",
    "did not find expected key": " Indent the keys of a mapping alike.",
    "block end": " Indent the entries of a mapping or list alike.",
}


class CommandLineError(ValueError):
    """A mistake on the command line or in a configuration; its text is one paragraph."""


def dotted(key: Key) -> str:
    """Return a key as it is spelled in messages, such as ``trainer.callbacks[0].init_args.monitor``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).lstrip(".")


def guess(name: str, known: Iterable[str]) -> str:
    """Return a sentence that proposes the most similar known name, with a space before it; empty if none is similar."""
    lower = {candidate.lower(): candidate for candidate in known}
    word = name.lower().replace("-", "_")
    begun = [candidate for candidate in lower if len(word) > 3 and candidate.startswith(word)]
    close = difflib.get_close_matches(word, lower, n=1, cutoff=0.6) or begun
    return f" Did you mean {lower[close[0]]}?" if close else ""


def setting_at(tree: Any, key: Key, default: Any = None) -> Any:
    """Return the setting under a key of nested mappings and lists, or the default."""
    for part in key:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return default
    return tree


class Written:
    """The command, its settings in one tree, and the file and line or the option that each setting comes from.

    Attributes:
        command: The command; None if there is none. A configuration before it is not read here.
        tree: The merged settings. Options stand where the YAML would have them, under ``init_args`` of a class.
        files: The configuration files, in the order in which they are read.
        helps: The options ``--KEY.help``, each with its key and the class that was named, or None.
        mistakes: Texts on arguments that set nothing: before the command, of no option, without a value, or below a
            setting that is a plain value.
    """

    def __init__(self, args: list[str]) -> None:
        before = ["", *args]
        named = [arg for last, arg in zip(before, args, strict=False) if arg[:1] != "-" and last not in _CONFIG]
        self.command = named[0] if named else None
        self.tree: dict[str, Any] = {}
        self.files: list[Path] = []
        self.helps: list[tuple[str, Key, str | None]] = []
        self.mistakes: list[str] = []
        self._places: dict[Key, str] = {}
        start = 0 if self.command is None else args.index(self.command)
        early, rest = " ".join(args[:start]), args[start + (self.command is not None) :]
        if early:
            text = f"{early} stands before the command, where nothing is read."
            self.mistakes.append(f"{text} Write kd-lightning {self.command} {early}.")
        while rest:
            option, equals, value = rest.pop(0).partition("=")
            values = [value] if equals else []
            while not equals and rest and not rest[0].startswith("--") and (option.startswith("-") or not values):
                values.append(rest.pop(0))
            if option in _CONFIG:
                if values == [""]:
                    raise CommandLineError("--config takes a file, as in --config digits.yaml, and got an empty name.")
                self._refuse(*values[1:])
                self._read(Path(values[0])) if values else None
            elif option.endswith(".help"):
                self.helps.append((option, tuple(option[2:-5].split(".")), values[0] if values else None))
            elif option.startswith("--") and values:
                if values == [""]:
                    self.mistakes.append(f"{option}: its value is missing. Write {option}=VALUE, or =null for none.")
                self._set(option, _load(values[0]) if len(values) == 1 else [_load(value) for value in values])
            elif not option.startswith("--"):
                self._refuse(option + equals + value)

    def _refuse(self, *arguments: str) -> None:
        """Record arguments that belong to no option."""
        for argument in arguments:
            close = " Did you mean --config?" if re.fullmatch("-{0,2}con?fi?g", argument) else ""
            self.mistakes.append(f"{argument!r} belongs to no option.{close} Write --config FILE or --key=value.")

    def place(self, key: Key) -> str:
        """Return the place of a setting: the option, or the dotted key with file and line."""
        for length in range(len(key), 0, -1):
            place = self._places.get(key[:length], "")
            if place.startswith("-"):
                return place
            if place:
                return f"{dotted(key)} ({place})"
        return dotted(key)

    def at(self, key: Key) -> Any:
        """Return the setting under a key; None if it was not written."""
        return setting_at(self.tree, key)

    def classes(self, value: Any = None, key: Key = ()) -> Iterable[tuple[Key, str]]:
        """Yield the key and the class path of each class that was written, those within others last."""
        value = self.tree if value is None and not key else value
        if isinstance(value, dict) and isinstance(value.get("class_path"), str):
            yield key, value["class_path"]
        if isinstance(value, str) and value.isidentifier() and key:
            yield key, value
        for name, part in _parts(value):
            if name != "class_path":
                yield from self.classes(part, (*key, name))

    def class_key(self, name: str) -> Key | None:
        """Return the key of the only class of this name that was written; None if there are none or several."""
        keys = [key for key, path in self.classes() if path.rpartition(".")[2] == name]
        return keys[0] if len(keys) == 1 else None

    def empty(self, value: Any = None, key: Key = ()) -> Iterable[Key]:
        """Yield the key of each setting that is an empty mapping, which a parser ignores if it does not know it."""
        value = self.tree if value is None and not key else value
        for name, part in _parts(value):
            if part == {} and name != "init_args":  # a class without arguments has none in the parsed settings
                yield (*key, name)
            yield from self.empty(part, (*key, name))

    def _read(self, path: Path) -> None:
        if not path.is_file():
            folder = path if path.is_dir() else path.parent
            names = sorted(str(other) for other in folder.glob("*.y*ml") if other.is_file())
            if path.is_dir():
                held = f" It holds {', '.join(names)}." if names else ""
                raise CommandLineError(f"{str(path)!r} is a folder, and --config takes a file.{held}")
            text = f"there is no configuration at {str(path)!r} (from the folder {str(Path.cwd())!r})."
            raise CommandLineError(text + guess(str(path), names))
        try:
            loader = yaml.SafeLoader(path.read_text())
            node = loader.get_single_node()
            content = {} if node is None else loader.construct_document(node)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            line = "" if mark is None else f":{mark.line + 1}"
            problem = str(getattr(error, "problem", None) or error)
            hint = next((text for part, text in _YAML_HINTS.items() if part in problem), "")
            raise CommandLineError(f"{path}{line} is not readable as YAML: {problem}.{hint}") from error
        if not isinstance(content, dict):
            raise CommandLineError(
                f"{path} must be a mapping with keys such as trainer, model and data, got a {type(content).__name__}."
            )
        self.files.append(path)
        _merge(self.tree, content)
        if node is not None:
            self._mark(node, (), str(path))

    def _mark(self, node: yaml.Node, key: Key, file: str) -> None:
        """Record the place of each setting, and raise if a mapping has a key twice, of which YAML takes the last."""
        pairs: list[tuple[str | int, yaml.Node, yaml.Node]] = []
        if isinstance(node, yaml.MappingNode):
            pairs = [(name.value, name, value) for name, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            pairs = [(index, value, value) for index, value in enumerate(node.value)]
        lines: dict[str | int, int] = {}
        for name, start, value in pairs:
            line = start.start_mark.line + 1
            if name in lines and name != "<<":
                raise CommandLineError(
                    f"{file} has {dotted((*key, name))} twice, in lines {lines[name]} and {line}. Keep one of them."
                )
            lines[name] = line
            self._places[(*key, name)] = f"{file}:{line}"
            self._mark(value, (*key, name), file)

    def _set(self, option: str, value: Any) -> None:
        parts = option[2:].rstrip("+").split(".")
        last = parts[-1]
        node: Any = self.tree
        key: Key = ()
        for index, part in enumerate(parts):
            if isinstance(node, list) and node:
                if isinstance(node[-1], str):
                    node[-1] = {"class_path": node[-1], "init_args": {}}
                node, key = node[-1], (*key, len(node) - 1)
            if not isinstance(node, dict):
                return
            if "class_path" in node and part not in ("class_path", "init_args", "dict_kwargs"):
                node, key = node.setdefault("init_args", {}), (*key, "init_args")
            key = (*key, part)
            if index < len(parts) - 1:
                child = node.get(part)
                if child is not None and not isinstance(child, (str, dict, list)):
                    self.mistakes.append(
                        f"{option}: {self.place(key)} is {child!r}, which has no {'.'.join(parts[index + 1 :])}. Name "
                        f"a class first, as in --{'.'.join(parts[: index + 1])}=CLASS."
                    )
                    return
                node[part] = {"class_path": child, "init_args": {}} if isinstance(child, str) else child or {}
                node = node[part]
        old = node.get(last)
        if option.endswith("+"):
            node[last] = [*old, value] if isinstance(old, list) else [value]
        elif isinstance(old, dict) and isinstance(value, dict):
            _merge(old, value)
        elif isinstance(old, dict) and isinstance(value, str) and "class_path" in old:
            node[last] = {"class_path": value, "init_args": {}}
        else:
            node[last] = value
        self._places = {other: place for other, place in self._places.items() if other[: len(key)] != key}
        self._places[key] = option


def _merge(target: dict[str, Any], source: dict[str, Any]) -> None:
    """Put settings over others; those of another class are dropped."""
    if "class_path" in source and source["class_path"] != target.get("class_path"):
        target.pop("init_args", None)
    for name, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(name), dict):
            _merge(target[name], value)
        else:
            target[name] = value


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    """Return the entries of a mapping or list by key or index; none of another value."""
    return value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()


def _load(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
