"""What a run comes to: its stages, and the table of stages and languages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcft.store.opened import DoneStep, Record


@dataclass(frozen=True)
class Stage:
    """One stage of a run: its step, what it measured and where its files are."""

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


@dataclass(frozen=True)
class Run:
    """A finished run: its stages by name, and the table of stages and languages as plain data.

    `failed` says why a task that a stage was to be evaluated on gave no score.
    """

    name: str
    folder: Path
    stages: Mapping[str, Stage]
    table: Mapping[str, Any]
    goal: str | None = None  # the stage of a merge that was asked for beyond the recipe's
    failed: Mapping[str, str] = field(default_factory=dict)
