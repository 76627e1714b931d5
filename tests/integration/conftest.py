"""The command line as a user meets it."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command as the console script does, and return its message on stderr when it ends with status 2."""
    from kd_lightning.cli import main

    def run(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["kd-lightning", *args])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        (paragraph,) = [line for line in lines if "error: " in line]
        assert lines[-1] == paragraph
        assert paragraph.startswith("error: ")  # at the beginning of a line, after a progress bar too
        return paragraph.removeprefix("error: ")

    return run
