"""The house: which room may import which, and how light the command line is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qcft"

# From the ground up; a room imports only from rooms above it in this list.
ROOMS = [
    "errors", "files", "events", "hub", "recipe", "cache", "plan", "store", "data", "models", "layers", "training",
    "measure", "pipeline", "report", "api", "commands", "console", "live", "supervise", "cli",
]  # fmt: skip

# Libraries that only some rooms may import, even inside functions.
ONLY = {"trl": {"training"}, "rich": {"console", "live"}, "typer": {"cli"}}
NEVER = {"torch": {*ROOMS} - {"cache", "store", "data", "models", "layers", "training", "measure", "pipeline"}}


def imports():
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in {"__init__", "__main__"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports are absolute"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                yield path, room, name


def test_every_file_is_in_a_room():
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert room in {*ROOMS, "__init__", "__main__"}, path


def test_a_room_imports_only_from_rooms_above_it():
    for path, room, name in imports():
        parts = name.split(".")
        if parts[0] != "qcft":
            continue
        other = parts[1]
        if other in ROOMS:
            assert ROOMS.index(other) <= ROOMS.index(room), f"{path.name} ({room}) imports {name}"


def test_libraries_stay_in_their_rooms():
    for path, room, name in imports():
        library = name.split(".")[0]
        assert room in ONLY.get(library, {room}), f"{path} imports {library}"
        assert room not in NEVER.get(library, set()), f"{path} imports {library}"


@pytest.mark.parametrize("statement", ["import qcft.cli", "import qcft", "import qcft.recipe", "import qcft.plan"])
def test_light_imports(statement):
    heavy = ("torch", "transformers", "trl", "datasets", "numpy")
    code = f"{statement}; import sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_fit_in_the_head():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
