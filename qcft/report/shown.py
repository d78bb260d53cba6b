"""The JSON output of the commands that write a report, a model or a plot."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from qcft.report.curve import CurvePoint
from qcft.store.metrics import DeltaAmount, DriftFound, IntervalOf, KeptMetrics, Paired


class ReportWritten(TypedDict):
    """A report: the page's path, its runs, the question and the answer, and the tables' numbers."""

    page: str
    runs: list[str]
    question: str
    answer: str
    tables: dict[str, list[dict[str, object]]]


class Delivered(TypedDict):
    """The folder that was written; `pushed`: its address on the hub, if it was uploaded."""

    folder: str
    pushed: NotRequired[str]


class Merged(Delivered):
    """A merged model: its folder, its stage, and how much of the gain merging kept (None if not measured)."""

    stage: str
    kept: KeptMetrics | None


class Exported(Delivered):
    """An adapter: its folder and its phase."""

    phase: str


class GgufWritten(Merged):
    """A GGUF file in its folder: its path, its type, how much of the gain it `kept` (None if not measured), and its
    name in Ollama, if it was requested and created."""

    file: str
    type: str
    ollama: str | None


class HalfShown(TypedDict):
    """The results of a point on half the rows (measure.pick.Half)."""

    english: Paired
    others: Paired
    full_english: Paired
    full_others: Paired
    against_full: Paired
    kept: IntervalOf | None


class NotPicked(TypedDict):
    """No point has the share: the reason `why`; `said` in sentences."""

    share: float
    point: None
    why: str
    said: list[str]


class Picked(TypedDict):
    """The point of a dial to use (measure.pick.Pick): `since`, the stage that English is compared with; `said`, the
    result in sentences; `next`, the command that uses it."""

    share: float
    point: DeltaAmount
    points: int
    enough: int
    chosen: HalfShown
    reported: HalfShown
    since: str
    said: list[str]
    next: str


class Dialled(TypedDict):
    """The curve of a phase, the path of its plot, the point that was picked, and the one that was merged."""

    run: str
    phase: str
    points: list[CurvePoint]
    drawing: str
    pick: NotRequired[Picked | NotPicked]
    merged: NotRequired[Merged]


class DriftShown(DriftFound):
    """The results of a drift, its run, and the path of the plot."""

    run: str
    drawing: str
