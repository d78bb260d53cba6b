"""A report's files: report.html, report.md, a CSV file for each table, an SVG and a PNG file for each plot."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

from qcft.files import write_bytes, write_text
from qcft.report.document import Document, Table
from qcft.report.markdown import to_markdown
from qcft.report.page import to_page
from qcft.report.tidy import tidy_table
from qcft.safe import plain

PAGE = "report.html"
NUMBER = re.compile(r"[+-]?[\d.]+(e[+-]?\d+)?%?", re.IGNORECASE)


def write_report(folder: Path, document: Document) -> Path:
    """Write a report into a folder; returns the page's path. The same runs give the same bytes."""
    for part in ("tables", "plots"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for table in document.tables():
        write_text(folder / "tables" / f"{table.name}.csv", to_csv(table))
    for figure in document.figures():
        write_text(folder / "plots" / f"{figure.name}.svg", figure.svg)
        write_bytes(folder / "plots" / f"{figure.name}.png", figure.png)
    write_text(folder / "report.md", plain(to_markdown(document)))
    write_text(folder / PAGE, plain(to_page(document, files=True)))
    return folder / PAGE


def to_csv(table: Table) -> str:
    """A table's numbers, unrounded, one per row (report.tidy)."""
    rows = tidy_table(table)
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_cell, names))
    writer.writerows([_cell(row.get(name)) for name in names] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    """A cell that a spreadsheet reads as text or a number, never as a formula."""
    if not isinstance(value, str) or NUMBER.fullmatch(value):
        return value
    return ("'" if value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else "") + plain(value)
