"""Output to the terminal: streams and consoles that pass no control characters and no secrets.

Text that a caller did not clean, and what libraries write themselves (warnings, tracebacks), is cleaned here.
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

WIDE = 130  # columns of a table that is written to a file or a pipe
BAR = re.compile(r"\r|\n*(\x1b\[A)*")  # how tqdm moves between its bars, in a write of its own or before a bar


class Terminal(io.FileIO):
    """A terminal that ignores all output once it was closed, so that the work reaches its next safe point."""

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
        """Write a text, cleaned."""
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
    """A console that treats no text as markup, and writes no control characters."""

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
        """The segments of a renderable, cleaned, without links, the only style of Rich with content of its own."""
        if isinstance(renderable, str):
            renderable = shown(renderable)
        elif isinstance(renderable, Text) and (clean := shown(renderable.plain)) != renderable.plain:
            renderable = Text(clean, renderable.style)
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else plain(text), style.update_link(None) if style else None, control)


def clean_streams() -> None:
    """Clean all that this process writes, output of libraries included.

    Characters that the terminal's encoding lacks are written as escapes; a closed stream ignores all output.
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
    """A text in a style, cleaned before its width is measured, so that tables stay aligned."""
    return Text(shown(text), style)
