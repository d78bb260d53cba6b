"""The work as it goes: a line per step, one progress bar under them. On stderr."""

from __future__ import annotations

import time
from importlib.util import find_spec

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from qcft.events import Event, Mixed, Note, Progress, StepBegun, StepEnded
from qcft.safe import shown
from qcft.terminal.format import duration
from qcft.terminal.streams import said, stderr
from qcft.terminal.tables import mix_table

QUIET_SECONDS = 20  # between progress lines where no bar can be drawn


class Reporter:
    """Listens to the work and shows it: a line per step, one progress bar under them."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = stderr()
        self.quiet = quiet
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        self._label = ""
        self._begun = 0.0
        self._first = 0.0
        self._said = 0.0

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Progress):
            self._progress(event)
            return
        self._clear()
        if isinstance(event, Note):
            style = "yellow" if event.level == "warning" else "dim"
            prefix = "warning: " if event.level == "warning" else ""
            if not self.quiet or event.level == "warning":
                self.console.print(said(f"{prefix}{event.text}", style=style), soft_wrap=True)
        elif self.quiet:
            return
        elif isinstance(event, StepBegun):
            how = {"new": "", "resumed": "  going on from where it stopped", "reused": "  done before, reused"}[
                event.state
            ]
            style = "dim" if event.state == "reused" else "bold"
            self.console.print(said(f"[{event.position}/{event.total}] {event.title}{how}", style=style))
        elif isinstance(event, StepEnded):
            more = f": {event.summary}" if event.summary else ""
            self.console.print(said(f"      {duration(event.seconds)}{more}", style="dim"), soft_wrap=True)
        elif isinstance(event, Mixed):
            self.console.print(mix_table(event))

    def close(self) -> None:
        """Take the bar off the screen."""
        self._clear()

    def _progress(self, event: Progress) -> None:
        if self.quiet:
            return
        now = time.monotonic()
        if event.label.split(" (")[0] != self._label:
            self._clear()
            self._label, self._begun, self._first = event.label.split(" (")[0], now, event.done
            self._said = now
        figures = "  ".join(f"{k} {v}" if k in {"loss", "peak"} else v for k, v in event.stats.items())
        text = f"{self._pace(event, now)}  {figures}".rstrip()
        if not (self.console.is_terminal or _has_widgets(self.console)):
            if now - self._said > QUIET_SECONDS:
                self._said = now
                self.console.print(said(f"      {event.label}: {_of(event)}  {text}", style="dim"), soft_wrap=True)
            return
        if self._bars is None:
            label = TextColumn("      {task.description}", markup=False)
            stats = TextColumn("{task.fields[text]}", markup=False)
            self._bars = Bars(label, BarColumn(24), stats, console=self.console, transient=True)
            self._bars.start()
            self._task = self._bars.add_task(shown(event.label), total=event.total or None, text="")
        assert self._task is not None
        self._bars.update(
            self._task,
            description=shown(event.label),
            completed=event.done,
            total=event.total or None,
            text=f"{_of(event)}  {text}",
        )

    def _pace(self, event: Progress, now: float) -> str:
        done, seconds = event.done - self._first, now - self._begun
        if done <= 0 or seconds < 0.5:
            return ""
        rate = done / seconds
        left = f"  {duration((event.total - event.done) / rate)} left" if event.total > event.done else ""
        return f"{rate:.1f} {event.unit}/s{left}" if rate >= 1 else f"{1 / rate:.1f} s each{left}"

    def _clear(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars, self._task, self._label = None, None, ""


def notebook_reporter() -> Reporter | None:
    """What shows the work in a notebook; None elsewhere."""
    return Reporter() if stderr().is_jupyter else None


def _has_widgets(console: Console) -> bool:
    """Whether this is a notebook with what Rich's bars need to be drawn again in their place."""
    return console.is_jupyter and find_spec("ipywidgets") is not None


def _of(event: Progress) -> str:
    return f"{event.done:,.0f}/{event.total:,.0f} {event.unit}" if event.total else f"{event.done:,.0f} {event.unit}"
