"""Named runs: the folder a person opens, with the recipe, its results, and links to the steps."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qcft.errors import InputError, nearest
from qcft.files import read_json, reporting_full_disk, reporting_unwritable, write_json, write_text
from qcft.recipe import Recipe, recipe_from
from qcft.recipe.stages import is_measurement
from qcft.store.holding import hold, runs_lock
from qcft.store.steps import FREE, check_layout, now

RUN, RECIPE = "run.json", "recipe.yaml"
LAYOUT = 1  # of run.json; raised when an older qcft could misread it
REPAIR = "run its recipe again with `qcft run RECIPE --as NAME`; finished steps are reused"


@dataclass(frozen=True)
class NamedRun:
    """A named run: its folder and the step behind each stage; `problem` says why a listed one cannot be read."""

    name: str
    folder: Path
    stages: dict[str, str]
    problem: str | None = None
    before: Mapping[str, str] = field(default_factory=dict)  # the content of its files when it was opened

    def recipe(self) -> Recipe:
        """The resolved recipe. Raises InputError when its file is missing, or this qcft cannot read it."""
        path = self.folder / "recipe.yaml"
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            raw = None
        if not isinstance(raw, dict):
            raise InputError(f"the run {self.name!r} has no readable recipe.yaml", REPAIR)
        try:
            return recipe_from(raw)
        except InputError as error:  # a key that a newer version has, or an older one had
            raise InputError(f"the run {self.name!r}: {error.message} (in {str(path)!r})", error.hint) from None


def open_run(runs: Path, recipe: Recipe, stages: dict[str, str]) -> NamedRun:
    """The run for these stages: the recipe's name, or NAME-2, NAME-3... where that name has other results.

    A run is continued when the stages it shares with the plan are the same steps. The folder is written
    when this returns.
    """
    with held_run(runs, recipe, stages) as run:
        return run


@contextmanager
def held_run(runs: Path, recipe: Recipe, stages: dict[str, str]) -> Iterator[NamedRun]:
    """`open_run`; nobody can remove the run until the work in this context ends."""
    with reporting_full_disk(runs, FREE), reporting_unwritable(runs):
        runs.mkdir(parents=True, exist_ok=True)
        with runs_lock(runs):
            run = _open(runs, recipe, stages)
            release = hold(run.folder)
    try:
        yield run
    finally:
        release()


def _open(runs: Path, recipe: Recipe, stages: dict[str, str]) -> NamedRun:
    wanted = _results(stages)
    number, name = 1, recipe.name
    while (existing := read_stages(runs / name)) is not None or _is_taken(runs / name):
        if existing is not None:
            shared = existing.keys() & wanted.keys()
            if all(existing[s] == wanted[s] for s in shared) and (shared or not existing):
                break
        number += 1
        name = f"{recipe.name}-{number}"
    folder = runs / name
    already = existing or {}
    before = {name: (folder / name).read_text(encoding="utf-8") for name in (RUN, RECIPE) if (folder / name).is_file()}
    if _results(already).keys() - wanted.keys():  # the run holds more than this plan
        both = {**already, **{stage: step for stage, step in stages.items() if stage not in already}}
        if stages.keys() - already.keys():  # and this plan more than the run: a merge for use elsewhere, a dial
            write_json(folder / RUN, {**(read_json(folder / RUN) or {}), "stages": both})
        return NamedRun(name, folder, both, before=before)
    stages = {**stages, **{stage: step for stage, step in already.items() if stage not in stages}}  # measured since
    folder.mkdir(exist_ok=True)
    created = (read_json(folder / RUN) or {}).get("created") or now()
    write_json(folder / RUN, {"version": LAYOUT, "created": created, "stages": stages})  # first: it makes it a run
    document = recipe.model_copy(update={"name": name}).model_dump(mode="json", exclude_defaults=False)
    write_text(folder / "recipe.yaml", yaml.safe_dump(document, sort_keys=False, allow_unicode=True))
    return NamedRun(name, folder, stages, before=before)


def restore(run: NamedRun) -> None:
    """Restore a run to its state when it was opened, so that its name is free for other settings. Steps stay."""
    with runs_lock(run.folder.parent):
        for name in (RECIPE, RUN):
            if name in run.before:
                write_text(run.folder / name, run.before[name])
            else:
                (run.folder / name).unlink(missing_ok=True)
        named = read_stages(run.folder) or {}
        for stage in run.stages.keys() - named.keys():
            for link in (run.folder / stage, run.folder / f"{stage}.path"):
                if link.is_symlink() or link.is_file():
                    link.unlink()
        if not [path for path in run.folder.rglob("*") if not path.is_dir() and not path.name.startswith(".")]:
            shutil.rmtree(run.folder, ignore_errors=True)


def add_stage(run: NamedRun, stage: str, step: str) -> None:
    """Record a stage that was made from the run's steps, beyond its plan."""
    with runs_lock(run.folder.parent):
        document = read_json(run.folder / RUN) or {}
        write_json(run.folder / RUN, {**document, "stages": {**document.get("stages", {}), stage: step}})


