"""The parts of a batch that a temperature reads, and that the networks never see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def take_extra(batch: Any, keys: Sequence[str | int]) -> tuple[Any, dict[Any, Any]]:
    """Return a batch without the parts that a temperature reads, and these parts by their keys.

    A batch that is neither mapping nor tuple has no parts; one that is missing is left to the policy to report.

    Example:
        >>> take_extra({"x": 1, "y": 2, "source": "web"}, ["source"])
        ({'x': 1, 'y': 2}, {'source': 'web'})
        >>> take_extra((1, 2, "web"), [2])
        ((1, 2), {2: 'web'})
    """
    if not keys:
        return batch, {}
    if isinstance(batch, Mapping):
        extra = {key: batch[key] for key in keys if key in batch}
        return ({key: part for key, part in batch.items() if key not in extra} if extra else batch), extra
    if isinstance(batch, (tuple, list)):
        parts = dict(enumerate(batch))
        extra = {key: parts.pop(key) for key in keys if isinstance(key, int) and key in parts}
        return (tuple(parts.values()) if extra else batch), extra
    return batch, {}
