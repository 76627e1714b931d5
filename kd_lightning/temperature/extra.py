"""The parts of a batch that a temperature reads, and that the networks never see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def take_extra(batch: Any, keys: Sequence[str | int]) -> tuple[Any, dict[Any, Any]]:
    """Split off the parts of a batch that a temperature reads.

    Args:
        batch: A mapping or a tuple; a batch of another kind has no parts.
        keys: Keys of the mapping, or positions in the tuple. One that the batch lacks is left to the policy to report.

    Returns:
        The batch without these parts, and the parts by their keys.

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
