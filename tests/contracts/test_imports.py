"""Imports run one way only."""

from __future__ import annotations

import ast
import functools
import graphlib
from collections.abc import Mapping
from pathlib import Path

import kd_lightning

ROOT = Path(kd_lightning.__file__).parent
LAYERS = [
    {"functional", "ranking", "progress", "schedules"},
    {"temperature", "losses", "models"},
    {"teachers"},
    {"layers"},
    {"output", "distiller_parts", "distiller", "fused_distiller", "outputs_distiller", "plotting", "export"},
    {"metrics", "calibration", "modules", "_lightning"},
    {"callbacks", "preflight"},
    {"configuration"},
    {"sweep"},
    {"card"},
    {"cli", "__main__"},
]
ALONE = {"datamodules"}
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
WITHOUT_LIGHTNING = LAYERS[0] | LAYERS[1] | LAYERS[2] | LAYERS[3] | LAYERS[4]


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@functools.cache
def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def test_imports_run_one_way() -> None:
    for path in FILES:
        room = room_of(path)
        assert room in LEVEL or room in ALONE, f"{room} has no place among the layers"
        used = {name.split(".")[1] for name in imported(path) if name.startswith("kd_lightning.")} - {room}
        used &= set(LEVEL) | ALONE
        if room in ALONE:
            assert not used, path
        else:
            allowed = {other for other, level in LEVEL.items() if level <= LEVEL[room]}
            assert used <= allowed | (ALONE if room == "configuration" else set()), path


def test_the_core_serves_a_bare_loop() -> None:
    for path in FILES:
        if room_of(path) in WITHOUT_LIGHTNING:
            lightning = [name for name in imported(path) if name.split(".")[0] in ("lightning", "pytorch_lightning")]
            assert not lightning, path


def imported_modules(path: Path, files: Mapping[str, Path]) -> set[str]:
    """Return the files that a file imports when it runs: inside functions and by name too, for type checkers not."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            wholes = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {whole if whole in files else node.module for whole in wholes}
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            names |= {str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)}
    return names & files.keys()


MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES
}
GRAPH = {name: imported_modules(path, MODULES) for name, path in MODULES.items()}


def test_no_circle_of_modules() -> None:
    assert GRAPH["kd_lightning.distiller"] >= {"kd_lightning.output", "kd_lightning.temperature"}
    assert set(graphlib.TopologicalSorter(GRAPH).static_order()) == set(MODULES)  # raises CycleError


def test_no_circle_of_packages() -> None:
    """Two packages whose modules import each other are one, even where no two of the modules do."""
    rooms: dict[str, set[str]] = {room_of(path): set() for path in FILES}
    for name, used in GRAPH.items():
        room = room_of(MODULES[name])
        rooms[room] |= {room_of(MODULES[other]) for other in used} - {room}
    assert rooms["cli"] >= {"sweep", "configuration"}
    assert set(graphlib.TopologicalSorter(rooms).static_order()) == set(rooms)


def test_no_module_uses_the_packages_lazy_names() -> None:
    """Such imports would lead to a circle that no graph shows."""
    lazy = {f"kd_lightning.{name}" for name in kd_lightning.__all__} - set(MODULES)
    assert not [path for path in FILES if imported(path) & lazy]


def test_no_test_module_imports_another() -> None:
    tests = Path(__file__).parents[1]
    for path in tests.rglob("*.py"):
        shared = [name for name in imported(path) if name.startswith("tests.")]
        assert not [name for name in shared if any(part.startswith("test_") for part in name.split("."))], path
