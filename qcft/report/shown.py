"""What the commands that write a report, a model or a drawing print with --json."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from qcft.report.curve import CurvePoint
from qcft.store.metrics import DriftFound, KeptMetrics


class ReportWritten(TypedDict):
    """A report: the page's path, its runs, the question and the answer, and the tables' numbers."""

    page: str
    runs: list[str]
    question: str
    answer: str
    tables: dict[str, list[dict[str, object]]]


class Delivered(TypedDict):
    """What was written to a folder."""

    folder: str


class Merged(Delivered):
    """A merged model: its folder, its stage, and what merging kept (None where that was not measured)."""

    stage: str
    kept: KeptMetrics | None


class Exported(Delivered):
    """An adapter: its folder and its phase."""

    phase: str


class Dialled(TypedDict):
    """The curve of a phase, its drawing's path, and the point that was merged."""

    run: str
    phase: str
    points: list[CurvePoint]
    drawing: str
    merged: NotRequired[Merged]


class DriftShown(DriftFound):
    """What a drift found, of which run, and the drawing's path."""

    run: str
    drawing: str
