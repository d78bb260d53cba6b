"""The results of a run: its stages, and the table of stages and languages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from qcft.store.metrics import TrainMetrics
from qcft.store.opened import DoneStep, Record
from qcft.store.table import RunTable


@dataclass(frozen=True)
class Stage:
    """One stage of a run: its step, what it measured (store.metrics has the keys) and where its files are."""

    name: str
    step: str
    metrics: Mapping[str, Any]
    seconds: float
    folder: Path
    record: Record = field(repr=False)

    @property
    def opened(self) -> DoneStep:
        """Its step, whose files are checked as they are read."""
        return DoneStep(self.step, self.folder, self.record)

    @property
    def training(self) -> TrainMetrics | None:
        """The metrics of a training; None for other kinds of step."""
        return cast("TrainMetrics", self.metrics) if self.step.startswith("train-") else None


@dataclass(frozen=True)
class Run:
    """A finished run: its stages by name, and the table of stages and languages as plain data.

    `failed` says why a task that a stage was to be evaluated on gave no score.
    """

    name: str
    folder: Path
    stages: Mapping[str, Stage]
    table: RunTable
    goal: str | None = None  # the stage of a merge that was requested beyond the recipe's
    failed: Mapping[str, str] = field(default_factory=dict)

    def trainings(self) -> list[TrainMetrics]:
        """The metrics of its trainings."""
        return [found for stage in self.stages.values() if (found := stage.training)]
