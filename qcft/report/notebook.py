"""A report's first table and plot as HTML for a notebook cell; every text is escaped, there is no script."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from itertools import islice

from qcft.report.document import Document, Figure, Sample, Table
from qcft.safe import plain

CELL = "text-align:left;vertical-align:top;white-space:pre-line"


def in_notebook(document: Document) -> str:
    """The question, the answer, the first table and the first plot."""
    head = f"<p>{escape(document.question)}<br><strong>{escape(document.answer)}</strong></p>"
    tables, figures = islice(document.tables(), 1), islice(document.figures(), 1)
    return plain(head + "".join(map(_table, tables)) + "".join(map(_figure, figures)))


def samples_in_notebook(samples: Iterable[Sample]) -> str:
    """Prompts with their answers side by side."""
    parts = []
    for sample in samples:
        titles = [answer.stage for answer in sample.answers]
        parts.append(f"<h4 dir='auto'>{escape(sample.prompt)}</h4>{_grid(titles, [[a.text for a in sample.answers]])}")
    return plain("".join(parts))


def _table(table: Table) -> str:
    return f"<p>{escape(table.caption)}</p>{_grid(table.head, table.rows)}<small>{escape(table.note)}</small>"


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    titles = "".join(f'<th style="{CELL}">{escape(title)}</th>' for title in head)
    body = ("".join(f'<td dir="auto" style="{CELL}">{escape(cell)}</td>' for cell in row) for row in rows)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in body)}</tbody></table>"


def _figure(figure: Figure) -> str:
    """An image, so that its styles and ids do not affect other cells."""
    data = base64.b64encode(figure.svg.encode()).decode()
    return f'<img alt="{escape(figure.alt)}" style="max-width:36rem" src="data:image/svg+xml;base64,{data}">'
