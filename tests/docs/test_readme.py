"""Every block of README runs."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from kd_lightning.cli import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
YAML = [code for language, code in BLOCKS if language == "yaml"]
COMMANDS = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines() if line.strip()]


@pytest.fixture(autouse=True)
def _project_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kd-lightning"])


def test_readme_has_blocks() -> None:
    assert PYTHON
    assert YAML
    assert COMMANDS
    assert {language for language, _ in BLOCKS} <= {"python", "yaml", "bash", "text"}


def shortened(code: str) -> str:
    """The same with two epochs and a few steps."""
    return re.sub(r"\bsteps=\d+", "steps=3", re.sub(r"max_epochs=\d+", "max_epochs=2", code))


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`:UserWarning")  # its default logger is meant
def test_python() -> None:
    """The blocks in their order, as in one notebook."""
    names = {"__name__": "readme"}
    for code in PYTHON:
        exec(compile(shortened(code), "README.md", "exec"), names)


@pytest.mark.parametrize("text", YAML, ids=range(len(YAML)))
def test_yaml(text: str, tmp_path: Path) -> None:
    assert "strategy: ddp\n" in text or "strategy" not in text
    text = text.replace("strategy: ddp\n", "strategy: ddp_fork\n")  # ddp would start pytest a second time
    (tmp_path / "mine.yaml").write_text(text)
    main(["fit", "--config", "configs/digits.yaml", "--config", "mine.yaml", "--trainer.fast_dev_run=true"])


@pytest.mark.forked
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_commands() -> None:
    """The commands in their order, as in one folder; training for two epochs only."""
    ran = 0
    for line in COMMANDS:
        words = shlex.split(line.partition("#")[0])
        if words == ["uv", "run", "pytest"]:
            continue  # this is it
        if "kd-lightning" not in words:
            pytest.fail(f"README has a command that no test runs: {line}")
        position = words.index("kd-lightning")
        assert words[:position] in (["uv", "run"], ["pip", "install", "uv", "&&", "uv", "run"]), line
        arguments = words[position + 1 :]
        if "--print_config" in arguments:
            with pytest.raises(SystemExit) as stop:
                main(arguments)
            assert stop.value.code == 0
        else:
            training = ["--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"]
            main([*arguments, *training])
        ran += 1
    assert ran >= 3
