"""Reading rows or prompts that replay is drawn from: no row of them is set aside, and prompts need no answers."""

from __future__ import annotations

from dataclasses import dataclass

from qcft.data.columns import Columns
from qcft.data.formats import COLUMNS, to_prompt, to_row
from qcft.data.records import RowReader
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


def read_pool(source: Source, answers: bool, watch: Watch, what: str = "replay") -> PoolRows:
    """The first `take` rows of a source; with `answers` false, prompts without an answer are rows too.

    Raises InputError, which names the recipe's key by `what`, when the source cannot be read or none of its records is
    usable.
    """
    rows: list[Row] = []
    reader = RowReader(source, to_row if answers else to_prompt, Columns(source, what, answers), watch)
    for row in reader:
        rows.append(row)
        if len(rows) == source.take:
            break
    if not rows:
        reasons = ", ".join(f"{n} {reason}" for reason, n in reader.left_out.most_common(3)) or "it is empty"
        raise InputError(
            f"{what}: {source.path!r} gives no row to use ({reasons})",
            "give it rows in one of these forms: " + "; ".join(f"{n} ({c})" for n, c in COLUMNS.items()),
        )
    reader.tell()
    assert not isinstance(source.lang, list)
    return PoolRows(tuple(rows), source.lang or "?", dict(reader.left_out))
