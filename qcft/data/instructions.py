"""A source's instructions, one after the other: what the user says first, with its input; answers are not needed."""

from __future__ import annotations

from collections.abc import Iterator

from qcft.data.files import BadLine, read_records
from qcft.data.formats import PROMPT_COLUMNS, Unusable, detect_format, detect_prompts, to_prompt
from qcft.errors import InputError
from qcft.recipe import Source


def instructions(source: Source, column: str | None = None) -> Iterator[str]:
    """The first `take` instructions, read as they are asked for; records that have none are passed over.

    `column` names the column of text to take where the records are of no known format. Raises InputError when the
    source cannot be read, or has no instruction at all.
    """
    format: str | None = None if source.format == "auto" else source.format
    found = 0
    for record in read_records(source):
        if isinstance(record, BadLine):
            continue
        columns = {str(key) for key in record}
        format = format or detect_format(columns) or detect_prompts(columns)
        if format is not None:
            try:
                turns = to_prompt(record, format).prompt
            except Unusable:
                continue
            text = "\n".join(turn.content.strip() for turn in turns if turn.role == "user")
        elif column in record:
            text = record[column]
        else:
            known = ", ".join(sorted(set(PROMPT_COLUMNS.values())))
            raise InputError(
                f"data: {source.path!r} has the columns {', '.join(map(str, record)) or '(none)'}: "
                + (f"no column {column!r}" if column else "no known format"),
                "name a column of text with --column" + ("" if column else f"; known are {known}"),
            )
        if isinstance(text, str) and text.strip():
            yield text.strip()
            found += 1
            if found == source.take:
                return
    if not found:
        raise InputError(f"data: {source.path!r} has no instruction", "give rows with a user turn")
