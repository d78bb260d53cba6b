"""An ablation on disk: `runs/NAME/ablation.json`, which arm with which seed is which named run.

The file says which runs belong together and what went wrong; only the steps of a run say whether it is done.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from filelock import FileLock

from qcft.errors import InputError, nearest
from qcft.files import read_json, reporting_unwritable, write_json
from qcft.recipe import ArmRun, Recipe
from qcft.store.runs import read_run
from qcft.store.steps import Store, check_layout, now

INDEX = "ablation.json"
State = Literal["done", "running", "failed", "to do"]


class Fault(TypedDict):
    """What went wrong with a run, and at which of its steps."""

    message: str
    hint: str | None
    step: str | None
    title: NotRequired[str | None]
    traceback: NotRequired[str]


class Entry(TypedDict):
    """An arm with a seed, and its run; `set` is what the arm changes of the plain recipe."""

    arm: str
    seed: int
    run: str
    set: dict[str, Any]
    mixed: bool
    error: Fault | None


class Process(TypedDict):
    """The process that works on a run."""

    pid: int
    host: str


class Index(TypedDict):
    """What ablation.json holds: the plain recipe, its arms, and by run the process that works on it now."""

    version: int
    name: str
    created: str
    recipe: dict[str, Any]
    runs: list[Entry]
    working: dict[str, Process]


@dataclass(frozen=True)
class ArmState:
    """The state of one arm with one seed: its run, how many of the run's steps are done, what went wrong."""

    arm: str
    seed: int
    run: str
    set: Mapping[str, Any]
    mixed: bool
    state: State
    done: int
    steps: int
    error: Fault | None


class AblationIndex:
    """The index of one ablation on disk; its changes are written while the ablation runs."""

    def __init__(self, runs: Path, name: str) -> None:
        self.runs = runs
        self.name = name
        self.folder = runs / name

    @property
    def document(self) -> Index:
        """The index as it is on disk. Raises InputError when there is none that can be read."""
        document = _read(self.folder)
        if document is None and (self.folder / INDEX).exists():
            raise InputError(
                f"the ablation {self.name!r} has no readable {INDEX}",
                "run its recipe again with `qcft ablate`; finished steps are reused",
            )
        if document is None:
            known = list_ablations(self.runs)
            raise InputError(
                f"there is no ablation {self.name!r} in {str(self.runs)!r}",
                nearest(self.name, known)
                + (f"existing ablations: {', '.join(known[:8])}" if known else "start one with `qcft ablate RECIPE`"),
            )
        return document

    def states(self) -> list[ArmState]:
        """Every arm and seed, started or to do, in order."""
        document = self.document
        working = document.get("working", {})
        return [_state(self.runs, entry, working.get(entry["run"])) for entry in document["runs"]]

    def begin(self, run: str) -> None:
        """Record that this process works on a run."""
        with self._changing() as document:
            document["working"][run] = {"pid": os.getpid(), "host": socket.gethostname()}
            document["runs"] = [_with_error(e, run, None) for e in document["runs"]]

    def end(self, run: str, error: Fault | None = None) -> None:
        """Record that the work on a run ended, and what went wrong."""
        with self._changing() as document:
            document["working"].pop(run, None)
            document["runs"] = [_with_error(e, run, error) for e in document["runs"]]

    def abandoned(self) -> list[str]:
        """The runs whose process has ended without finishing them."""
        return [run for run, process in self.document["working"].items() if not _alive(process)]

    @contextmanager
    def _changing(self, new: Index | None = None) -> Iterator[Index]:
        """The index, written back when the context ends; several processes may work on arms of one ablation."""
        with FileLock(self.folder / f".{INDEX}.lock"):
            document = self.document if new is None else _read(self.folder) or new
            yield document
            write_json(self.folder / INDEX, document)


