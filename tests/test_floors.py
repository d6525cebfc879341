"""The floors of the house: a module imports only from floors below it, engines do not import each other."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "hfscratch"
FLOORS = {"errors": 0, "recipe": 0, "artifact": 0, "stages": 2, "pipeline": 3, "init": 3, "cli": 4, "__main__": 5}
ENGINES = {"model", "data", "tokens", "training", "evaluation", "planning", "reporting", "serving", "export", "hub"}
MAY_USE = {"compression": {"training"}, "serving": {"export"}}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The names below `hfscratch` that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "hfscratch":
            found |= {f"hfscratch.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return {name.split(".")[1] for name in found if name.startswith("hfscratch.")} - {"__version__"}


def floor(name: str) -> int:
    return 1 if name in ENGINES else FLOORS[name]


def test_every_module_stands_on_a_known_floor():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "__init__.py" or path.parent != PACKAGE:
            assert room(path) in FLOORS or room(path) in ENGINES, path


def test_modules_import_only_from_floors_below():
    for path in PACKAGE.rglob("*.py"):
        here = room(path)
        if here == "__init__":
            continue
        for name in imports(path):
            if name == here and floor(here) == 1:
                continue
            allowed = floor(name) < floor(here) or (floor(name) == floor(here) == 0)
            allowed |= floor(here) == 1 and (name == "model" or name in MAY_USE.get(here, set()))
            assert allowed, f"{path.relative_to(PACKAGE)} imports hfscratch.{name}"


def test_the_files_that_travel_in_checkpoints_import_nothing_of_hfscratch():
    for name in ("configuration_scratch.py", "modeling_scratch.py"):
        assert not imports(PACKAGE / "model" / name)
        assert "import hfscratch" not in (PACKAGE / "model" / name).read_text()


def test_no_module_prints_but_the_command_line():
    for path in PACKAGE.rglob("*.py"):
        if room(path) == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            assert not called, f"{path}:{node.lineno}"
