"""The done part of a run: its stages and their table."""

from __future__ import annotations

from collections.abc import Mapping

from qcft.measure.ability_table import abilities_table, continual_nll
from qcft.measure.forgetting import forgetting_table
from qcft.recipe import Recipe
from qcft.recipe.stages import PROBES
from qcft.store import NamedRun, Store
from qcft.store.results import Run, Stage
from qcft.store.table import RunTable


def finished_run(run: NamedRun, recipe: Recipe, stages: Mapping[str, str], store: Store) -> Run:
    """A run's stages and table, from its done steps. Raises InputError for a step's file that was changed."""
    steps = {stage: found for stage, step in stages.items() if (found := store.open(step))}
    done = {
        name: Stage(name, one.step, one.metrics, one.record["seconds"], one.folder, one.record)
        for name, one in steps.items()
    }
    stages_table = forgetting_table(recipe, steps)
    names = {s["stage"].removeprefix(PROBES): (s["name"], s["precision"]) for s in stages_table["stages"]}
    table: RunTable = {
        **stages_table,
        "continual": continual_nll(recipe, stages_table),
        "abilities": abilities_table(recipe, steps, names),
    }
    return Run(run.name, run.folder, done, table)
