"""The progress of the work: a line per step, one line of progress under them. On stderr."""

from __future__ import annotations

import time
from importlib.util import find_spec

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from qcft.events import Event, Mixed, Note, Progress, StepBegun, StepEnded
from qcft.terminal.format import duration, remaining
from qcft.terminal.streams import said, stderr
from qcft.terminal.tables import mix_table
from qcft.words import counted

QUIET_SECONDS = 20  # between progress lines where no bar can be drawn
NARROW, WIDE = 8, 24  # columns of a bar
GAP = 2  # columns between the parts of a line
FIRST = ("English", "loss")  # figures that are shown before the speed of the work; others after it
NAMED = {"loss", "peak"}  # figures shown with their names


class Bar:
    """One piece of work as a line: a bar, its progress, the time left, then figures that fit.

    Figures that do not fit in a narrow terminal are dropped, the last one first, so that none is truncated.
    """

    def __init__(self, event: Progress, now: float) -> None:
        self.label = _label(event)
        self._begun, self._first = now, event.done
        self.update(event, now)

    def update(self, event: Progress, now: float) -> None:
        """Show a newer event of the same work."""
        self.event = event
        pace, left = self._pace(now)
        figures = {key: f"{key} {value}" if key in NAMED else value for key, value in event.stats.items()}
        first = [figures.pop(key) for key in FIRST if key in figures]
        self.leading = [part for part in (_of(event), left, *first) if part]
        self.others = [part for part in (pace, *figures.values()) if part]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The line in the available width."""
        room = options.max_width - GAP - NARROW
        label, shown = "", []
        for part in (*self.leading, self.event.label, *self.others):
            wide = GAP + said(part).cell_len
            if wide > room:
                break
            room -= wide
            if part is self.event.label:
                label = part
            else:
                shown.append(part)
        line = Table.grid(padding=(0, GAP, 0, 0))
        bar = ProgressBar(self.event.total or None, self.event.done, min(WIDE, NARROW + room), not self.event.total)
        cells = [said(part) for part in shown]
        line.add_row("", *([said(label)] if label else []), bar, *cells)
        yield line

    def in_words(self) -> str:
        """The line as text, where no bar can be drawn."""
        return f"{self.event.label}: " + "  ".join((*self.leading, *self.others))

    def _pace(self, now: float) -> tuple[str, str]:
        """The speed, and the time left; empty as long as they are not known."""
        done, seconds = self.event.done - self._first, now - self._begun
        if done <= 0 or seconds < 0.5:
            return "", ""
        rate, ahead = done / seconds, self.event.total - self.event.done
        pace = f"{rate:.1f} {self.event.unit}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
        return pace, f"{remaining(ahead / rate)} left" if ahead > 0 else ""


class Reporter:
    """Listens to the work and shows it: a line per step, one line of progress under them."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = stderr()
        self.quiet = quiet
        self._bar: Bar | None = None
        self._live: Live | None = None
        self._said = 0.0
        self._reused = 0

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Progress):
            self._progress(event)
            return
        self._clear()
        if isinstance(event, StepBegun) and event.state == "reused":
            self._reused += 1
            return
        self._print_reused()
        if isinstance(event, Note):
            style = "yellow" if event.level == "warning" else "dim"
            prefix = "warning: " if event.level == "warning" else ""
            if not self.quiet or event.level == "warning":
                self.console.print_text(f"{prefix}{event.text}", style)
        elif self.quiet:
            return
        elif isinstance(event, StepBegun):
            how = ", resumed" if event.state == "resumed" else ""
            self.console.print(said(f"[{event.position}/{event.total}] {event.title}{how}", style="bold"))
        elif isinstance(event, StepEnded):
            more = f": {event.summary}" if event.summary else ""
            self.console.print_text(f"{duration(event.seconds)}{more}", "dim", indent=6)
        elif isinstance(event, Mixed):
            self.console.print(mix_table(event))

    def close(self) -> None:
        """Remove the bar from the screen."""
        self._clear()
        self._print_reused()

    def _print_reused(self) -> None:
        """One line for all steps that were reused one after another."""
        if self._reused and not self.quiet:
            self.console.print_text(f"{counted(self._reused, 'step')} reused", "dim")
        self._reused = 0

    def _progress(self, event: Progress) -> None:
        if self.quiet:
            return
        now = time.monotonic()
        if self._bar is None or self._bar.label != _label(event):
            self._clear()
            self._said = now
        self._follow(event, now)
        assert self._bar is not None
        if not (self.console.is_terminal or _has_widgets(self.console)):
            if now - self._said > QUIET_SECONDS:
                self._said = now
                self.console.print_text(self._bar.in_words(), "dim", indent=6)
        elif self._live is None:
            self._live = Live(self._bar, console=self.console, refresh_per_second=10, transient=True)
            self._live.start()

    def _follow(self, event: Progress, now: float) -> None:
        """Show an event in the bar, or in a new bar where it is of other work."""
        if self._bar is None or self._bar.label != _label(event):
            self._bar = Bar(event, now)
        else:
            self._bar.update(event, now)

    def _clear(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live, self._bar = None, None


def _label(event: Progress) -> str:
    """The name of a piece of work, which differs from that of the next."""
    return event.label.split(" (")[0]


def notebook_reporter() -> Reporter | None:
    """What shows the work in a notebook; None elsewhere."""
    return Reporter() if stderr().is_jupyter else None


def _has_widgets(console: Console) -> bool:
    """Whether this is a notebook with what Rich needs to redraw a bar in place."""
    return console.is_jupyter and find_spec("ipywidgets") is not None


def _of(event: Progress) -> str:
    return f"{event.done:,.0f}/{event.total:,.0f} {event.unit}" if event.total else f"{event.done:,.0f} {event.unit}"
