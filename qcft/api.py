"""qcft from Python: what the command line does, without printing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcft.errors import InputError
from qcft.events import Listener, Watch
from qcft.pipeline import Run, run_recipe
from qcft.pipeline.run import finished_run
from qcft.recipe import Recipe, load_recipe, recipe_from
from qcft.report.markdown import write_report
from qcft.store import Store, read_run


def run(
    recipe: str | Path | Recipe,
    *,
    set: Mapping[str, Any] | None = None,
    runs: str | Path = "runs",
    listener: Listener | None = None,
) -> Run:
    """Run a recipe (a file, a built-in name, or one already loaded) to its end; returns its stages and table.

    `set` changes recipe keys: `{"phase2.replay.ratio": 0.1}`. `listener` is called with every event.
    Raises qcft.QcftError.
    """
    if isinstance(recipe, Recipe):
        loaded = recipe_from(recipe.model_dump(mode="json"), set)
    else:
        loaded = load_recipe(recipe, set)
    return run_watched(loaded, Path(runs), Watch(listener))


def run_watched(recipe: Recipe, runs: Path, watch: Watch) -> Run:
    """Run a recipe and write its report."""
    done = run_recipe(recipe, runs, watch)
    whole = read(done.name, runs)  # the run may hold more than this recipe asked for
    recipe = read_run(runs, done.name).recipe()
    write_report(done.folder / "report", recipe, whole.table, {s.name: s.folder for s in whole.stages.values()})
    return done


def replay_watched(recipe: Recipe, runs: Path, watch: Watch) -> Run:
    """Run a recipe up to its last phase's replay rows, and no further. Raises InputError where it has none."""
    replayed = [phase.name for phase in recipe.phases if phase.replay and phase.replay.ratio]
    if not replayed:
        raise InputError(
            f"the recipe {recipe.name!r} has no replay",
            f"set a ratio, for example --set {recipe.phases[-1].name}.replay=0.2",
        )
    return run_recipe(recipe, runs, watch, up_to="replay" if len(replayed) == 1 else f"replay-{replayed[-1]}")


def read(name: str | None, runs: str | Path = "runs") -> Run:
    """A run as it stands, by name or the latest: its done stages and their table. Raises QcftError."""
    named = read_run(Path(runs), name)
    return finished_run(named, named.recipe(), named.stages, Store(Path(runs)))
