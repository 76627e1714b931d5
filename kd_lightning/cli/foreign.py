"""Paragraphs for errors of torch, Lightning and the operating system that a user's settings cause."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NamedTuple

from kd_lightning.configuration.written import Key, Written, guess


class _Foreign(NamedTuple):
    """An error of another package, by its type's name and a pattern of its text, and the paragraph in its place.

    Attributes:
        types: Names of the error's classes, its bases included.
        pattern: Searched for in the text, whose lines are joined.
        text: The paragraph, in which {0} is the match and {1}, {2} are its groups that took part, without a full stop
            at their end; or a function that makes it of these.
        key: The key of the setting, or a function that makes it of the first group; None if there is none.
    """

    types: tuple[str, ...]
    pattern: str
    text: str | Callable[..., str]
    key: Key | Callable[[Written, str], Key | None] | None = None


def explain(error: Exception, text: str, frames: Sequence[FrameType], written: Written) -> str | None:
    """Return a paragraph about an error of another package; None if it is not known here."""
    names = {cls.__name__ for cls in type(error).__mro__}
    for foreign in _FOREIGN:
        match = re.search(foreign.pattern, text)
        if match is not None and names.intersection(foreign.types):
            parts = [part.rstrip(". ") for part in (match[0], *match.groups()) if part is not None]
            key = foreign.key(written, parts[1]) if callable(foreign.key) else foreign.key
            told = foreign.text(*parts) if callable(foreign.text) else foreign.text.format(*parts)
            return f"{written.place(key)}: {told}" if key else told
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


def _monitor_key(written: Written, monitor: str) -> Key | None:
    for key, _ in written.classes():
        for inner in ((*key, "init_args", "monitor"), (*key, "monitor")):
            if written.at(inner) == monitor:
                return inner
    return None


def _no_metric(_: str, monitor: str, logged: str) -> str:
    names = [name for name in re.findall(r"[\w/-]+(?:\.\w+)*", logged) if name not in ("epoch", "step")]
    return f"no metric has the name {monitor!r}.{guess(monitor, names)} This run logs {', '.join(sorted(names))}."


def _no_unit(_: str, unit: str) -> str:
    units = ("days", "hours", "minutes", "seconds", "weeks")
    return f"max_time has no unit {unit!r}.{guess(unit, units)} It has {', '.join(units)}."


def _data_key(written: Written, _: str) -> Key | None:
    return ("data",) if written.at(("data",)) else None


_CONFIG = ("MisconfigurationException",)
_FOREIGN = [
    _Foreign(("RuntimeError",), r"Early stopping conditioned on metric `(.*?)` .*? following: (.*)", _no_metric,
             _monitor_key),
    _Foreign(_CONFIG, r"ModelCheckpoint\(monitor='(.*?)'\)` could not find .*? metrics: \[(.*?)\]", _no_metric,
             _monitor_key),
    _Foreign(_CONFIG, r"ReduceLROnPlateau conditioned on metric (\S+) which .*? are: \[(.*?)\]", _no_metric,
             _monitor_key),
    _Foreign(_CONFIG, r"No supported gpu backend found", "torch finds no GPU that it can use. Leave the accelerator "
             "out to take what there is, or set it to cpu.", ("trainer", "accelerator")),
    _Foreign(("ValueError", "RuntimeError"), r"strategy `(fsdp)` requires a GPU|(DeepSpeed) strategy is only supported",
             "Lightning's {1} strategy needs a GPU. Without one, shard the student with "
             "lightning.pytorch.strategies.ModelParallelStrategy and kd_lightning.ShardedDistillationModule, or take "
             "ddp.", ("trainer", "strategy")),
    _Foreign(("ValueError",), r"(\S+) is not in bounds, numpy accepts from 0 to (\d+)",
             "must be between 0 and {2}, got {1}.", ("seed_everything",)),
    _Foreign(("OutOfMemoryError",), r"[^.]*\. .*?\. ", "the device is out of memory: {0}. Take a smaller "
             "data.batch_size, with trainer.accumulate_grad_batches for the same step, or trainer.precision "
             "bf16-mixed."),
    _Foreign(("URLError",), r".+", "a download failed: {0}. Give a file that is there already, or try again with a "
             "network."),
    _Foreign(("RuntimeError",), r"more than one stateful callback of type `(\w+)`", "{1} stands more than once among "
             "the callbacks, with the same settings. Keep one of them.", ("trainer", "callbacks")),
    _Foreign(("TypeError",), r"'(\w+)' is an invalid keyword argument for __new__", _no_unit, ("trainer", "max_time")),
    _Foreign(_CONFIG, r"`Timer\(duration=(.*)\)` is not a valid", "must be DD:HH:MM:SS, such as 00:00:05:00 for five "
             "minutes, or a mapping such as minutes: 5, got {1}.", ("trainer", "max_time")),
    _Foreign(("RuntimeError", "TypeError"), r"(stack expects each tensor to be equal size.*|default_collate: batch .*|"
             "each element in list of batch should be of equal size)", "the samples of a batch cannot be joined: {1}. "
             "Make them tensors of one shape, by a transform of the dataset, or give the DataLoader a collate_fn.",
             _data_key),
    _Foreign(("AttributeError",), r"'(\w+)' object has no attribute '(allow_zero_length|prepare_data_per_node)",
             "{1}.__init__ does not call super().__init__(). Call it first.", Written.class_key),
    _Foreign(("TypeError",), r"^(\w+)\.(\w+)\(\) got an unexpected keyword argument 'stage'", "the trainer calls "
             "{1}.{2} with stage=\"fit\", \"validate\", \"test\" or \"predict\". Write def {2}(self, stage).",
             Written.class_key),
    _Foreign(("OSError",), r".+", "the operating system refuses: {0}. Correct the path, or its permissions and space."),
]  # fmt: skip
"""The first match decides. The operating system's errors come last: this library raises FileNotFoundError too."""
