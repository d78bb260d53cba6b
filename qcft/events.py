"""What the working rooms tell whoever is watching; they never print.

A listener is any function of one event. `Watch` carries the listener and the wish to stop through the
rooms: every report of progress is also the place where a wish to stop is heard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from qcft.errors import Interrupted
from qcft.safe import without_tokens


@dataclass(frozen=True)
class Note:
    """A line for the user."""

    text: str
    level: Literal["info", "warning"] = "info"


@dataclass(frozen=True)
class StepBegun:
    """A step of the plan is taken up: made, gone on with, or found done."""

    step: str
    title: str
    position: int
    total: int
    state: Literal["new", "resumed", "reused"]


@dataclass(frozen=True)
class StepEnded:
    """A step is done; `seconds` is how long this process worked on it."""

    step: str
    title: str
    seconds: float
    summary: str = ""


@dataclass(frozen=True)
class Progress:
    """`done` of `total` `unit`s of one piece of work; `stats` are shown beside the bar."""

    label: str
    done: float
    total: float
    unit: str
    stats: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceShare:
    """One source's part in what a phase trains on, per epoch."""

    source: str
    rows: int
    tokens: int
    answer_tokens: int
    left_out: dict[str, int]


@dataclass(frozen=True)
class Mixed:
    """What a phase trains on, shown before it does; `terms`, of its loss beside cross-entropy."""

    phase: str
    shares: tuple[SourceShare, ...]
    steps: int
    rows_per_step: float
    frozen: str
    terms: str = ""


@dataclass(frozen=True)
class ArmChanged:
    """An arm of an ablation is taken up or ended; `position` of `total` counts arms x seeds."""

    run: str
    arm: str
    seed: int
    position: int
    total: int
    state: Literal["to do", "running", "done", "failed"]
    summary: str = ""


Event = Note | StepBegun | StepEnded | Progress | Mixed | ArmChanged
Listener = Callable[[Event], None]


class Watch:
    """The listener and the wish to stop, handed down through the rooms."""

    def __init__(self, listener: Listener | None = None) -> None:
        self._listeners = [listener] if listener else []
        self.stop_code: int | None = None

    def emit(self, event: Event) -> None:
        """Pass an event on to who listens."""
        for listener in self._listeners:
            listener(event)

    @contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Have another listener hear what is told meanwhile."""
        before = self._listeners
        self._listeners = [*before, listener]
        try:
            yield
        finally:
            self._listeners = before

    def note(self, text: str, level: Literal["info", "warning"] = "info") -> None:
        """Tell a line of text, without secrets that it may hold."""
        self.emit(Note(without_tokens(text), level))

    def progress(self, label: str, done: float, total: float, unit: str, **stats: str) -> None:
        """Tell how far a piece of work is; raises Interrupted if a stop was asked for."""
        self.check_stop()
        self.emit(Progress(label, done, total, unit, stats))

    def ask_to_stop(self, exit_code: int = 130) -> None:
        """Ask the work to end at its next safe point (from a signal handler)."""
        self.stop_code = exit_code

    def check_stop(self) -> None:
        """Raise Interrupted if a stop was asked for."""
        if self.stop_code is not None:
            raise Interrupted("stopped as asked", "the same command goes on from here", self.stop_code)
