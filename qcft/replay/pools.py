"""The pools that replay is drawn from: for each kind the rows or prompts, in the order they are drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from qcft.data.load import LoadedSource, read_pool
from qcft.data.mix import shuffled, stratified
from qcft.data.rows import Row
from qcft.errors import InputError, nearest
from qcft.events import Watch
from qcft.recipe import Phase, Recipe, Replay, ReplayPart, Source

ENGLISH = "en"
SHIPPED_ENGLISH = "qcft:instructions/en"
STRATA = 10  # classes of length, of equal size
ENOUGH = 0.5  # share of a phase's rows that must have an English version for replay to use those prompts


@dataclass(frozen=True)
class Pool:
    """Rows, or prompts without answers, in the order they are drawn; `left_out` counts dropped ones by reason.

    `language`: the language of a named phase's prompts, which answers should be in instead of the filters' language.
    """

    part: ReplayPart
    rows: tuple[Row, ...]
    reason: str
    left_out: dict[str, int]
    language: str | None = None


@dataclass(frozen=True)
class HeldOutRows:
    """Rows that must not be drawn: measured prompts, measured rows' keys, and the share that is set aside."""

    prompts: frozenset[str]
    keys: frozenset[str]
    share: float


Drawn = list[tuple[Row, str]]  # rows with their languages


def make_pools(
    recipe: Recipe, phase: Phase, sources: Mapping[str, Sequence[LoadedSource]], held: HeldOutRows, watch: Watch
) -> list[Pool]:
    """A phase's pools, one for each kind of its replay. Raises InputError if one of them is empty."""
    return [_Finder(recipe, phase, sources, held, watch).pool(part) for part in _replay(phase).parts()]


