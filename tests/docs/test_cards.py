"""The pages of the policies: each has an example that Python and YAML build alike, and a row of the table."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from kd_lightning import temperature
from kd_lightning.temperature import TemperaturePolicy

DOCS = Path(__file__).parents[2] / "docs"


def load_cards() -> Any:
    spec = importlib.util.spec_from_file_location("cards", DOCS / "cards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cards = load_cards()
EXPORTED = [getattr(temperature, name) for name in temperature.__all__]
POLICIES = [kind for kind in EXPORTED if inspect.isclass(kind) and issubclass(kind, TemperaturePolicy)]
NAMES = sorted(kind.__name__ for kind in POLICIES if not inspect.isabstract(kind))


def test_every_policy_has_a_card() -> None:
    assert sorted(cards.EXAMPLES) == NAMES
    assert sorted(cards.rows()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_yaml_builds_what_python_builds(name: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--temperature", type=TemperaturePolicy)
    parsed: Any = parser.instantiate_classes(parser.parse_object({"temperature": cards.in_yaml(name)}))
    assert repr(parsed.temperature) == repr(cards.build(name))


@pytest.mark.slow
def test_pages(tmp_path: Path) -> None:
    cards.write(tmp_path)
    assert sorted(page.stem for page in tmp_path.glob("*.md")) == NAMES
    assert sorted(page.stem for page in tmp_path.glob("*.png")) == NAMES
    assert "**Equation**: T_s = T_t = T" in (tmp_path / "ConstantTemperature.md").read_text()
