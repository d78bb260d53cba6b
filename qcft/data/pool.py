"""Reading rows or prompts that replay is drawn from: no row of them is set aside, and prompts need no answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from qcft.data.files import BadLine, read_records
from qcft.data.formats import (
    COLUMNS,
    PROMPT_COLUMNS,
    Unusable,
    column_names,
    detect_format,
    detect_prompts,
    to_prompt,
    to_row,
)
from qcft.data.rows import Row
from qcft.errors import InputError
from qcft.events import Watch
from qcft.recipe import Source


@dataclass(frozen=True)
class PoolRows:
    """Rows with the language of each source; `left_out` counts records by reason."""

    rows: tuple[Row, ...]
    lang: str
    left_out: dict[str, int]


def read_pool(source: Source, answers: bool, watch: Watch) -> PoolRows:
    """The first `take` rows of a source; with `answers` false, prompts without an answer are rows too.

    Raises InputError when the source cannot be read or none of its records is usable.
    """
    rows: list[Row] = []
    left_out: Counter[str] = Counter()
    format: str | None = None if source.format == "auto" else source.format
    seen = 0
    for record in read_records(source):
        seen += 1
        if seen % 5000 == 0:
            watch.progress(f"reading {source.path}", seen, 0, "rows")
        if isinstance(record, BadLine):
            left_out["bad JSON"] += 1
            continue
        if format is None:
            columns = {str(key) for key in record}
            format = detect_format(columns) if answers else detect_format(columns) or detect_prompts(columns)
            if format is None:
                raise _unknown(source, record, answers)
        try:
            rows.append(to_row(record, format) if answers else to_prompt(record, format))
        except Unusable as reason:
            left_out[str(reason)] += 1
        if len(rows) == source.take:
            break
    if not rows:
        reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.most_common(3)) or "it is empty"
        raise InputError(
            f"replay: {source.path!r} gives no row to draw from ({reasons})",
            "give it rows in one of these forms: " + "; ".join(f"{n} ({c})" for n, c in COLUMNS.items()),
        )
    assert not isinstance(source.lang, list)
    return PoolRows(tuple(rows), source.lang or "?", dict(left_out))


def _unknown(source: Source, record: dict[str, object], answers: bool) -> InputError:
    known = COLUMNS if answers else PROMPT_COLUMNS
    return InputError(
        f"replay: {source.path!r} has the columns {column_names(record)}: no known format",
        "known: " + "; ".join(f"{name} ({columns})" for name, columns in known.items()),
    )