class _Finder:
    def __init__(
        self,
        recipe: Recipe,
        phase: Phase,
        sources: Mapping[str, Sequence[LoadedSource]],
        held: HeldOutRows,
        watch: Watch,
    ) -> None:
        self.recipe = recipe
        self.phase = phase
        self.own = list(sources[phase.name])
        first = recipe.phases[0].name
        self.first_name = first
        self.first = list(sources[first]) if first != phase.name else []
        names = [p.name for p in recipe.phases]
        self.earlier = {name: list(sources[name]) for name in names[: names.index(phase.name)]}
        self.held = held
        self.watch = watch

    def pool(self, part: ReplayPart) -> Pool:
        found: Callable[[ReplayPart], tuple[Drawn, str, dict[str, int]]] = {
            "generative": self.prompts,
            "english": self.english,
            "phase1": self.phase1,
            "file": self.file,
        }[part.kind]
        drawn, reason, unusable = found(part)
        left_out = Counter(unusable)
        free: dict[tuple[str, ...], tuple[Row, str]] = {}
        for row, lang in drawn:
            # A file's rows may have lost their ids by editing, so only their prompts are compared with measured ones.
            same = (row.prompt_digest, *(m.content for m in row.completion))
            aside = row.is_held_out(self.held.share) and part.kind != "file"
            if aside or row.key in self.held.keys or row.prompt_digest in self.held.prompts:
                left_out["held out"] += 1
            elif same in free:
                left_out["same prompt twice" if part.kind == "generative" else "same row twice"] += 1
            else:
                free[same] = (row, lang)
        if not free:
            raise InputError(
                f"replay: there are no rows to draw from for kind {part.kind}: {reason} "
                f"({', '.join(f'{n} {why}' for why, n in left_out.items()) or 'no rows'})",
                f"name other rows in {self.phase.name}.replay.data",
            )
        spoken = {lang for _, lang in free.values()}
        language = spoken.pop() if part.phase is not None and len(spoken) == 1 else None
        return Pool(part, tuple(self.ordered(list(free.values()))), reason, dict(left_out), language)

    def prompts(self, part: ReplayPart) -> tuple[Drawn, str, dict[str, int]]:
        """Prompts of the earlier phase that is named; else English ones: of `data`, of the phase's own rows, of the
        first phase's, or those that ship with qcft, in this order."""
        if part.phase is not None:
            named = self.asked(_rows(self.named(part.phase)), part.phase)
            return named, f"prompts of {part.phase}", {}
        drawn, unusable = self.read(part.data, answers=False) if part.data else ([], {})
        reason = f"prompts of {_names(part.data)}"
        if not drawn:
            drawn, reason = self.versions(False)
            drawn = [(row, lang) for row, lang in drawn if row.text is None]
            drawn = drawn if len(drawn) >= ENOUGH * self.distinct() else []
        if not drawn and self.first:
            english = [s for s in self.first if s.lang == ENGLISH] or self.first
            drawn, reason = _rows(english), f"prompts of {self.first_name}: {self.phase.name} has no English versions"
        if not drawn:
            drawn, unusable = self.read([Source(path=SHIPPED_ENGLISH, lang=ENGLISH)], answers=False)
            reason = "instructions that ship with qcft: no earlier phase has data"
        return self.asked(drawn, reason.split(":")[0].removeprefix("prompts of ")), reason, unusable

    def asked(self, drawn: Drawn, whose: str) -> Drawn:
        """Rows without their answers. Raises InputError if all of them are raw text, which has no prompts."""
        prompts = [(Row(row.prompt, (), row.id), lang) for row, lang in drawn if row.text is None]
        if drawn and not prompts:
            raise InputError(
                f"replay: {whose} is raw text, without prompts that the model could answer",
                f"name instructions, such as {SHIPPED_ENGLISH}, in {self.phase.name}.replay.data, or set kind: phase1 "
                "to replay an earlier phase's documents unmodified",
            )
        return prompts

    def english(self, part: ReplayPart) -> tuple[Drawn, str, dict[str, int]]:
        """Real English rows, parallel to the phase's by id unless `parallel` is false."""
        if not part.data:
            drawn, reason = self.versions(True)
            if not drawn:
                raise InputError(
                    f"replay: {self.phase.name} has no English versions of its rows: neither columns such as "
                    f"instruction_en and output_en, nor rows of {self.first_name} with the same ids",
                    f"name English rows in {self.phase.name}.replay.data, or use kind: phase1",
                )
            return drawn, reason, {}
        drawn, unusable = self.read(part.data, answers=True)
        if not part.parallel:
            return drawn, f"rows of {_names(part.data)}, not parallel to {self.phase.name}", unusable
        ids = self.ids()
        parallel = [(row, lang) for row, lang in drawn if row.id is not None and row.id in ids]
        if not parallel:
            theirs = sum(row.id is not None for row, _ in drawn)
            raise InputError(
                f"replay: no row of {_names(part.data)} is parallel to {self.phase.name}: {theirs} of its {len(drawn)} "
                f"rows have an id, {self.phase.name} has {len(ids)} ids, and no id is in both",
                "give both the same id column, or set parallel: false to use all rows",
            )
        if len(parallel) < len(drawn):
            unusable["not parallel"] = len(drawn) - len(parallel)
        return parallel, f"rows of {_names(part.data)} parallel to {self.phase.name} by id", unusable

    def phase1(self, part: ReplayPart) -> tuple[Drawn, str, dict[str, int]]:
        """Rows the first phase was trained on, or the earlier phase that is named."""
        if part.phase is not None:
            return _rows(self.named(part.phase)), f"rows of {part.phase}", {}
        if not self.first:
            raise InputError(
                "replay of kind phase1 needs rows of a first phase, but "
                + ("it is an adapter" if self.recipe.phases[0].adapter else f"{self.phase.name} is the first"),
                f"name English rows: {self.phase.name}.replay.kind=english, .data=PATH, .parallel=false",
            )
        return _rows(self.first), f"rows of {self.first_name}", {}

    def named(self, phase: str) -> list[LoadedSource]:
        """The data of an earlier phase. Raises InputError if there is none of that name."""
        if phase not in self.earlier:
            known = ", ".join(self.earlier) or "none"
            raise InputError(
                f"{self.phase.name}.replay.phase: {phase!r} is not a phase before {self.phase.name}",
                nearest(phase, list(self.earlier)) + f"earlier phases: {known}",
            )
        return self.earlier[phase]

    def file(self, part: ReplayPart) -> tuple[Drawn, str, dict[str, int]]:
        """Rows of one file."""
        assert part.path is not None
        drawn, unusable = self.read([Source(path=part.path)], answers=True)
        return drawn, f"rows of {_names([Source(path=part.path)])}", unusable

    def versions(self, answered: bool) -> tuple[Drawn, str]:
        """English versions of the phase's rows, from their own columns or by id among the first phase's rows."""
        own = [row.english for source in self.own for row in source.rows if row.english is not None]
        own = list({row.prompt_digest: row for row in own if row.completion or not answered}.values())
        ids = self.ids()
        english = [s for s in self.first if s.lang == ENGLISH]
        shared = [row for s in english for row in s.rows if row.id is not None and row.id in ids]
        best, how = max(
            (own, "from its *_en columns"), (shared, f"in {self.first_name} by id"), key=lambda x: len(x[0])
        )
        reason = f"English versions of {len(best)} of the {self.distinct()} rows of {self.phase.name}, {how}"
        return [(row, ENGLISH) for row in best], reason

    def ids(self) -> set[str]:
        return {row.id for source in self.own for row in source.rows if row.id is not None}

    def distinct(self) -> int:
        """How many rows the phase has; translations of one row are counted once."""
        return len({row.key for source in self.own for row in source.rows})

    def read(self, sources: Iterable[Source], answers: bool) -> tuple[Drawn, dict[str, int]]:
        found = [read_pool(one, answers, self.watch) for s in sources for one in s.expanded()]
        unusable: Counter[str] = Counter()
        for one in found:
            unusable.update(one.left_out)
        return [(row, one.lang) for one in found for row in one.rows], dict(unusable)

    def ordered(self, drawn: Drawn) -> list[Row]:
        """The rows in the order they are drawn: a seeded shuffle, stratified if the recipe says so."""
        seed, by = f"{self.recipe.seed}:replay", _replay(self.phase).stratify
        if by == "language":
            return [row for row, _ in stratified(drawn, lambda entry: entry[1], seed)]
        if by == "length":
            length = {id(row): sum(len(m.content) for m in row.messages) for row, _ in drawn}
            ranked = sorted((row for row, _ in drawn), key=lambda row: (length[id(row)], row.key))
            classes = {id(row): rank * STRATA // len(ranked) for rank, row in enumerate(ranked)}
            return stratified([row for row, _ in drawn], lambda row: classes[id(row)], seed)
        return shuffled([row for row, _ in drawn], seed)


def _replay(phase: Phase) -> Replay:
    assert phase.replay is not None
    return phase.replay


def _rows(sources: Iterable[LoadedSource]) -> Drawn:
    return [(row, source.lang) for source in sources for row in source.rows]


def _names(sources: Iterable[Source]) -> str:
    return ", ".join(dict.fromkeys(source.path.rstrip("/").rsplit("/", 1)[-1] for source in sources))
