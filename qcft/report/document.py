"""The parts of a report before it is written: sections of tables, plots, answers and text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """Formatted cells; `records` are the same numbers unrounded, one record per row, for `--json` and the CSV file.

    `name`: of that file; `measure`: what the `value` of a record is; `values`: the file's rows if they cannot be
    derived from the records (report.tidy). `words`: the columns with text instead of numbers; `strong`: the emphasised
    rows.
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
        """A table of rows with the title of each cell; the first column, `of`, `change` and `words` have text."""
        head = tuple(rows[0]) if rows else ()
        text = {*head[:1], "of", "change", *words}
        places = tuple(i for i, title in enumerate(head) if title in text)
        cells = tuple(tuple(row.values()) for row in rows)
        return cls(
            name, caption, head, cells, tuple(records), note, places, frozenset(strong), measure, tuple(values)
        )  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A plot: `svg` and `png` are its files, `wide` the SVG for wide screens, `alt` the text for those who cannot see
    it."""

    name: str
    caption: str
    alt: str
    svg: str
    png: bytes = field(repr=False)
    wide: str = field(repr=False)


@dataclass(frozen=True)
class StageAnswer:
    """The answer of one stage; not `finished` if it was cut off at the maximum number of tokens."""

    stage: str
    text: str
    finished: bool


@dataclass(frozen=True)
class Sample:
    """A prompt with its answers side by side; `lang` is a BCP 47 tag, or empty if it is not known."""

    prompt: str
    lang: str
    answers: tuple[StageAnswer, ...]


@dataclass(frozen=True)
class Fold:
    """Samples under a title that a reader can open and close; `is_open`: whether it is open at first."""

    title: str
    samples: tuple[Sample, ...]
    is_open: bool


@dataclass(frozen=True)
class Listing:
    """A file's unmodified text, in `language` (yaml, sh)."""

    caption: str
    text: str
    language: str


@dataclass(frozen=True)
class Prose:
    """Sentences, each on its own line."""

    sentences: tuple[str, ...]


Block = Table | Figure | Sample | Fold | Listing | Prose


@dataclass(frozen=True)
class Section:
    """A part of a report with a title. `anchor`: its id in the page."""

    anchor: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """A report: the question, the answer, and the evidence for it."""

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


def with_code(text: str) -> list[tuple[str, bool]]:
    """The parts of a sentence, each with whether it is code: what stands between two backquotes. A sentence with an
    odd number of backquotes has none."""
    parts = text.split("`")
    return [(text, False)] if len(parts) % 2 == 0 else [(part, i % 2 == 1) for i, part in enumerate(parts) if part]
