"""The Distiller knows no kinds, and no file has grown past what one reads in a sitting."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import kd_lightning

ROOT = Path(kd_lightning.__file__).parent


@pytest.mark.parametrize("name", ["distiller", "distiller_parts", "output"])
def test_the_distiller_asks_no_teacher_loss_or_policy_for_its_kind(name: str) -> None:
    calls = [node for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())) if isinstance(node, ast.Call)]
    kinds = {ast.unparse(call.args[1]) for call in calls if ast.unparse(call.func) in ("isinstance", "issubclass")}
    assert kinds <= {"Tensor", "Temperature"}  # values


def test_files_have_a_size_that_can_be_read() -> None:
    lines = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
    assert {path: count for path, count in lines.items() if count > 450} == {}
    assert lines[Path("distiller.py")] <= 300