def _is_taken(folder: Path) -> bool:
    """Whether something exists where a run would be; an empty folder may be left over from a killed process."""
    return folder.exists() and not (folder.is_dir() and all(p.name.startswith(".") for p in folder.iterdir()))


def link_stage(run: NamedRun, stage: str, step: Path) -> None:
    """Link a stage's folder in the run to its step, or write a pointer file where links can't be made."""
    place = run.folder / stage
    place.parent.mkdir(parents=True, exist_ok=True)
    ups = Path(*[".."] * (len(Path(stage).parts)))
    target = ups / step.parent.name / step.name
    if place.is_symlink():
        if place.readlink() == target:
            return
        place.unlink(missing_ok=True)
    try:
        place.symlink_to(target, target_is_directory=True)
    except FileExistsError:
        return  # another process that works on the run made it
    except OSError:
        write_text(place.with_name(place.name + ".path"), f"{target}\n")


def read_run(runs: Path, name: str | None) -> NamedRun:
    """A run by name, or the latest when no name is given. Raises InputError."""
    if name is None:
        found = list_runs(runs)
        if not found:
            raise InputError(f"there is no run in {str(runs)!r}", "start with `qcft run quickstart`")
        if found[0].problem:
            raise InputError(f"the latest run: {found[0].problem}", "name another run, or remove its folder")
        return found[0]
    stages = read_stages(runs / name) if Path(name).name == name else None  # a path may point outside the runs folder
    if stages is None:
        known = [run.name for run in list_runs(runs)]
        raise InputError(
            f"there is no run {name!r} in {str(runs)!r}",
            nearest(name, known)
            + (f"existing runs: {', '.join(known[:8])}" if known else "see `qcft recipes` for a start"),
        )
    return NamedRun(name, runs / name, stages)


def list_runs(runs: Path) -> list[NamedRun]:
    """All runs, the latest first; those that cannot be read without stages."""
    found = [_listed(path.parent) for path in runs.glob(f"*/{RUN}")]
    return sorted(found, key=lambda run: (run.folder / RUN).stat().st_mtime, reverse=True)


def _listed(folder: Path) -> NamedRun:
    try:
        stages = read_stages(folder)
        problem = f"the run {folder.name!r} has no readable run.json" if stages is None else None
    except InputError as error:  # of a newer qcft
        stages, problem = None, error.message
    return NamedRun(folder.name, folder, stages or {}, problem)


def read_stages(folder: Path) -> dict[str, str] | None:
    """The step behind each stage of the run in a folder; None where there is none, or none that can be read.

    Raises InputError for what a newer qcft wrote.
    """
    document: Any = read_json(folder / RUN)
    stages = document.get("stages") if isinstance(document, dict) else None
    if not isinstance(stages, dict) or not all(is_step(step) for step in stages.values()):
        return None
    check_layout(document.get("version", 1), LAYOUT, f"the run {folder.name!r}")
    return stages


def is_step(value: Any) -> bool:
    """Whether a value can be a step's name, and not a path that points outside the runs folder."""
    return isinstance(value, str) and re.fullmatch(r"[a-z]+-\w+", value) is not None


def _results(stages: dict[str, str]) -> dict[str, str]:
    return {stage: step for stage, step in stages.items() if not is_measurement(stage)}
