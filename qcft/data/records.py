"""The records of a source as rows, with what could not be used counted by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from qcft.data.columns import Columns
from qcft.data.files import BadLine
from qcft.data.formats import Record, Unusable
from qcft.data.rows import Row
from qcft.data.sources import SHIPPED, read_records
from qcft.events import Watch
from qcft.recipe import Source


class RowReader:
    """Reads a source once. `make` turns a record and its format into a row, or raises Unusable.

    `seen` counts the records read so far, `left_out` those that are no rows; at the end the watch is told of lines
    that are no JSON and of columns that nothing reads.
    """

    def __init__(self, source: Source, make: Callable[[Record, str], Row], columns: Columns, watch: Watch) -> None:
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

    def tell(self) -> None:
        """Tell the watch what a person should know of a source that was read."""
        if self.bad is not None:
            self.watch.note(
                f"{self.source.path}: {self.left_out['bad JSON']} of {self.seen:,} rows are not a JSON object and are "
                f"dropped; the first is {self.bad.where} ({self.bad.why})",
                "warning",
            )
        if self.columns.unused and not self.source.path.startswith(SHIPPED):
            self.watch.note(f"{self.source.path}: columns that are not used: {', '.join(self.columns.unused)}")
