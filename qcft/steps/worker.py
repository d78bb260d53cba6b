"""The one who does the steps of a recipe, each by the file of its kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcft.events import Watch
from qcft.models.load import free_memory
from qcft.prepare.prepared import Prepared
from qcft.steps.adapter import AdapterWork
from qcft.steps.base import StepWork
from qcft.steps.dial import DialWork
from qcft.steps.kept import KeptWork
from qcft.steps.layers import LayersWork
from qcft.steps.merge import MergeWork
from qcft.steps.probe import ProbeWork
from qcft.steps.replay import ReplayWork
from qcft.steps.step import Kind, Step
from qcft.steps.suite import SuiteWork
from qcft.steps.train import TrainWork
from qcft.steps.unchanged import inputs_unchanged
from qcft.store import Store

KINDS: dict[Kind, type[StepWork]] = {
    "probe": ProbeWork,
    "train": TrainWork,
    "adapter": AdapterWork,
    "merge": MergeWork,
    "replay": ReplayWork,
    "kept": KeptWork,
    "layers": LayersWork,
    "dial": DialWork,
}


class Worker:
    """Does the steps of one prepared recipe; `steps` are its plan's, pools with them, by id."""

    def __init__(self, prepared: Prepared, steps: Mapping[str, Step], store: Store, watch: Watch) -> None:
        self.inputs, self.store = prepared.inputs, store
        self.suite = SuiteWork(prepared, steps, store, watch)
        works = {kind: one(prepared, steps, store, watch) for kind, one in KINDS.items()}
        self.works: dict[Kind, StepWork] = {**works, "suite": self.suite}

    def work(self, step: Step, folder: Path) -> dict[str, Any]:
        """Do one step in its folder, resuming what a killed process left there. Raises ChangedInput."""
        if step.kind != "suite":
            self.suite.drop()
        with inputs_unchanged(self.inputs, self.store):
            try:
                return self.works[step.kind].work(step, folder)
            finally:
                free_memory()
