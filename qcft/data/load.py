"""Reads a source into rows: rows to train on, held-out rows, and rows that replay is drawn from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qcft.data.columns import Columns
from qcft.data.files import BadLine
from qcft.data.formats import COLUMNS, DataRecord, Unusable, to_prompt, to_row
from qcft.data.rows import Row, digest_rows
from qcft.data.sources import SHIPPED, read_records
from qcft.errors import InputError
from qcft.events import Watch
from qcft.recipe import HeldOut, Source


class RowReader:
    """Reads a source once. `make` turns a record and its format into a row, or raises Unusable.

    `seen` counts the records read so far, `left_out` the dropped ones by reason; `report` notes lines that are not
    JSON, and columns that nothing reads.
    """

    def __init__(self, source: Source, make: Callable[[DataRecord, str], Row], columns: Columns, watch: Watch) -> None:
        self.source = source
        self.make = make
        self.columns = columns
        self.watch = watch
        self.seen = 0
        self.left_out: Counter[str] = Counter()
        self.bad: BadLine | None = None  # the first

    def __iter__(self) -> Iterator[Row]:
        for record in read_records(self.source, self.watch):
            self.seen += 1
            if self.seen % 5000 == 0:
                self.watch.progress(f"reading {self.source.path}", self.seen, 0, "rows")
            if isinstance(record, BadLine):
                self.left_out["bad JSON"] += 1
                self.bad = self.bad or record
                continue
            found = self.columns.read(record)
            if found is None:
                raise self.columns.unknown(record, self.seen)
            format, named = found
            try:
                row = self.make(named, format)
            except Unusable as reason:
                self.left_out[str(reason)] += 1
            else:
                yield row

    def report(self) -> None:
        """Report notes about the source to the watch."""
        if self.bad is not None:
            self.watch.note(
                f"{self.source.path}: {self.left_out['bad JSON']} of {self.seen:,} rows are not JSON objects and are "
                f"dropped; the first is {self.bad.where} ({self.bad.why})",
                "warning",
            )
        if self.columns.unused and not self.source.path.startswith(SHIPPED):
            self.watch.note(f"{self.source.path}: columns that are not used: {', '.join(self.columns.unused)}")


@dataclass(frozen=True)
class LoadedSource:
    """A source's rows to train on or draw from, and those to measure on, with the `digest` of both; `left_out` counts
    dropped records by reason."""

    source: Source
    rows: tuple[Row, ...]
    left_out: dict[str, int]
    held_out: tuple[Row, ...] = ()
    digest: str = ""

    @property
    def name(self) -> str:
        """Short name for tables."""
        path = self.source.path.rstrip("/")
        return path if path.startswith(SHIPPED) else path.rsplit("/", 1)[-1]

    @property
    def lang(self) -> str:
        """The language, or `?` if the recipe names none."""
        assert not isinstance(self.source.lang, list)
        return self.source.lang or "?"


def load_source(source: Source, held_out: HeldOut, watch: Watch) -> LoadedSource:
    """Read `take` rows to train on and up to `held_out.rows` to measure on, in the source's order.

    A row is held out by its key alone, so the rest of a held-out share that is larger than
    `held_out.rows` is set aside, never trained on. Raises InputError if nothing usable is found.
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
                left_out["reserved for the test set but not needed (heldout.rows)"] += 1
        elif source.take is None or len(train) < source.take:
            train.append(row)
        if source.take is not None and len(train) >= source.take and len(aside) >= held_out.rows:
            break
    held_prompts = {row.prompt_digest for row in aside}
    kept = [row for row in train if row.prompt_digest not in held_prompts]
    if len(kept) < len(train):
        left_out["same prompt as a held-out row"] += len(train) - len(kept)
    _check(reader, kept, aside, held_out)
    reader.report()
    return LoadedSource(source, tuple(kept), dict(left_out), tuple(aside), digest_rows(kept) + digest_rows(aside))


def read_pool(source: Source, answers: bool, watch: Watch, what: str = "replay") -> LoadedSource:
    """The first `take` rows of a source, to draw replay from or to measure on: none is set aside. With `answers` false,
    prompts without an answer count as rows.

    Raises InputError, with `what` as the recipe's key, if the source cannot be read or none of its records is usable.
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
    reader.report()
    return LoadedSource(source, tuple(rows), dict(reader.left_out))


def _check(reader: RowReader, train: list[Row], aside: list[Row], held_out: HeldOut) -> None:
    source, format = reader.source, reader.columns.format
    whole = format == "text" and source.sample_by in {None, "document"}
    more = "; a .txt file is one document: set sample_by: paragraph or line for more" if whole else ""
    if not reader.seen:
        raise InputError(f"data: {source.path!r} is empty", "give a data set with at least one row")
    bad = reader.left_out["bad JSON"]
    if reader.bad is not None and 2 * bad > reader.seen:
        raise InputError(
            f"data: {bad} of the {reader.seen} rows of {source.path!r} are not JSON objects; the first is "
            f"{reader.bad.where} ({reader.bad.why})",
            "write one JSON object per line, in UTF-8, with nothing after it",
        )
    if not train and not aside:
        reasons = ", ".join(f"{count} {reason}" for reason, count in reader.left_out.most_common(3))
        unread = any(reason.startswith("with ") for reason in reader.left_out)
        raise InputError(
            f"data: none of the {reader.seen} rows of {source.path!r} can be used for training ({reasons})",
            "qcft trains on text only: give rows without images and tool calls"
            if unread
            else f"it was read as {format}: {COLUMNS[format or 'alpaca']}",
        )
    if not train:
        raise InputError(
            f"data: all {len(aside)} usable rows of {source.path!r} fall into the held-out share of {held_out.share}",
            f"give more rows or a smaller heldout.share{more}",
        )
    if not aside:
        raise InputError(
            f"data: none of the {len(train)} rows of {source.path!r} falls into the held-out share of {held_out.share}",
            f"give more rows or a larger heldout.share, so that there is something to measure on{more}",
        )
