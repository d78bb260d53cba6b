"""A run's stages as models that answer: one set of weights in memory at a time, adapters switched on it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qcft.errors import InputError
from qcft.events import Watch
from qcft.inspect.versions import Version, weights_folder_of
from qcft.models.gpus import choose_gpu
from qcft.models.load import free_memory, load_model, quiet_libraries
from qcft.models.switch import Adapters, can_switch
from qcft.prepare.model import PreparedModel
from qcft.runner.libraries import set_environment
from qcft.store import NamedRun, Store
from qcft.store.opened import run_again

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class StageModel:
    """A stage of a run as a model: `version` says which weights and adapters, `label` heads its answers."""

    label: str
    version: Version
    prepared: PreparedModel


def finished_phases(run: NamedRun, store: Store) -> list[str]:
    """The phases of a run that are done, in their order. Raises InputError where none is."""
    names = [phase.name for phase in run.recipe().phases]
    done = [name for name in names if name in run.stages and store.open(run.stages[name])]
    if not done:
        raise InputError(f"no phase of the run {run.name!r} is done", f"run it first: {run_again(run.folder)}")
    return done


def distinct(stages: Iterable[StageModel], watch: Watch) -> list[StageModel]:
    """The stages, each model once; of two that are the same model the second is named in a note."""
    found: dict[Hashable, StageModel] = {}
    for one in stages:
        first = found.setdefault((one.prepared.key, one.version.weights, one.version.stack), one)
        if first.label != one.label:
            watch.note(f"{one.label} is the same model as {first.label}")
    return list(found.values())


class StageLoader:
    """Loads the models of stages. Where a stage shares weights with the one before it, only adapters are switched."""

    def __init__(self, store: Store, watch: Watch) -> None:
        set_environment()
        quiet_libraries()
        if card := choose_gpu():
            watch.note(f"running on {card}; to use another, set QCFT_DEVICE=cuda:N")
        self.store, self.watch = store, watch
        self.loads = 0
        self._key: Hashable = None
        self._model: Adapters | None = None

    def weights_of(self, stage: StageModel) -> Hashable:
        """A key that is equal for stages that share their weights in memory."""
        stack = self._stack(stage)
        return (stage.prepared.key, stage.version.weights, None if can_switch(stack) else tuple(stack))

    def has(self, stage: StageModel) -> bool:
        """Whether the stage's weights are in memory."""
        return self._model is not None and self.weights_of(stage) == self._key

    def use(self, stage: StageModel) -> PreTrainedModel:
        """The stage's model, its adapters live. Raises InputError for a file of a step that was altered."""
        if not self.has(stage):
            self._model = None
            free_memory()
            self.watch.note(f"loading the weights of {stage.label}")
            folder = weights_folder_of(stage.version, stage.prepared.folder, self.store)
            self._key, self._model = self.weights_of(stage), Adapters(load_model(folder, stage.prepared.asked))
            self.loads += 1
        loaded, self._model = (
            self._model,
            None,
        )  # an interrupted switch is not used
        assert loaded is not None
        model = loaded.use(self._stack(stage))
        self._model = loaded
        return model

    def _stack(self, stage: StageModel) -> list[Path]:
        return [self.store.opened(step).part("adapter") for step in stage.version.stack]
