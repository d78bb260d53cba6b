"""CSV as spreadsheets write it: commas, semicolons or tabs; a damaged file is refused with its line number.

pyarrow's reader (26) reports no line number, appends text after a closing quote to the cell, and reads 007 as 7.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from qcft.data.streams import lines_of
from qcft.errors import InputError

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
FIXES = 'write text that holds a comma, a quote or a line break as "...", a quote in it as "", or save as .jsonl'


def read_csv(stream: IO[str], path: Path) -> Iterator[dict[str, Any]]:
    """The records of a CSV file, opened as text with `newline=""`.

    The delimiter is the one of comma, semicolon and tab that splits the header into most columns, or the one in Excel's
    first line `sep=;`. Raises InputError for a line with more or fewer fields than the header, and for a quote that is
    not closed or is closed inside a field: a cell would then not be what its author wrote.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        lines = lines_of(stream, path)
        header = next(lines, "")
        named = header.strip()[4:] if header.lower().startswith("sep=") else None
        before = 1 if named is not None else 0
        if named is not None:
            header = next(lines, "")
        elif path.name.lower().removesuffix(".gz").endswith(".tsv"):
            named = "\t"
        delimiter = named or max(DELIMITERS, key=lambda one: len(next(csv.reader([header], delimiter=one), [])))
        reader = csv.reader(chain([header], lines), delimiter=delimiter, strict=True)
        yield from _records(reader, delimiter, before, path)
    except UnicodeDecodeError as error:
        raise InputError(
            f"data: {str(path)!r} is not readable as CSV: it is not in UTF-8 ({error.reason})", "save it as UTF-8 CSV"
        ) from None


def _records(reader: Any, delimiter: str, before: int, path: Path) -> Iterator[dict[str, Any]]:
    """`before`: lines of the file before the reader's first."""
    header: list[str] | None = None
    line = before + 1  # where the next record begins
    try:
        for fields in reader:
            if header is None:
                header = _header(fields, path)
            elif fields and len(fields) != len(header):
                raise InputError(
                    f"data: {str(path)!r}, line {line}: it has {len(fields)} field{'s' * (len(fields) > 1)} where the "
                    f"header has {len(header)} (separated by {DELIMITERS.get(delimiter, repr(delimiter))})",
                    FIXES,
                )
            elif fields:
                yield dict(zip(header, fields, strict=True))
            line = before + reader.line_num + 1
    except csv.Error as error:
        what = "a quote opens here and is not closed" if "end of data" in str(error) else _quote_error(error)
        raise InputError(f"data: {str(path)!r} is not readable as CSV, line {line}: {what}", FIXES) from None


def _quote_error(error: csv.Error) -> str:
    return "text follows a closing quote" if "expected after" in str(error) else str(error)


def _header(fields: list[str], path: Path) -> list[str]:
    names = [name.strip() for name in fields]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"data: {str(path)!r}: two columns are named {twice!r}", "rename or remove one of them")
    return names
