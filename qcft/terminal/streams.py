"""What goes to the terminal: two streams and consoles through which nothing passes that steers it, and no secret.

Whatever a caller forgets to clean, and what libraries write by themselves (warnings, tracebacks), is cleaned here.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.segment import Segment
from rich.text import Text

from qcft.safe import plain, shown

WIDE = 130  # columns of a table that goes to a file or a pipe
BAR = re.compile(r"\r|\n*(\x1b\[A)*")  # how tqdm moves between its bars, in a write of its own or before a bar


class Terminal(io.FileIO):
    """A terminal that takes all and shows none once it was closed: the work goes to its next safe point."""

    def write(self, data: Any) -> int:
        """Write bytes."""
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return len(data)


class CleanStream:
    """A stream that cleans all text; `rich_proxied_file` is the stream below, which Rich's consoles write to."""

    def __init__(self, stream: Any) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        """Write a text as it may be shown."""
        moves = BAR.match(text) if self.isatty() else None
        end = moves.end() if moves and (moves[0] == "\r" or moves.end() == len(text)) else 0
        self.rich_proxied_file.write(text[:end] + shown(text[end:]))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


class CleanConsole(Console):
    """A console that takes no text for markup, and writes none that steers the terminal."""

    def __init__(self, stream: Any) -> None:
        wide = None if stream.isatty() else WIDE
        super().__init__(file=stream, highlight=False, markup=False, emoji=False, width=wide)

    def print_text(self, text: str, style: str = "", indent: int = 0) -> None:
        """Print a text: wrapped by word on a terminal, elsewhere as one line."""
        if self.is_terminal:
            self.print(Padding(said(text, style), (0, 0, 0, indent), expand=False))
        else:
            self.print(said(" " * indent + text, style), soft_wrap=True)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What a renderable comes to. Links are Rich's only style that says more than how text looks."""
        if isinstance(renderable, str):
            renderable = shown(renderable)
        elif isinstance(renderable, Text) and (clean := shown(renderable.plain)) != renderable.plain:
            renderable = Text(clean, renderable.style)
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else plain(text), style.update_link(None) if style else None, control)


def clean_streams() -> None:
    """Let all that this process writes be cleaned, libraries' output with it.

    What the terminal's encoding lacks is written as an escape; a stream that was closed takes all and keeps none.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            if stream.isatty() and isinstance(stream.buffer, io.BufferedWriter | io.FileIO):  # a real one
                raw = io.BufferedWriter(Terminal(stream.fileno(), "w", closefd=False))
                stream = io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=True)
        if not isinstance(stream, CleanStream):
            setattr(sys, name, CleanStream(stream))


def stdout() -> CleanConsole:
    """The console for data."""
    return CleanConsole(_below(sys.stdout))


def stderr() -> CleanConsole:
    """The console for everything else."""
    return CleanConsole(_below(sys.stderr))


def _below(stream: Any) -> Any:
    while hasattr(stream, "rich_proxied_file"):
        stream = stream.rich_proxied_file
    return stream


def said(text: str, style: str = "") -> Text:
    """A text in a style, cleaned before it is measured, so that tables stay in line."""
    return Text(shown(text), style)
