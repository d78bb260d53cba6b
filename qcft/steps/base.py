"""What work on steps has in common: where files lie, and how models are loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.events import Watch
from qcft.models.adapters import load_stack
from qcft.models.load import load_model
from qcft.prepare.prepared import Prepared
from qcft.recipe import Phase
from qcft.steps.step import Step
from qcft.store import Store
from qcft.store.steps import model_digest
from qcft.training.distributed.ranks import sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StepWork(ABC):
    """Does the steps of one kind of one prepared recipe."""

    def __init__(self, prepared: Prepared, steps: Mapping[str, Step], store: Store, watch: Watch) -> None:
        self.prepared = prepared
        self.steps = steps  # the plan's, its pools with them, by id
        self.recipe = prepared.recipe
        self.store = store
        self.watch = watch

    @abstractmethod
    def work(self, step: Step, folder: Path) -> dict[str, Any]:
        """Do one step in its folder, going on with what a killed process left there; its metrics."""

    def adapter(self, step: str) -> Path:
        """The folder of a step's adapter."""
        return self.store.opened(step).part("adapter")

    def weights(self, step: Step) -> Path:
        """The folder of the 16-bit weights a step goes by."""
        if step.weights is None:
            return self.prepared.folder
        return self.store.opened(step.weights).part("model", self.watch)

    def phase(self, step: Step) -> Phase:
        """The phase a step is of."""
        assert step.phase is not None
        return self.recipe.phase(step.phase)

    def measured(self, step: Step) -> dict[str, float] | None:
        """What a training's freeze spec goes by, module by module; None where it goes by names."""
        for parent in step.parents:
            found = self.store.opened(parent)
            if found.has("layers.json"):
                return dict(found.json("layers.json")["modules"])
        return None

    def weights_digest(self, step: Step) -> str:
        """The digest of those weights."""
        return self.prepared.model.digest if step.weights is None else model_digest(self.store, step.weights)

    def load(self, step: Step, quantize: str | None = None) -> PreTrainedModel:
        """The step's weights as the recipe loads them, its adapters live on them."""
        dealt_out = step.kind == "train" and sharded()
        model = load_model(self.weights(step), self.recipe.model, quantize, dealt_out)
        if step.adapter is not None and step.kind != "train":
            return load_stack(model, [self.adapter(one) for one in (*step.under, step.adapter)])
        return model
