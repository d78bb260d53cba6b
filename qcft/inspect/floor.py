"""The floor of a model parameter difference: the distance of two seeds of one training on one data set."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from qcft.errors import InputError
from qcft.events import Watch
from qcft.inspect.mpd import module_norms
from qcft.inspect.versions import Version
from qcft.layers import linear_modules
from qcft.prepare.model import PreparedModel
from qcft.recipe import Recipe
from qcft.store import NamedRun, Store, list_runs
from qcft.store.metrics import SeedFloor
from qcft.store.opened import run_again


def seed_floor(run: NamedRun, to: Version, prepared: PreparedModel, store: Store, watch: Watch) -> SeedFloor:
    """MPD between the last training in `to` and the same training with another seed, over all runs that have one.

    What is compared is what each training added. `mpd` is the mean over `runs`; where there are none it is None, and
    `measure` is the command that trains one, where qcft can.
    """
    step = to.trained or (store.opened(to.weights).inputs["adapter"] if to.weights else None)
    recipe = run.recipe()
    phase = next((one.name for one in recipe.phases if run.stages.get(one.name) == step), None)
    found: SeedFloor = {"phase": phase, "mpd": None, "runs": [], "measure": None}
    if phase is None or step is None or not step.startswith("train-"):
        return found
    names = [module.name for module in linear_modules(prepared.meta_model)]
    distances = {}
    for other in list_runs(store.runs):
        twin = _twin(run, recipe, phase, other, store)
        if twin is not None:
            pair = [Version(name, None, (one,)) for name, one in ((run.name, step), (other.name, twin))]
            try:
                norms = module_norms(pair[0], pair[1], names, prepared, store, watch)
            except InputError:  # more than plain LoRA: MPD itself says so
                return found
            distances[other.name] = sum(norms.values()) / len(names)
    if distances:
        return {**found, "mpd": sum(distances.values()) / len(distances), "runs": sorted(distances)}
    return {**found, "measure": _command(run, recipe, store.runs)}


def _twin(run: NamedRun, recipe: Recipe, phase: str, other: NamedRun, store: Store) -> str | None:
    """The step of another run's training of a phase that differs from this run's in its seed only."""
    step, own = other.stages.get(phase, ""), run.stages[phase]
    if step == own or not step.startswith("train-") or store.record(step) is None:
        return None
    try:
        theirs = other.recipe()
    except InputError:  # of another version
        return None
    rows = [store.opened(one).inputs["settings"]["rows"] for one in (own, step)]
    same = theirs.seed != recipe.seed and rows[0] == rows[1] and _until(theirs, phase) == _until(recipe, phase)
    return step if same else None


def _until(recipe: Recipe, phase: str) -> dict[str, Any]:
    """What decides how a recipe's phases up to `phase` are trained, except its seed."""
    number = [one.name for one in recipe.phases].index(phase)
    whole = recipe.model_dump(mode="json", include={"model", "lora", "phases", "deterministic"})
    return {**whole, "phases": whole["phases"][: number + 1]}


def _command(run: NamedRun, recipe: Recipe, runs: Path) -> str:
    seed = recipe.seed + 1
    return f"{run_again(run.folder)} --set seed={seed} --as {shlex.quote(f'{run.name}-seed{seed}')}"
