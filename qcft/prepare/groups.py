"""Held-out rows in groups that are measured together: of each phase, of your own test sets, of the probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qcft.data.load import LoadedSource
from qcft.data.rows import Row
from qcft.data.template import Thinking
from qcft.prepare.reading import SourceReader
from qcft.recipe import TESTS, MeasuredPhase, Recipe, Source
from qcft.replay.pools import ENGLISH, SHIPPED_ENGLISH

PROBE_LENGTH = 1024  # tokens of a row that is only measured


@dataclass(frozen=True)
class Group:
    """Held-out rows measured together: those of one phase in one language, raw text separate from conversations."""

    phase: str
    lang: str
    rows: tuple[Row, ...]
    system: str | None
    max_length: int
    long_rows: str
    thinking: Thinking

    @property
    def name(self) -> str:
        """`phase2 es`, or `phase1 es text`."""
        return f"{self.phase} {self.lang}{' text' if self.is_text else ''}"

    @property
    def is_text(self) -> bool:
        """Whether its rows are documents of raw text."""
        return self.rows[0].text is not None


def held_out_groups(recipe: Recipe, sources: Mapping[str, Sequence[LoadedSource]], reader: SourceReader) -> list[Group]:
    """Held-out rows by phase and language, then your own test sets by language, then the probe's; English that ships
    with qcft if no source is English. Raises InputError for a source that cannot be read."""
    own = recipe.heldout
    first = recipe.phases[0]
    groups: list[Group] = []
    measured: list[tuple[MeasuredPhase, Sequence[LoadedSource]]] = []
    trained: set[str] = set()
    for one in own.of:
        loaded = [reader.load(s, one.name) for source in one.data for s in source.expanded()]
        measured.append((one, loaded))
        groups += _grouped(one, loaded, trained, None)
    for phase in () if own.of else recipe.phases:
        limits = MeasuredPhase.of(phase)
        measured.append((limits, sources[phase.name]))
        groups += _grouped(limits, sources[phase.name], trained, own.rows)
        trained |= {row.prompt_digest for source in sources[phase.name] for row in source.rows}
    groups += _tests(recipe, measured, reader)
    probes = [one for source in recipe.probe for one in source.expanded()]
    if not any(g.lang == ENGLISH and not g.is_text for g in groups) and not any(s.lang == ENGLISH for s in probes):
        probes.append(Source(path=SHIPPED_ENGLISH, lang=ENGLISH))
    limits = MeasuredPhase(
        name="probe", data=[], system=first.system, max_length=PROBE_LENGTH, long_rows=first.train.long_rows
    )
    loaded = [reader.load(s, first.name) for s in probes]
    return groups + _grouped(limits, loaded, trained, None if own.of else own.rows)


def _grouped(
    limits: MeasuredPhase, sources: Sequence[LoadedSource], trained: set[str], most: int | None
) -> list[Group]:
    """At most `most` rows of each language and kind: each prompt once, and no row that an earlier phase trains on."""
    by_lang: dict[tuple[str, bool], dict[str, Row]] = {}
    for source in sources:
        by_lang.setdefault((source.lang, False), {})
        for row in source.held_out:
            if row.prompt_digest not in trained:
                by_lang.setdefault((source.lang, row.text is not None), {}).setdefault(row.prompt_digest, row)
    return [
        Group(
            limits.name,
            lang,
            tuple(rows.values())[:most],
            limits.system,
            limits.max_length,
            limits.long_rows,
            limits.thinking,
        )
        for (lang, _), rows in by_lang.items()
        if rows
    ]


def _tests(
    recipe: Recipe, measured: Sequence[tuple[MeasuredPhase, Sequence[LoadedSource]]], reader: SourceReader
) -> list[Group]:
    """The rows of your own test sets by language, each prompt once, with the limits of the last measured phase in that
    language, else of the first."""
    by_lang: dict[tuple[str, bool], dict[str, Row]] = {}
    for source in recipe.heldout.data:
        for one in source.expanded():
            found = reader.test(one)
            for row in found.rows:
                by_lang.setdefault((found.lang, row.text is not None), {}).setdefault(row.prompt_digest, row)
    groups = []
    for (lang, _), rows in by_lang.items():
        like = [limits for limits, sources in measured if any(source.lang == lang for source in sources)]
        limits = (like or [limits for limits, _ in measured[:1]])[-1]
        length = max(PROBE_LENGTH, limits.max_length)
        group = Group(TESTS, lang, tuple(rows.values()), limits.system, length, limits.long_rows, limits.thinking)
        groups.append(group)
    return groups
