"""One row of the tables of bad input beside it; ``test_bad_input.py`` finds the tables and runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A user's mistake, the error that it raises, and the error's whole text."""

    name: str
    write: Callable[[], object]
    error: type[Exception]
    message: str
