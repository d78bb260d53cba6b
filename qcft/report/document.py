"""What a report is made of before it is written: sections of tables, plots, answers and text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """Cells as they are read; `records` are the same numbers unrounded, a line each, for `--json` and the CSV file.

    `name` names that file, `measure` says what the `value` of a record is; `values` are the file's rows where they do
    not follow from the records (report.tidy). `words` are the columns that hold text, not numbers; `strong` the rows
    that stand out.
    """

    name: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    records: tuple[Mapping[str, object], ...]
    note: str = ""
    words: tuple[int, ...] = (0,)
    strong: frozenset[int] = frozenset()
    measure: str = "value"
    values: tuple[Mapping[str, object], ...] = ()

    @classmethod
    def of(
        cls, name: str, caption: str, rows: Sequence[Mapping[str, str]], records: Iterable[Mapping[str, object]],
        note: str = "", words: Iterable[str] = (), strong: Iterable[int] = (), measure: str = "value",
        values: Iterable[Mapping[str, object]] = (),
    ) -> Table:  # fmt: skip
        """A table of rows that say each cell's title; the first column, `of`, `change` and `words` hold text."""
        head = tuple(rows[0]) if rows else ()
        text = {*head[:1], "of", "change", *words}
        places = tuple(i for i, title in enumerate(head) if title in text)
        cells = tuple(tuple(row.values()) for row in rows)
        return cls(
            name, caption, head, cells, tuple(records), note, places, frozenset(strong), measure, tuple(values)
        )  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A plot: `svg` and `png` are its files, `wide` the SVG for wide screens, `alt` says what it shows to those who
    can't see it."""

    name: str
    caption: str
    alt: str
    svg: str
    png: bytes = field(repr=False)
    wide: str = field(repr=False)


@dataclass(frozen=True)
class Answer:
    """What one stage answered; `finished` unless it was cut at the most tokens it may have."""

    stage: str
    text: str
    finished: bool


@dataclass(frozen=True)
class Sample:
    """A prompt with its answers side by side; `lang` is a BCP 47 tag, or empty where it isn't known."""

    prompt: str
    lang: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Fold:
    """Samples under a title, which a reader can open and close; `is_open` at first."""

    title: str
    samples: tuple[Sample, ...]
    is_open: bool


@dataclass(frozen=True)
class Listing:
    """A file's text, word for word, in `language` (yaml, sh)."""

    caption: str
    text: str
    language: str


@dataclass(frozen=True)
class Prose:
    """Sentences, each a line of its own."""

    sentences: tuple[str, ...]


Block = Table | Figure | Sample | Fold | Listing | Prose


@dataclass(frozen=True)
class Section:
    """A titled part of a report. `anchor` is its place in the page."""

    anchor: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """A report: what was asked, the answer, and what it rests on."""

    title: str
    question: str
    answer: str
    sections: tuple[Section, ...]

    def tables(self) -> Iterator[Table]:
        """All tables."""
        return (block for section in self.sections for block in section.blocks if isinstance(block, Table))

    def figures(self) -> Iterator[Figure]:
        """All plots."""
        return (block for section in self.sections for block in section.blocks if isinstance(block, Figure))
