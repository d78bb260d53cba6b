"""Loading a source: its rows, the rows held out from it, and what could not be used."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from qcft.data.files import SHIPPED, BadLine, read_records
from qcft.data.formats import COLUMNS, Unusable, column_names, detect_format, to_row
from qcft.data.rows import Row, digest_rows
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
    left_out: Counter[str] = Counter()
    format: str | None = None if source.format == "auto" else source.format
    label = f"reading {source.path}"
    seen = 0
    for record in read_records(source):
        seen += 1
        if seen % 5000 == 0:
            watch.progress(label, seen, 0, "rows")
        if isinstance(record, BadLine):
            left_out["bad JSON"] += 1
            continue
        if format is None:
            format = _detected(source, record)
        try:
            row = to_row(record, format)
        except Unusable as reason:
            left_out[str(reason)] += 1
            continue
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
    _check(source, seen, kept, aside, left_out, held_out, format)
    return LoadedSource(source, tuple(kept), tuple(aside), dict(left_out), digest_rows(kept) + digest_rows(aside))


def _detected(source: Source, record: dict[str, object]) -> str:
    format = detect_format(set(record))
    if format is None:
        raise InputError(
            f"data: {source.path!r} has the columns {column_names(record)}: no known format",
            "known: " + "; ".join(f"{name} ({columns})" for name, columns in COLUMNS.items()),
        )
    return format


def _check(
    source: Source,
    seen: int,
    train: list[Row],
    aside: list[Row],
    left_out: Counter[str],
    held_out: HeldOut,
    format: str | None,
) -> None:
    if not seen:
        raise InputError(f"data: {source.path!r} is empty", "give a data set with at least one row")
    if not train and not aside:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common(3))
        raise InputError(
            f"data: none of the {seen} rows of {source.path!r} can train ({reasons})",
            f"it was read as {format or 'JSON lines'}: {COLUMNS.get(format or '', 'one object a line, in UTF-8')}",
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
