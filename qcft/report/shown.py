"""What the commands that write a report, a model or a drawing print with --json."""

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
    """What was written to a folder; `pushed`: its address on the hub, where it was uploaded."""

    folder: str
    pushed: NotRequired[str]


class Merged(Delivered):
    """A merged model: its folder, its stage, and what merging kept (None where that was not measured)."""

    stage: str
    kept: KeptMetrics | None


class Exported(Delivered):
    """An adapter: its folder and its phase."""

    phase: str


class GgufWritten(Merged):
    """A GGUF file in its folder: its path, its type, what it `kept` (None where that was not measured), and the name
    under which Ollama has it, where it was asked for and is there."""

    file: str
    type: str
    ollama: str | None


class HalfShown(TypedDict):
    """What a point comes to on half the rows (measure.pick.Half)."""

    english: Paired
    others: Paired
    full_english: Paired
    full_others: Paired
    against_full: Paired
    kept: IntervalOf | None


class NotPicked(TypedDict):
    """That no point has the share, and `why`; `said` in sentences."""

    share: float
    point: None
    why: str
    said: list[str]


class Picked(TypedDict):
    """The point of a dial to take (measure.pick.Pick), `since` which stage English counts, in sentences what is `said`
    of it, and the command that uses it `next`."""

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
    """The curve of a phase, its drawing's path, the point that was picked, and the one that was merged."""

    run: str
    phase: str
    points: list[CurvePoint]
    drawing: str
    pick: NotRequired[Picked | NotPicked]
    merged: NotRequired[Merged]


class DriftShown(DriftFound):
    """What a drift found, of which run, and the drawing's path."""

    run: str
    drawing: str
