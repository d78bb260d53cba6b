"""Loading a source: its rows, the rows held out from it, and what could not be used."""

from __future__ import annotations

from dataclasses import dataclass

from qcft.data.columns import Columns
from qcft.data.formats import COLUMNS, to_row
from qcft.data.records import RowReader
from qcft.data.rows import Row, digest_rows
from qcft.data.sources import SHIPPED
from qcft.errors import InputError
from qcft.events import Watch
from qcft.recipe import HeldOut, Source


@dataclass(frozen=True)
class LoadedSource:
    """A source's rows to train on and rows to measure on; `left_out` counts records by reason."""

    source: Source
    rows: tuple[Row, ...]
    held_out: tuple[Row, ...]
    left_out: dict[str, int]
    digest: str

    @property
    def name(self) -> str:
        """Short name for tables."""
        path = self.source.path.rstrip("/")
        return path if path.startswith(SHIPPED) else path.rsplit("/", 1)[-1]

    @property
    def lang(self) -> str:
        """The language, or `?` where the recipe names none."""
        assert not isinstance(self.source.lang, list)
        return self.source.lang or "?"


def load_source(source: Source, held_out: HeldOut, watch: Watch) -> LoadedSource:
    """Read `take` rows to train on and up to `held_out.rows` to measure on, in the source's order.

    A row is held out by its key alone, so the rest of a held-out share that is larger than
    `held_out.rows` is set aside, never trained. Raises InputError when nothing usable is found.
    """
    train: list[Row] = []
    aside: list[Row] = []
    reader = RowReader(source, to_row, Columns(source), watch)
    left_out = reader.left_out
    for row in reader:
        if row.is_held_out(held_out.share):
            if len(aside) < held_out.rows:
                aside.append(row)
            else:
                left_out["held out beyond what is scored"] += 1
        elif source.take is None or len(train) < source.take:
            train.append(row)
        if source.take is not None and len(train) >= source.take and len(aside) >= held_out.rows:
            break
    held_prompts = {row.prompt_digest for row in aside}
    kept = [row for row in train if row.prompt_digest not in held_prompts]
    if len(kept) < len(train):
        left_out["same prompt as a held-out row"] += len(train) - len(kept)
    _check(reader, kept, aside, held_out)
    reader.tell()
    return LoadedSource(source, tuple(kept), tuple(aside), dict(left_out), digest_rows(kept) + digest_rows(aside))


def _check(reader: RowReader, train: list[Row], aside: list[Row], held_out: HeldOut) -> None:
    source, format = reader.source, reader.columns.format
    if not reader.seen:
        raise InputError(f"data: {source.path!r} is empty", "give a data set with at least one row")
    bad = reader.left_out["bad JSON"]
    if reader.bad is not None and 2 * bad > reader.seen:
        raise InputError(
            f"data: {bad} of the {reader.seen} rows of {source.path!r} are not a JSON object; the first is "
            f"{reader.bad.where} ({reader.bad.why})",
            "write one JSON object a line, in UTF-8, with nothing after it",
        )
    if not train and not aside:
        reasons = ", ".join(f"{count} {reason}" for reason, count in reader.left_out.most_common(3))
        unread = any(reason.startswith("with ") for reason in reader.left_out)
        raise InputError(
            f"data: none of the {reader.seen} rows of {source.path!r} can train ({reasons})",
            "qcft trains on text alone: give rows without images and tool calls"
            if unread
            else f"it was read as {format}: {COLUMNS[format or 'alpaca']}",
        )
    if not train:
        raise InputError(
            f"data: all {len(aside)} usable rows of {source.path!r} fall into the held-out share of {held_out.share}",
            "give more rows or a smaller heldout.share",
        )
    if not aside:
        raise InputError(
            f"data: none of the {len(train)} rows of {source.path!r} falls into the held-out share of {held_out.share}",
            "give more rows or a larger heldout.share, so that there is something to measure on",
        )
