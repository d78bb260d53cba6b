"""Named runs: the folder a person opens, with the recipe, what became of it, and links to the steps."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qcft.errors import InputError, nearest
from qcft.files import read_json, write_json, write_text
from qcft.recipe import Recipe, recipe_from

ABILITIES = "abilities/"
MEASURED = ("eval/", ABILITIES, "kept", "dial-")  # may be measured again without making a new run


@dataclass(frozen=True)
class NamedRun:
    """A named run: its folder and the step behind each stage."""

    name: str
    folder: Path
    stages: dict[str, str]

    def recipe(self) -> Recipe:
        """The resolved recipe. Raises InputError when its file was altered beyond reading."""
        raw = yaml.safe_load((self.folder / "recipe.yaml").read_text(encoding="utf-8"))
        return recipe_from(raw)


def open_run(runs: Path, recipe: Recipe, stages: dict[str, str]) -> NamedRun:
    """The run for these stages: the recipe's name, or NAME-2, NAME-3... where that name has other results.

    A run is gone on with when the stages it shares with the plan are the same steps. The folder is written
    when this returns.
    """
    wanted = _results(stages)
    number, name = 1, recipe.name
    while (existing := _read(runs / name)) is not None or (runs / name).exists():
        if existing is not None:
            shared = existing.keys() & wanted.keys()
            if all(existing[s] == wanted[s] for s in shared) and (shared or not existing):
                break
        number += 1
        name = f"{recipe.name}-{number}"
    folder = runs / name
    already = _read(folder) or {}
    if _results(already).keys() - wanted.keys():  # the run holds more than this plan
        both = {**already, **{stage: step for stage, step in stages.items() if stage not in already}}
        if stages.keys() - already.keys():  # and this plan more than the run: a merge for use elsewhere, a dial
            write_json(folder / "run.json", {**(read_json(folder / "run.json") or {}), "stages": both})
        return NamedRun(name, folder, both)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the runs folder {str(runs)!r} cannot be written: {error.strerror}", "name another with --runs"
        ) from None
    before = {stage: step for stage, step in already.items() if stage.startswith(ABILITIES)}
    stages = {**stages, **{stage: step for stage, step in before.items() if stage not in stages}}
    document = recipe.model_copy(update={"name": name}).model_dump(mode="json", exclude_defaults=False)
    write_text(folder / "recipe.yaml", yaml.safe_dump(document, sort_keys=False, allow_unicode=True))
    created = (read_json(folder / "run.json") or {}).get("created") or time.strftime(
        "%Y-%m-%dT%H:%M:%SZ", time.gmtime()
    )
    write_json(folder / "run.json", {"version": 1, "created": created, "stages": stages})
    return NamedRun(name, folder, stages)


def link_stage(run: NamedRun, stage: str, step: Path) -> None:
    """Link a stage's folder in the run to its step, or write a pointer file where links can't be made."""
    place = run.folder / stage
    place.parent.mkdir(parents=True, exist_ok=True)
    ups = Path(*[".."] * (len(Path(stage).parts)))
    target = ups / step.parent.name / step.name
    if place.is_symlink():
        if place.readlink() == target:
            return
        place.unlink()
    try:
        place.symlink_to(target, target_is_directory=True)
    except OSError:
        write_text(place.with_name(place.name + ".path"), f"{target}\n")


def read_run(runs: Path, name: str | None) -> NamedRun:
    """A run by name, or the latest when no name is given. Raises InputError."""
    if name is None:
        found = list_runs(runs)
        if not found:
            raise InputError(f"there is no run in {str(runs)!r}", "start with `qcft run quickstart`")
        return found[0]
    stages = _read(runs / name)
    if stages is None:
        known = [run.name for run in list_runs(runs)]
        raise InputError(
            f"there is no run {name!r} in {str(runs)!r}",
            nearest(name, known) + (f"there is {', '.join(known[:8])}" if known else "see `qcft recipes` for a start"),
        )
    return NamedRun(name, runs / name, stages)


def list_runs(runs: Path) -> list[NamedRun]:
    """All runs, the latest first."""
    found = [NamedRun(p.parent.name, p.parent, _read(p.parent) or {}) for p in runs.glob("*/run.json")]
    return sorted(found, key=lambda run: (run.folder / "run.json").stat().st_mtime, reverse=True)


def _read(folder: Path) -> dict[str, str] | None:
    document: Any = read_json(folder / "run.json")
    stages = document.get("stages") if isinstance(document, dict) else None
    return stages if isinstance(stages, dict) else None


def _results(stages: dict[str, str]) -> dict[str, str]:
    return {stage: step for stage, step in stages.items() if not stage.startswith(MEASURED)}
