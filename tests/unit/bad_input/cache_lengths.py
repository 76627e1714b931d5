"""Batches that a cache of samples with lengths of their own cannot take."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_lightning.teachers import FunctionTeacher, TeacherCache
from tests.unit.bad_input.case import Case

FOLDER = Path(tempfile.mkdtemp())


def _ask(name: str, mask: Any = None, logits: Any = None, max_length: Any = 4) -> Tensor:
    cache = TeacherCache(FOLDER / f"{name}.cache", max_length=max_length)
    values = torch.zeros(2, 5, 3) if logits is None else logits
    teacher = FunctionTeacher(lambda **_: values, name="zeros", cache=cache)
    teacher.index([0, 1])
    inputs = {"x": torch.zeros(2)} if mask is None else {"x": torch.zeros(2), "attention_mask": mask}
    return teacher.logits(inputs, torch.arange(2))


def _mask(*lengths: int, of: int = 5) -> Tensor:
    return (torch.arange(of) < torch.tensor(lengths)[:, None]).long()


def _another_length() -> object:
    _ask("changed", _mask(2, 3))
    return _ask("changed", _mask(2, 4))


def _one_length() -> object:
    _ask("one", logits=torch.zeros(2, 7, 3), max_length=None)
    return _ask("one", logits=torch.zeros(2, 9, 3), max_length=None)


NAMES = "give the inputs by name, with 'attention_mask', or 'decoder_attention_mask' where a decoder has inputs of "
CASES = [
    Case(
        "no room",
        lambda: TeacherCache("a.cache", max_length=0),
        ValueError,
        "max_length is the length of the longest sample, 1 or more, got 0. None: all samples have one length.",
    ),
    Case(
        "no mask",
        lambda: _ask("none"),
        ValueError,
        f"a TeacherCache with max_length=4 needs the padding mask (B, L) of each batch, got none: {NAMES}its own.",
    ),
    Case(
        "a mask of pairs",
        lambda: _ask("pairs", torch.ones(2, 5, 5)),
        ValueError,
        "a TeacherCache with max_length=4 needs the padding mask (B, L) of each batch, got one of shape (2, 5, 5): "
        f"{NAMES}its own.",
    ),
    Case(
        "no positions",
        lambda: _ask("classes", _mask(2, 3), torch.zeros(2, 3)),
        ValueError,
        "max_length is for tokens (B, L, V) with a padding mask (B, L), got logits for (2,) and a mask (2, 5). Leave "
        "max_length out where all samples have one length.",
    ),
    Case(
        "too long",
        lambda: _ask("long", _mask(2, 5)),
        ValueError,
        "a sample has 5 positions, and a row of the cache has room for 4: TeacherCache(..., max_length=5), or cut the "
        "samples.",
    ),
    Case(
        "another length than it had",
        _another_length,
        ValueError,
        "a sample of the cache has another number of positions than its padding mask, 3 in the cache and 4 now. Was "
        "the tokenizer or the collate function changed? Delete the file.",
    ),
    Case(
        "changing length without room for it",
        _one_length,
        ValueError,
        f"the cache {FOLDER}/one.cache has rows of shape (7, 3), but the teacher gives (9, 3). Delete the file to "
        "build it anew; batches padded to their longest sample need TeacherCache(..., max_length=...).",
    ),
]
