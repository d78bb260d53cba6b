"""The paper's comparison: two models trained separately from one base, on phase 1's data and on phase 2's."""

from __future__ import annotations

from pathlib import Path

from qcft.errors import InputError
from qcft.events import Watch
from qcft.inspect.versions import version_of
from qcft.recipe import Recipe, recipe_from
from qcft.recipe.arms import measured_of
from qcft.runner.planned import PlannedRecipe
from qcft.runner.recipe import run_recipe
from qcft.runner.stored import changed_phases, data_changed, stored_steps
from qcft.store import NamedRun, Store


def train_apart(run: NamedRun, runs: Path, watch: Watch) -> tuple[str, str, str]:
    """Train on the last phase's data from the unmodified model; a done training is reused.

    Returns the run it is in, its phase there, and the phase of `run` to compare it with: its first. Raises InputError
    for a run whose first phase is not trained, or whose last phase's data changed.
    """
    recipe, store = run.recipe(), Store(runs)
    first, last = recipe.phases[0], recipe.phases[-1]
    if first is last:
        raise InputError(
            f"--apart: {run.name} has one phase, {first.name}: the model that it started from was not trained by qcft",
            "name a run with two phases, or compare two runs of one base with --against",
        )
    if not last.sources():
        raise InputError(
            f"--apart: {last.name} of {run.name} is an adapter made elsewhere, whose data is not known",
            "name a run whose last phase has data",
        )
    version_of(run, first.name, store)  # raises before anything is trained if it is not done
    alone = recipe_apart(run.name, recipe)

    def check(prepared: PlannedRecipe) -> None:
        only = recipe.model_copy(update={"phases": [last]})
        if found := changed_phases(prepared, only, stored_steps(run, store)):
            raise data_changed(run, found)

    watch.note(
        f"the run {alone.name}: trained on {last.name}'s data from the unmodified model, separately from {first.name}, "
        f"without freezing and replay, with seed {alone.seed}"
    )
    return run_recipe(alone, runs, watch, last.name, check).name, last.name, first.name


def recipe_apart(name: str, recipe: Recipe) -> Recipe:
    """A recipe's last phase alone, from the unmodified model, without freezing and replay, on the rows it has in the
    whole recipe.

    It has the next seed, so that the two models begin with different LoRA weights, as do the two seeds of the floor.
    """
    last = recipe.phases[-1].name
    others = {phase.name: None for phase in recipe.phases[:-1]}
    plain = {f"{last}.freeze": "none", f"{last}.replay": None, f"{last}.start": "base"}
    alone = recipe_from(
        recipe.model_dump(mode="json"),
        {**others, **plain, "name": f"{name}-apart", "seed": recipe.seed + 1, "ablation": None, "evaluate": {}},
    )
    heldout = recipe.heldout.model_copy(update={"of": recipe.heldout.of or measured_of([recipe])})
    return alone.model_copy(update={"heldout": heldout})
