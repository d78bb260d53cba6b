"""Events that the working code emits; it never prints.

A listener is any function of one event. `Watch` passes the listener and a request to stop through the
package: every report of progress also checks for that request.
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
    """A step of the plan starts: it is new, resumed, or reused as it is done already."""

    step: str
    title: str
    position: int
    total: int
    state: Literal["new", "resumed", "reused"]


@dataclass(frozen=True)
class StepEnded:
    """A step is done; `seconds` is the time this process spent on it."""

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
    """One source's share of what a phase trains on, per epoch."""

    source: str
    rows: int
    tokens: int
    answer_tokens: int
    left_out: dict[str, int]


@dataclass(frozen=True)
class Mixed:
    """What a phase trains on, shown before it starts; `terms`: those of its loss beside cross-entropy."""

    phase: str
    shares: tuple[SourceShare, ...]
    steps: int
    rows_per_step: float
    frozen: str
    terms: str = ""


@dataclass(frozen=True)
class ArmChanged:
    """The state of an ablation's arm changed; `position` of `total` counts arms x seeds."""

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
    """The listener and the request to stop, passed down to all code that works."""

    def __init__(self, listener: Listener | None = None) -> None:
        self._listeners = [listener] if listener else []
        self.stop_code: int | None = None

    def emit(self, event: Event) -> None:
        """Pass an event to the listeners."""
        for listener in self._listeners:
            listener(event)

    @contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Pass events to another listener too, inside the context."""
        before = self._listeners
        self._listeners = [*before, listener]
        try:
            yield
        finally:
            self._listeners = before

    def note(self, text: str, level: Literal["info", "warning"] = "info") -> None:
        """Emit a line of text; secrets in it are redacted."""
        self.emit(Note(without_tokens(text), level))

    def progress(self, label: str, done: float, total: float, unit: str, **stats: str) -> None:
        """Emit the progress of a piece of work. Raises Interrupted if a stop was requested."""
        self.check_stop()
        self.emit(Progress(label, done, total, unit, stats))

    def ask_to_stop(self, exit_code: int = 130) -> None:
        """Request that the work ends at its next safe point (from a signal handler)."""
        self.stop_code = exit_code

    def check_stop(self) -> None:
        """Raise Interrupted if a stop was requested."""
        if self.stop_code is not None:
            raise Interrupted(
                "stopped; everything finished so far is saved", "the same command resumes from here", self.stop_code
            )
