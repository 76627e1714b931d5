"""README and the guides in docs/ run, block by block, and their links lead somewhere."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from kd_lightning.cli import main

ROOT = Path(__file__).parents[2]
OF_THE_SITE = ("index", "reference", "functions", "design", "changelog")  # contents, docstrings, files from elsewhere
GUIDES = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.stem not in OF_THE_SITE]
PAGES = [ROOT / "README.md", *GUIDES]
IMPORTED_AS = {"mosaicml-streaming": "streaming"}
ROOMS = ("temperature", "losses", "functional", "teachers", "callbacks", "plotting")


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [code for language, code in found if language in languages]


def with_blocks(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


def name_of(page: Path) -> str:
    return page.name


YAML = [(page, text) for page in PAGES for text in blocks(page, "yaml") if not text.startswith("# ")]
COMMANDS = [
    (page, line) for page in PAGES for code in blocks(page, "bash") for line in code.splitlines() if line.strip()
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kd-lightning"])
    return tmp_path


def test_readme_is_short_and_has_every_guide() -> None:
    text = PAGES[0].read_text()
    assert len(text.splitlines()) <= 120
    assert [page.name for page in GUIDES if f"(docs/{page.name})" not in text] == []


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_a_guide_opens_with_its_answer(page: Path) -> None:
    assert re.match(r"# .*\n\n(\*\*)?In short[.:]", page.read_text())


def test_public_names_are_those_that_the_reference_has() -> None:
    api, functions = (
        set(re.findall(r"^\.\. auto\w+:: kd_lightning\.(\S+)$", (ROOT / "docs" / page).read_text(), re.MULTILINE))
        for page in ("reference.md", "functions.md")
    )
    assert len(api) <= 120
    assert not api & functions
    documented = {name.rpartition(".")[2] for name in api | functions}
    rooms = ["kd_lightning", *(f"kd_lightning.{room}" for room in ROOMS)]
    assert {name for room in rooms for name in importlib.import_module(room).__all__} - documented == set()


def test_the_tree_of_contributing_is_true() -> None:
    named = set(re.findall(r"`([\w/.]+(?:\.py|/))`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert [name for name in sorted(named) if not (ROOT / name).exists() and not any(ROOT.glob(f"*/**/{name}"))] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_has_a_language_that_runs_or_is_text(page: Path) -> None:
    fences = re.findall(r"^```(\w*)$", page.read_text(), flags=re.MULTILINE)
    assert set(fences[::2]) <= {"python", "yaml", "bash", "text"}
    assert set(fences[1::2]) <= {""}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            there = page.parent / path if path else page
            assert there.exists(), target
            headings = re.findall(r"^#+ (.*)$", there.read_text(), flags=re.MULTILINE) if anchor else []
            anchors = ["", *(re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings)]
            assert anchor in anchors, target


def shortened(code: str) -> str:
    """The same with two epochs and a few steps."""
    return re.sub(r"\bsteps=\d+", "steps=3", re.sub(r"max_epochs=\d+", "max_epochs=2", code))


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`:UserWarning")  # its default logger is meant
@pytest.mark.filterwarnings("ignore:The given .* is not writable:UserWarning")  # what streaming packages read
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")  # Hugging Face's Trainer, without a GPU
@pytest.mark.parametrize("page", with_blocks("python"), ids=name_of)
def test_python(page: Path) -> None:
    """The blocks of a page in their order, as in one notebook, without those of packages that are not installed."""
    names = {"__name__": page.stem}
    for code in blocks(page, "python"):
        package = re.match(r"# pip install ([\w-]+)\n", code)
        if package is None or importlib.util.find_spec(IMPORTED_AS.get(package[1], package[1])) is not None:
            exec(compile(shortened(code), page.name, "exec", dont_inherit=True), names)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "text"), YAML, ids=[f"{page.name}-{index}" for index, (page, _) in enumerate(YAML)])
def test_yaml(page: Path, text: str, folder: Path) -> None:
    assert "strategy: ddp\n" in text or "strategy" not in text
    text = text.replace("strategy: ddp\n", "strategy: ddp_fork\n")  # ddp would start pytest a second time
    (folder / "mine.yaml").write_text(text)
    main(["fit", "--config", "configs/digits.yaml", "--config", "mine.yaml", "--trainer.fast_dev_run=true"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_project_of_files_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Blocks that open with a file's name are these files, and the commands after them run in the folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kd-lightning"])
    page = ROOT / "docs" / "teachers.md"
    for text in blocks(page, "python", "yaml"):
        if file := re.match(r"# (\w+\.(?:py|yaml))\n", text):
            Path(file[1]).write_text(text)
    (commands,) = [text for text in blocks(page, "text") if text.startswith("kd-lightning fit")]
    for line in commands.splitlines():
        main(shlex.split(line, comments=True)[1:])
    accuracy = re.search(r"test_acc +│ +([\d.]+)", capsys.readouterr().out)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.7  # by chance 0.2


@pytest.mark.slow
@pytest.mark.forked
@pytest.mark.usefixtures("folder")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_commands() -> None:
    """The commands in their order, README's first, as in one folder; training for two epochs only."""
    ran = 0
    for page, line in COMMANDS:
        words = shlex.split(line.partition("#")[0])
        if words == ["uv", "run", "pytest"]:
            continue  # this is it
        if "kd-lightning" not in words:
            pytest.fail(f"{page.name} has a command that no test runs: {line}")
        position = words.index("kd-lightning")
        assert words[:position] in (["uv", "run"], ["pip", "install", "uv", "&&", "uv", "run"]), line
        arguments = words[position + 1 :]
        if "--print_config" in arguments:
            with pytest.raises(SystemExit) as stop:
                main(arguments)
            assert stop.value.code == 0
        else:
            main([*arguments, "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"])
        ran += 1
    assert ran >= 3
