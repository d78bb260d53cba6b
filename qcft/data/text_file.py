"""Reads plain text files as documents of raw text: one per file, per paragraph or per line."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from qcft.data.streams import LONGEST, lines_of
from qcft.errors import InputError


def read_text_file(stream: IO[bytes], path: Path, sample_by: str) -> Iterator[dict[str, str]]:
    """The documents of a file, without white space around them: `document`, the whole file (may be empty); `paragraph`,
    separated by blank lines; `line`. Raises InputError for a file that is not text in UTF-8."""
    lines = _decoded(lines_of(stream, path), path)
    if sample_by == "document":
        yield {"text": "".join(_limited(lines, path)).strip()}
        return
    for filled, some in itertools.groupby(lines, key=lambda line: bool(line.strip())):
        if filled and sample_by == "paragraph":
            yield {"text": "".join(_limited(some, path)).strip()}
        elif filled:
            yield from ({"text": line.strip()} for line in some)


def _decoded(lines: Iterable[bytes], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"data: {str(path)!r} is not text in UTF-8: line {number}, {error.reason}",
                "save it as plain text in UTF-8, or remove what is not text",
            ) from None
        if "\0" in text:
            raise InputError(f"data: {str(path)!r} is binary, not text: line {number}", "give plain text in UTF-8")
        yield text


def _limited(lines: Iterable[str], path: Path) -> Iterator[str]:
    """The lines of one document, up to the limit."""
    total = 0
    for line in lines:
        total += len(line)
        if total > LONGEST:
            raise InputError(
                f"data: {str(path)!r} has a document of over {LONGEST // 10**6} million characters",
                "set sample_by: paragraph or sample_by: line, if it holds several documents",
            )
        yield line
