"""The house: which room may import which, how large a room is, and how light the command line is."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qcft"

# From the ground up. A room imports only from rows above its own; the ground floor's files also from one another.
ROWS = [
    {"errors", "files", "events", "hub", "installing", "private", "cache", "safe", "words"},
    {"recipe"},
    {"store", "data"},
    {"models"},
    {"measure", "layers"},
    {"training"},
    {"replay"},
    {"prepare"},
    {"report"},
    {"steps"},
    {"plan"},
    {"runner"},
    {"ablation", "check", "inspect"},
    {"api"},
    {"deliveries"},
    {"terminal"},
    {"cli", "public"},
]
ROW = {room: number for number, row in enumerate(ROWS) for room in row}

# Libraries that only some rooms may import, even inside functions.
ONLY = {"trl": {"training"}, "rich": {"terminal"}, "typer": {"cli"}}
NEVER = {
    "torch": {
        "errors",
        "files",
        "events",
        "hub",
        "private",
        "recipe",
        "prepare",
        "report",
        "plan",
        "api",
        "deliveries",
        "terminal",
        "cli",
        "public",
    },
    "trl": {*ROW} - {"training"},
}
MOST = 0.15  # of the package's lines in one room


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room_of(module: str) -> str | None:
    """The room of a module; None for the package itself, whose names are the public ones."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__main__" else None


def imports(path: Path):
    """The modules that a file imports, those of its functions with them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else str(node.module)


def test_every_file_is_in_a_room():
    assert {room for module in MODULES if (room := room_of(module))} == {*ROW}


def test_a_room_imports_only_from_rooms_above_it():
    for module, path in MODULES.items():
        room = room_of(module)
        for name in imports(path):
            other = room_of(name) if name.split(".")[0] == "qcft" else None
            if room is None or other is None or other == room:
                continue
            assert ROW[other] < ROW[room] or ROW[other] == ROW[room] == 0, f"{module} imports {name}"


def test_no_import_runs_in_a_circle():
    """A walk from each file along its imports never comes back to it."""
    graph = {module: {name for name in imports(path) if name in MODULES} for module, path in MODULES.items()}
    for start in graph:
        seen, ahead = set(), [*graph[start]]
        while ahead:
            module = ahead.pop()
            if module not in seen:
                seen.add(module)
                ahead += graph[module]
        assert start not in seen, f"{start} imports itself by way of {sorted(seen & graph[start])}"


def test_libraries_stay_in_their_rooms():
    for module, path in MODULES.items():
        room = room_of(module)
        for name in imports(path):
            library = name.split(".")[0]
            assert room in ONLY.get(library, {room}), f"{path} imports {library}"
            assert room not in NEVER.get(library, set()), f"{path} imports {library}"


def test_no_room_is_too_large():
    lines = Counter(room_of(module) for module, path in MODULES.items() for _ in path.open())
    for room, count in lines.items():
        assert count <= MOST * lines.total(), f"{room}: {count} of {lines.total()} lines"


@pytest.mark.parametrize("statement", ["import qcft.cli", "import qcft", "import qcft.recipe", "import qcft.plan"])
def test_light_imports(statement):
    heavy = ("torch", "transformers", "trl", "datasets", "numpy")
    code = f"{statement}; import sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names():
    """Once everything is loaded, `qcft.run` is still the function: no room has the name of a public one."""
    classes = {"Ablation", "Comparison", "InputError", "Interrupted", "QcftError", "Run", "Stage"}
    names = {"ablate", "chat", "check_recipe", "compare", "export", "merge", "open", "run", "runs"} | classes
    code = (
        "import importlib, qcft\n"
        f"for module in {[*MODULES]}:\n"
        "    module.endswith(('__main__', 'xlsum.utils')) or importlib.import_module(module)\n"
        f"assert set(qcft.__all__) == {names} <= set(dir(qcft))\n"
        "print([name for name in qcft.__all__ if not callable(getattr(qcft, name))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_fit_in_the_head():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
