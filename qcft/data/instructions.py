"""A source's instructions, one after the other: what the user says first, with its input; answers are not needed."""

from __future__ import annotations

from collections.abc import Iterator

from qcft.data.files import BadLine, read_records
from qcft.data.formats import PROMPT_COLUMNS, Unusable, detect_format, detect_prompts, to_prompt
from qcft.errors import InputError
from qcft.recipe import Source


def instructions(source: Source, column: str | None = None) -> Iterator[str]:
    """The first `take` instructions, read as they are asked for; records that have none are passed over.

    `column` names a column of text to take instead, where the records are of no known format. Raises InputError when
    the source cannot be read, or has no instruction at all.
    """
    format: str | None = None if source.format == "auto" else source.format
    found = 0
    for record in read_records(source):
        if isinstance(record, BadLine):
            continue
        if column is not None:
            text = record.get(column)
            if column not in record:
                raise InputError(
                    f"data: {source.path!r} has no column {column!r}", f"it has {', '.join(map(str, record))}"
                )
        else:
            columns = {str(key) for key in record}
            format = format or detect_format(columns) or detect_prompts(columns)
            if format is None:
                raise InputError(
                    f"data: {source.path!r} has the columns {', '.join(columns) or '(none)'}: no known format",
                    f"known: {', '.join(sorted(set(PROMPT_COLUMNS.values())))}; or name one of text with --column",
                )
            try:
                turns = to_prompt(record, format).prompt
            except Unusable:
                continue
            text = "\n".join(turn.content.strip() for turn in turns if turn.role == "user")
        if isinstance(text, str) and text.strip():
            yield text.strip()
            found += 1
            if found == source.take:
                return
    if not found:
        raise InputError(f"data: {source.path!r} has no instruction", "give rows with a user turn")
