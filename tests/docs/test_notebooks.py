"""Every notebook runs from top to bottom, and is committed without outputs."""

from __future__ import annotations

import ast
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from kd_lightning import temperature
from kd_lightning.temperature import Schedule, TemperaturePolicy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# warnings are errors, as in pytest; the notebooks themselves turn off Lightning's advice
STRICT = """
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="IProgress not found")  # ipywidgets, which comes with jupyter
warnings.filterwarnings("ignore", message=".*", module="(IPython|ipykernel|traitlets|jupyter_client|debugpy)")
"""
DRAWN = """
figures = [value for value in list(globals().values()) if isinstance(value, plt.Figure)]
print(sorted({axes.get_title(loc="left") for figure in figures for axes in figure.axes}))
"""

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def run(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, after: str = "pass") -> str:
    """Run it in a copy of the project's folder; what the code ``after`` it prints."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (folder / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    book = nbformat.read(path, as_version=4)
    first, last = nbformat.v4.new_code_cell(STRICT), nbformat.v4.new_code_cell(after)
    book.cells = [first, *book.cells, last]
    resources = {"metadata": {"path": str(folder / "notebooks")}}  # where Jupyter starts it
    NotebookClient(book, timeout=600, kernel_name="python3", resources=resources).execute()
    return "".join(output.get("text", "") for output in last.outputs)


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["01_quickstart", "02_temperature", "03_drop_in", "04_long_tail"]


@every_notebook
def test_is_committed_without_outputs(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    for cell in book.cells:
        assert set(cell.metadata) == set()
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    assert set(book.metadata) == {"kernelspec", "language_info"}
    assert book.metadata.kernelspec.name == "python3"
    assert set(book.metadata.language_info) == {"name"}  # no version of whoever ran it last


@every_notebook
def test_opens_with_its_answer(path):
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown"
    assert "**The answer.**" in first.source


@every_notebook
def test_finds_the_project_from_its_folder_and_from_the_root(path, tmp_path, monkeypatch):
    code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    (line,) = (line for line in code.splitlines() if line.startswith("root = "))
    (tmp_path / "configs").mkdir()
    (tmp_path / "notebooks").mkdir()
    for folder in (tmp_path, tmp_path / "notebooks"):
        monkeypatch.chdir(folder)
        names: dict[str, object] = {}
        exec(f"from pathlib import Path\n{line}", names)
        assert names["root"] == tmp_path


def test_lint():
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", str(ROOT / "notebooks")]
        done = subprocess.run(ruff, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem != "02_temperature"], ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    run(path, tmp_path, monkeypatch)


def test_temperature_draws_every_policy_and_schedule(tmp_path, monkeypatch):
    drawn = ast.literal_eval(run(ROOT / "notebooks" / "02_temperature.ipynb", tmp_path, monkeypatch, DRAWN))
    exported = {
        name
        for name, member in ((name, getattr(temperature, name)) for name in temperature.__all__)
        if inspect.isclass(member) and issubclass(member, (Schedule, TemperaturePolicy))
    } - {"Schedule", "TemperaturePolicy"}
    assert exported - set(drawn) == set()