def open_ablation(
    runs: Path, plain: Recipe, arms: Sequence[ArmRun], names: Mapping[tuple[str, int], str]
) -> AblationIndex:
    """The ablation of a recipe: continued where its name's index has the same plain recipe, else a new one, NAME-2 ...

    `names` gives each arm's and seed's run. Entries of the index that are not among `arms` stay in it.
    """
    recipe = plain.model_dump(mode="json")
    number, name = 1, plain.name
    while (runs / name / "run.json").exists() or not _continues(_read(runs / name), recipe):
        number += 1
        name = f"{plain.name}-{number}"
    ablation = AblationIndex(runs, name)
    with reporting_unwritable(runs):
        ablation.folder.mkdir(parents=True, exist_ok=True)
    empty: Index = {"version": 1, "name": name, "created": now(), "recipe": recipe, "runs": [], "working": {}}
    with ablation._changing(empty) as document:
        entries = {(e["arm"], e["seed"]): e for e in document["runs"]}
        for one in arms:
            before = entries.get((one.arm, one.seed))
            entries[one.arm, one.seed] = {
                "error": before["error"] if before else None,
                "arm": one.arm,
                "seed": one.seed,
                "run": names[one.arm, one.seed],
                "set": dict(one.set),
                "mixed": one.as_long_as is not None,
            }
        document["recipe"], document["runs"] = recipe, list(entries.values())
    return ablation


def list_ablations(runs: Path) -> list[str]:
    """The names of the ablations in a runs folder."""
    return sorted(path.parent.name for path in runs.glob(f"*/{INDEX}"))


def readable_ablations(runs: Path) -> tuple[list[AblationIndex], dict[str, str]]:
    """The ablations that can be read, and by name what is wrong with the others."""
    found, problems = [], {}
    for name in list_ablations(runs):
        try:
            _ = AblationIndex(runs, name).document
            found.append(AblationIndex(runs, name))
        except InputError as error:
            problems[name] = error.message
    return found, problems


def run_states(runs: Path) -> tuple[dict[str, State], dict[str, str]]:
    """The state of every run that belongs to an ablation; what is wrong with ablations that cannot be read."""
    found, problems = readable_ablations(runs)
    return {one.run: one.state for ablation in found for one in ablation.states()}, problems


def _read(folder: Path) -> Index | None:
    """The index in a folder; None where there is none, or none that can be read. Raises InputError for a newer one."""
    document = read_json(folder / INDEX)
    if not isinstance(document, dict):
        return None
    check_layout(document.get("version", 1), 1, f"the ablation {folder.name!r}")
    runs, working = document.get("runs"), document.get("working", {})
    if not (isinstance(runs, list) and isinstance(working, dict) and isinstance(document.get("recipe", {}), dict)):
        return None
    whole = all(map(_is_entry, runs)) and all(map(_is_process, working.values()))
    return cast("Index", document) if whole else None


def _is_entry(value: Any) -> bool:
    if not (isinstance(value, dict) and value.keys() >= Entry.__required_keys__ and isinstance(value["run"], str)):
        return False
    error = value["error"]
    return error is None or (isinstance(error, dict) and error.keys() >= {"message", "hint"})


def _is_process(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("pid"), int) and isinstance(value.get("host"), str)


def _state(runs: Path, entry: Entry, process: Process | None) -> ArmState:
    store = Store(runs)
    try:
        steps: Iterable[str] = read_run(runs, entry["run"]).stages.values()
    except InputError:  # removed since
        steps = ()
    done = [store.state(step) == "done" for step in steps]
    state: State = "to do"
    if process is not None and _alive(process):
        state = "running"
    elif entry["error"]:
        state = "failed"
    elif done and all(done):
        state = "done"
    return ArmState(
        entry["arm"], entry["seed"], entry["run"], entry["set"], entry["mixed"],
        state, sum(done), len(done), entry["error"],
    )  # fmt: skip


def _alive(process: Process) -> bool:
    """Whether a process is running; one on another host is assumed to be."""
    if process["host"] != socket.gethostname():
        return True
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _continues(document: Index | None, recipe: dict[str, Any]) -> bool:
    """Whether there is no index yet, or one of the same recipe, whatever its arms and seeds."""
    if document is None:
        return True
    apart = {"ablation", "name"}
    before = document.get("recipe", {})
    return {k: v for k, v in before.items() if k not in apart} == {k: v for k, v in recipe.items() if k not in apart}


def _with_error(entry: Entry, run: str, error: Fault | None) -> Entry:
    return {**entry, "error": error} if entry["run"] == run else entry
