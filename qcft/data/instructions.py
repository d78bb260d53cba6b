"""A source's instructions, one by one: the first user turn with its input; answers are not needed.

For raw text the documents, of which a sentence encoder reads the beginning.
"""

from __future__ import annotations

from collections.abc import Iterator

from qcft.data.columns import Columns
from qcft.data.files import BadLine
from qcft.data.formats import PROMPT_COLUMNS, Unusable, column_names, to_prompt
from qcft.data.sources import read_records
from qcft.errors import InputError
from qcft.recipe import Source


def instructions(source: Source, column: str | None = None) -> Iterator[str]:
    """The first `take` instructions, read lazily; records without one are skipped.

    `column` names the column of text to use if the records are of an unknown format. Raises InputError if the source
    cannot be read, or has no instruction at all.
    """
    columns = Columns(source, answers=False, aliases=column is None)
    found = 0
    for record in read_records(source):
        if isinstance(record, BadLine):
            continue
        known = columns.read(record)
        if known is not None:
            format, named = known
            try:
                row = to_prompt(named, format)
            except Unusable:
                continue
            text = row.text or "\n".join(turn.content.strip() for turn in row.prompt if turn.role == "user")
        elif column in record:
            text = record[column]
        else:
            usual = ", ".join(sorted(set(PROMPT_COLUMNS.values())))
            raise InputError(
                f"data: {source.path!r} has the columns {column_names(record)}: "
                + (f"no column {column!r}" if column else "no known format"),
                "name a column of text with --column" + ("" if column else f"; known are {usual}"),
            )
        if isinstance(text, str) and text.strip():
            yield text.strip()
            found += 1
            if found == source.take:
                return
    if not found:
        raise InputError(f"data: {source.path!r} has no instruction", "give rows with a user turn")
