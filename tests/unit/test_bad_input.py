"""Bad input is an error that states the rule, the value received and the way out; the tables are in ``bad_input/``."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.unit.bad_input.case import Case

ROOMS = sorted(path.stem for path in (Path(__file__).parent / "bad_input").glob("*.py") if path.stem != "case")
CASES = [
    pytest.param(case, id=f"{room}: {case.name}")
    for room in ROOMS
    for case in importlib.import_module(f"tests.unit.bad_input.{room}").CASES
]


@pytest.mark.parametrize("case", CASES)
def test_message_is_whole(case: Case) -> None:
    with pytest.raises(case.error) as raised:
        case.write()
    assert type(raised.value) is case.error
    assert str(raised.value) == case.message


def test_messages_are_one_paragraph() -> None:
    messages = [case.values[0].message for case in CASES]  # pyright: ignore[reportAttributeAccessIssue]
    assert [message for message in messages if "\n" in message or message[-1] not in ".)"] == []
