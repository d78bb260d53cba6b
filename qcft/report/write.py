"""A report's files: report.html, report.md, a CSV of each table, an SVG and a PNG of each plot."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from qcft.files import write_bytes, write_text
from qcft.report.cells import plain
from qcft.report.document import Document, Table
from qcft.report.markdown import to_markdown
from qcft.report.page import to_page

PAGE = "report.html"


def write_report(folder: Path, document: Document) -> Path:
    """Write a report into a folder; the page's path. The same runs give the same bytes."""
    for part in ("tables", "plots"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for table in document.tables():
        write_text(folder / "tables" / f"{table.name}.csv", to_csv(table))
    for figure in document.figures():
        write_text(folder / "plots" / f"{figure.name}.svg", figure.svg)
        write_bytes(folder / "plots" / f"{figure.name}.png", figure.png)
    write_text(folder / "report.md", plain(to_markdown(document)))
    write_text(folder / PAGE, plain(to_page(document)))
    return folder / PAGE


def to_csv(table: Table) -> str:
    """A table's numbers, unrounded."""
    names = list(dict.fromkeys(name for record in table.records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.records)
    return text.getvalue()
