"""Finding and removing steps that no run uses; removing a run."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.errors import InputError
from qcft.files import reporting_unwritable
from qcft.store.ablations import INDEX, AblationIndex, list_ablations, readable_ablations
from qcft.store.holding import holders, runs_lock
from qcft.store.opened import BEGUN, StepInputs, altered, read_begun
from qcft.store.runs import RUN, is_step, list_runs, read_run, read_stages
from qcft.store.steps import Store
from qcft.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

OURS = {"run.json", "recipe.yaml", "report"}  # in a run's folder, beside the links to its steps
WHOLE_STEP = ""
AS_OWNER = "run the command as the owner of the folder, on a disk that can be written"
WAIT = "stop it first, or wait until it is done"


@dataclass(frozen=True)
class Unused:
    """A step that no run uses, or a folder of a step that is no longer needed; `part` is its name, else empty."""

    step: str
    part: str
    what: str
    bytes: int


def unused_steps(runs: Path) -> list[Unused]:
    """The steps that no run depends on, the largest first.

    Every run's steps are used, and all steps that those depend on: parents, weights, adapters, pools of answers. Stored
    states of frozen layers are used as long as a run has a training that is not done. Raises InputError when a
    run or a step's inputs cannot be read, as the used steps are then unknown.
    """
    store = Store(runs)
    used = _used(store)
    training = any(step.startswith("train-") and store.state(step) != "done" for step in used)
    found: list[Unused] = []

    def note(step: str, part: str, what: str) -> None:
        found.append(Unused(step, part, what, size_of(store.steps / step / part)))

    for folder in sorted(store.steps.iterdir()) if store.steps.is_dir() else []:
        if folder.name.startswith(".") or not folder.is_dir() or folder.is_symlink():
            continue
        if folder.name.startswith("prefix-"):
            if not training:
                note(folder.name, WHOLE_STEP, "stored states, no training left to read them")
        elif folder.name not in used:
            note(folder.name, WHOLE_STEP, "no run uses it")
        elif store.state(folder.name) == "done" and (folder / "checkpoints").is_dir():
            note(folder.name, "checkpoints", "the training is done")
    return sorted(found, key=lambda one: -one.bytes)


def remove_unused(runs: Path) -> tuple[list[Unused], list[Unused]]:
    """Remove what no run uses; returns what was removed, and what was kept as a process works on it. Raises
    InputError."""
    removed: list[Unused] = []
    left: list[Unused] = []
    store = Store(runs)
    if not store.steps.is_dir():
        return [], []
    with reporting_unwritable(runs, hint=AS_OWNER), runs_lock(runs):  # no run is named meanwhile
        for one in unused_steps(runs):
            with _held_now(store, one.step) as free:
                place = store.steps / one.step / one.part
                if free and place.exists():  # else a step that finished meanwhile removed it itself
                    shutil.rmtree(place)
                (removed if free else left).append(one)
    return removed, left


def remove_run(runs: Path, name: str) -> list[str]:
    """Remove a named run: recipe, report, links. Its steps stay, and files that qcft did not write, which are returned.

    Raises InputError when there is no such run, or a process works on it.
    """
    read_run(runs, name)  # before anything is written, the lock too
    with reporting_unwritable(runs, hint=AS_OWNER), runs_lock(runs):
        run, store = read_run(runs, name), Store(runs)
        if who := holders(run.folder):
            raise InputError(f"{' and '.join(who)} {'work' if len(who) > 1 else 'works'} on the run {name!r}", WAIT)
        for step in run.stages.values():
            with _held_now(store, step) as free:
                if not free:
                    raise InputError(f"{store.holder(step)} works on {step} of the run {name!r}", WAIT)
        tops = {stage.split("/")[0] for stage in run.stages}
        ours = OURS | tops | {f"{top}.path" for top in tops}
        others = sorted(p.name for p in run.folder.iterdir() if p.name not in ours and not p.name.startswith("."))
        for path in sorted(run.folder.iterdir(), key=lambda p: p.name == "run.json"):  # run.json is removed last
            if path.name in others:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        with suppress(OSError):  # it holds other files
            run.folder.rmdir()
    return others


def remove_named(runs: Path, names: Sequence[str], with_arms: bool) -> dict[str, list[str]]:
    """Remove runs, and ablations with the runs of their arms; returns, of each removed one, the files that stay as qcft
    did not write them. All names are checked before any run is removed.

    Raises InputError for a name that is neither, one that a process works on, or an ablation without `with_arms`.
    """
    ablations, wanted = set(list_ablations(runs)), list(dict.fromkeys(names))
    arms: dict[str, list[str]] = {}
    for name in wanted:
        if name not in ablations:
            read_run(runs, name)
            continue
        arms[name] = _runs_of(runs, name)
        if not with_arms and arms[name]:
            count = counted(len(arms[name]), "run")
            raise InputError(
                f"removing the ablation {name!r} also removes the {count} of its arms: {', '.join(arms[name])}",
                f"to remove them all: qcft rm {name} --yes",
            )
    removed: dict[str, list[str]] = {}
    for name in wanted:
        for run in arms.get(name, [name]):
            if run not in removed:
                removed[run] = remove_run(runs, run)
        if name in arms:
            removed[name] = _remove_ablation(runs, name)
    return removed


def _runs_of(runs: Path, name: str) -> list[str]:
    """The runs of an ablation's arms that exist and belong to no other ablation."""
    others = {one.run for other in readable_ablations(runs)[0] if other.name != name for one in other.states()}
    document = AblationIndex(runs, name).document
    there = [entry["run"] for entry in document["runs"] if (runs / entry["run"] / RUN).is_file()]
    return [run for run in there if run not in others]


def _remove_ablation(runs: Path, name: str) -> list[str]:
    folder = runs / name
    with reporting_unwritable(runs, hint=AS_OWNER), runs_lock(runs):
        shutil.rmtree(folder / "report", ignore_errors=True)
        (folder / INDEX).unlink(missing_ok=True)
        left = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if not left:
            shutil.rmtree(folder)
    return left


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder; files that are removed meanwhile may be counted or not."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found = os.lstat(os.path.join(place, name))
                total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


def _used(store: Store) -> set[str]:
    for folder in store.runs.iterdir() if store.runs.is_dir() else []:
        known = (folder / "run.json").exists() or (folder / "recipe.yaml").exists()
        if known and read_stages(folder) is None:
            raise InputError(
                f"the run {folder.name!r} has no readable run.json, so the steps it uses are unknown",
                "run its recipe again with `qcft run`, or remove its folder",
            )
    used: set[str] = set()
    ahead = [step for run in list_runs(store.runs) for step in run.stages.values()]
    while ahead:
        step = ahead.pop()
        if step not in used:
            used.add(step)
            begun = read_begun(store.folder(step))
            if begun is None and store.state(step) != "to do":  # what it depends on is not known
                raise altered(store.folder(step), BEGUN)
            ahead += _dependencies(begun["inputs"]) if begun else ()
    return used


def _dependencies(inputs: StepInputs) -> Iterable[str]:
    """The steps named in a step's inputs, the pools of its replay among them."""
    named: list[Any] = []
    for value in inputs.values():
        named += value if isinstance(value, list) else [value]
    named += [part.get("pool") for part in (inputs.get("settings") or {}).get("parts") or []]
    return [one for one in named if is_step(one)]


@contextmanager
def _held_now(store: Store, step: str) -> Iterator[bool]:
    """Hold a step's lock if no process has it; gives whether it is held."""
    from filelock import FileLock, Timeout

    lock = FileLock(store.lock_file(step))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
