"""Import of the core brings in torch and little else."""

from __future__ import annotations

import subprocess
import sys

import pytest

import kd_lightning

HEAVY = {"lightning", "torchvision", "torchmetrics", "matplotlib", "jsonargparse"}
ROOMS = ["functional", "temperature", "losses", "schedules", "teachers", "layers"]
STATEMENTS = [*(f"import kd_lightning.{room}" for room in ROOMS), "from kd_lightning import Distiller"]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)


@pytest.mark.slow
def test_the_core_imports_nothing_heavy() -> None:
    code = "; ".join([*STATEMENTS, "import sys", "print(*{name.split('.')[0] for name in sys.modules})"])
    assert not HEAVY & set(python("-c", code).stdout.split())


def test_every_public_name_is_found_on_first_use() -> None:
    assert set(kd_lightning.__all__) <= set(dir(kd_lightning))
    for name in kd_lightning.__all__:
        assert getattr(kd_lightning, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Distillator'"):
        _ = kd_lightning.Distillator  # pyright: ignore[reportAttributeAccessIssue]
