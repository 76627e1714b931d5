"""Paragraphs for errors of torch, Lightning and the operating system that a user's settings cause."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

from torch import OutOfMemoryError

from kd_lightning.configuration.written import Key, Written, guess


@dataclass(frozen=True)
class _Foreign:
    """An error of another package, by its type's name and a pattern of its text, and the paragraph in its place.

    Attributes:
        types: Names of the error's classes, its bases included.
        pattern: Searched for in the text, whose lines are joined.
        text: Makes the paragraph of the match.
        key: Makes the key of the setting, of the match and of what was written; None if there is none.
    """

    types: tuple[str, ...]
    pattern: str
    text: Callable[[re.Match[str]], str]
    key: Callable[[re.Match[str], Written], Key | None] = lambda match, written: None


def explain(error: Exception, text: str, frames: Sequence[FrameType], written: Written) -> str | None:
    """Return a paragraph about an error of another package; None if it is not known here.

    Args:
        error: The error.
        text: Its text in one line.
        frames: The frames of its traceback, the innermost last.
        written: The settings as the user wrote them.
    """
    names = {cls.__name__ for cls in type(error).__mro__}
    for foreign in _FOREIGN:
        match = re.search(foreign.pattern, text)
        if match is not None and names.intersection(foreign.types):
            key = foreign.key(match, written)
            return (f"{written.place(key)}: " if key else "") + foreign.text(match)
    for frame in frames if "RuntimeError" in names and "CUDA" not in text else ():
        if frame.f_code.co_name == "call_model" and "args" in frame.f_locals:
            network = type(frame.f_locals["module"]).__name__
            shapes = [str(tuple(value.shape)) for value in frame.f_locals["args"] if hasattr(value, "shape")]
            return _at(network, written) + (
                f"{network} cannot take inputs of shape {', '.join(shapes) or 'this batch'}: {text} Give a network for "
                "such data, or data of the shape that the network takes."
            )
    owner = type(frames[-1].f_locals.get("self"))
    if owner.__module__.startswith("torch.optim") and not isinstance(error, (ValueError, TypeError)):
        return f"{_at(owner.__name__, written)}{owner.__name__} fails with these arguments: {text} Correct init_args."
    return None


def _at(name: str, written: Written) -> str:
    key = written.class_key(name)
    return f"{written.place(key)}: " if key else ""


def _monitor_key(match: re.Match[str], written: Written) -> Key | None:
    for key, _ in written.classes():
        for inner in ((*key, "init_args", "monitor"), (*key, "monitor")):
            if written.at(inner) == match[1]:
                return inner
    return None


def _no_metric(match: re.Match[str]) -> str:
    names = [name for name in re.findall(r"[\w/-]+(?:\.\w+)*", match[2]) if name not in ("epoch", "step")]
    return f"no metric has the name {match[1]!r}.{guess(match[1], names)} This run logs {', '.join(sorted(names))}."


def _os_error(match: re.Match[str]) -> str:
    return f"the operating system refuses: {match[0].rstrip('.')}. Correct the path, or its permissions and space."


def _not_joined(match: re.Match[str]) -> str:
    return (
        f"the samples of a batch cannot be joined: {match[0].rstrip('.')}. Make them tensors of one shape, by a "
        "transform of the dataset, or give the DataLoader a collate_fn."
    )


_CONFIG = ("MisconfigurationException",)
_UNITS = ("days", "hours", "minutes", "seconds", "weeks")
_FOREIGN = [
    _Foreign(("RuntimeError",), r"Early stopping conditioned on metric `(.*?)` .*? following: (.*)", _no_metric,
             _monitor_key),
    _Foreign(_CONFIG, r"ModelCheckpoint\(monitor='(.*?)'\)` could not find .*? metrics: \[(.*?)\]", _no_metric,
             _monitor_key),
    _Foreign(_CONFIG, r"ReduceLROnPlateau conditioned on metric (\S+) which .*? are: \[(.*?)\]", _no_metric,
             _monitor_key),
    _Foreign(_CONFIG, r"No supported gpu backend found", lambda match: "torch finds no GPU that it can use. Leave the "
             "accelerator out to take what there is, or set it to cpu.",
             lambda match, written: ("trainer", "accelerator")),
    _Foreign(("ValueError", "RuntimeError"), r"strategy `(fsdp)` requires a GPU|(DeepSpeed) strategy is only supported",
             lambda match: f"Lightning's {match[1] or match[2]} strategy needs a GPU. Without one, shard the student "
             "with lightning.pytorch.strategies.ModelParallelStrategy and kd_lightning.ShardedDistillationModule, or "
             "take ddp.", lambda match, written: ("trainer", "strategy")),
    _Foreign(("ValueError",), r"(\S+) is not in bounds, numpy accepts from 0 to (\d+)", lambda match: f"must be "
             f"between 0 and {match[2]}, got {match[1]}.", lambda match, written: ("seed_everything",)),
    _Foreign((OutOfMemoryError.__name__,), r"[^.]*\. .*?\. ", lambda match: f"the device is out of memory: "
             f"{match[0].strip()} Take a smaller data.batch_size, with trainer.accumulate_grad_batches for the same "
             "step, or trainer.precision bf16-mixed."),
    _Foreign(("URLError",), r".+", lambda match: f"a download failed: {match[0]} Give a file that is there already, or "
             "try again with a network."),
    _Foreign(("RuntimeError",), r"more than one stateful callback of type `(\w+)`",
             lambda match: f"{match[1]} stands more than once among the callbacks, with the same settings. Keep one of "
             "them.", lambda match, written: ("trainer", "callbacks")),
    _Foreign(("TypeError",), r"'(\w+)' is an invalid keyword argument for __new__",
             lambda match: f"max_time has no unit {match[1]!r}.{guess(match[1], _UNITS)} It has {', '.join(_UNITS)}.",
             lambda match, written: ("trainer", "max_time")),
    _Foreign(_CONFIG, r"`Timer\(duration=(.*)\)` is not a valid", lambda match: f"must be DD:HH:MM:SS, such as "
             f"00:00:05:00 for five minutes, or a mapping such as minutes: 5, got {match[1]}.",
             lambda match, written: ("trainer", "max_time")),
    _Foreign(("RuntimeError", "TypeError"), r"stack expects each tensor to be equal size.*|default_collate: batch .*|"
             "each element in list of batch should be of equal size", _not_joined,
             lambda match, written: ("data",) if written.at(("data",)) else None),
    _Foreign(("AttributeError",), r"'(\w+)' object has no attribute '(allow_zero_length|prepare_data_per_node)",
             lambda match: f"{match[1]}.__init__ does not call super().__init__(). Call it first.",
             lambda match, written: written.class_key(match[1])),
    _Foreign(("TypeError",), r"^(\w+)\.(\w+)\(\) got an unexpected keyword argument 'stage'",
             lambda match: f"the trainer calls {match[1]}.{match[2]} with stage=\"fit\", \"validate\", \"test\" or "
             f"\"predict\". Write def {match[2]}(self, stage).", lambda match, written: written.class_key(match[1])),
    _Foreign(("OSError",), r".+", _os_error),
]  # fmt: skip
"""The first match decides. The operating system's errors come last: this library raises FileNotFoundError too."""
