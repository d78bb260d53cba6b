"""A recipe ready to be run: its data read, its steps planned."""

from __future__ import annotations

from typing import Any

from qcft.events import Watch
from qcft.plan import make_plan
from qcft.prepare.prepared import Prepared
from qcft.recipe import Recipe
from qcft.steps.step import Bench
from qcft.store import Store
from qcft.training.determinism import prepare_cublas


class PlannedRecipe(Prepared):
    """A recipe with its data read and its steps planned."""

    def __init__(self, recipe: Recipe, watch: Watch, memo: dict[Any, Any] | None = None) -> None:
        if recipe.deterministic:
            prepare_cublas()
        super().__init__(recipe, watch, memo)
        self.plan = make_plan(self.recipe, self.digests())

    def bench(self, store: Store, watch: Watch) -> Bench:
        """What the plan's steps need to run."""
        return Bench(self.for_steps.model, self.for_steps, self.inputs, self.plan.by_id(), store, watch)
