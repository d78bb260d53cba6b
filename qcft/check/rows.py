"""What may be wrong with a phase's rows: too long for the model, like a held-out row, an almost empty answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

from qcft.data.encode import EncodedSet
from qcft.data.rows import Row
from qcft.prepare.prepared import Prepared
from qcft.recipe import Phase

# Placeholders for a missing answer, beside answers without a letter or a digit.
PLACEHOLDERS = {"n/a", "none", "null", "nan", "<nooutput>", "<noinput>", "no output"}


class RowCount(TypedDict):
    """How many rows, and the name of one of them."""

    rows: int
    example: str | None


class Looks(TypedDict):
    """What a person should check among a phase's rows."""

    max_length: int
    positions: int | None
    rows_beyond: int
    like_held_out: RowCount
    near_empty: RowCount


def look_at_rows(prepared: Prepared, phase: Phase, sets: Sequence[EncodedSet]) -> Looks:
    """What a person should check before the phase is trained.

    `positions`: tokens the model has positions for, where `max_length` is more, with the number of rows that are
    longer; else None. `like_held_out`: rows whose prompt is that of a held-out row except for white space and case.
    `near_empty`: rows with an answer of no letter or digit, or one such as N/A. The last two with an example.
    """
    config = prepared.meta_model.config.get_text_config()
    positions = int(getattr(config, "max_position_embeddings", None) or phase.train.max_length)
    beyond = phase.train.max_length > positions
    held = {_plain(row) for group in prepared.groups for row in group.rows}
    rows = [row for one in sets for row in one.rows]
    return {
        "max_length": phase.train.max_length,
        "positions": positions if beyond else None,
        "rows_beyond": sum(len(e.input_ids) > positions for one in sets for e in one.encoded),
        "like_held_out": _counted(row for row in rows if _plain(row) in held),
        "near_empty": _counted(row for row in rows if any(_says_nothing(m.content) for m in _answers(row))),
    }


def _plain(row: Row) -> str:
    """What the user says first, or a document, without what changes no meaning."""
    turns = row.prompt or row.completion
    return " ".join(" ".join(m.content for m in turns if m.role != "system").split()).casefold()


def _answers(row: Row) -> Iterable[Any]:
    return (m for m in row.completion if m.role == "assistant")


def _says_nothing(text: str) -> bool:
    return text.strip().lower().rstrip(".") in PLACEHOLDERS or not any(map(str.isalnum, text))


def _counted(rows: Iterable[Row]) -> RowCount:
    found = list(rows)
    return {"rows": len(found), "example": found[0].name if found else None}
