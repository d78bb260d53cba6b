"""How alike the instructions of two data sets are (DES), each embedded once and kept in the cache as sums."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import islice, pairwise
from operator import add
from pathlib import Path
from typing import TypedDict

from qcft.cache import cached_folder
from qcft.data.instructions import instructions
from qcft.events import Watch
from qcft.measure.des import PAPER, RESAMPLES, EmbeddingSums, Similarity, similarity
from qcft.models.encoders import LABSE, Encode, EncoderSource, find_encoder, is_here, load_encoder
from qcft.recipe import Phase, Recipe, Source

FORMAT = 1  # raised when what is kept changes
BATCH = 256
FIRST_ROWS = 500  # of each source: enough for a hint before anything runs
# Pairs that ship with qcft, in the words of the paper's: an encoder's own values for like and unlike instructions.
OWN = {
    "similar": ("qcft:instructions/en", "qcft:instructions/es"),
    "unlike": ("qcft:instructions/en", "qcft:passages/es"),
}


@dataclass(frozen=True)
class Side:
    """One of the two data sets: what it is called, and its sources, one per language."""

    name: str
    sources: tuple[Source, ...]
    column: str | None = None


class SimilarityRecord(TypedDict):
    """A cosine with its 95% interval, and the rows of the two data sets (des.Similarity)."""

    value: float
    low: float
    high: float
    rows: list[int]


class LanguageSimilarity(SimilarityRecord):
    """One language of a side that has several, against the whole other side."""

    of: str
    lang: str


class SideOf(TypedDict):
    """A side as it was compared."""

    name: str
    rows: int
    langs: list[str]


class EncoderOf(TypedDict):
    """What embedded the instructions."""

    name: str
    digest: str
    is_labse: bool


class Scale(TypedDict):
    """What a value is held against: the paper's pairs where LaBSE embedded, and those that ship with qcft."""

    paper: dict[str, float] | None
    qcft: dict[str, SimilarityRecord]


class Judged(TypedDict):
    """What a value implies for phase 2."""

    verdict: str
    says: list[str]


class SimilarityFound(Judged):
    """DES of two data sets; similarity.json holds it beside a run's report."""

    a: SideOf
    b: SideOf
    encoder: EncoderOf
    des: SimilarityRecord
    languages: list[LanguageSimilarity]
    scale: Scale


class PhasesCompared(SimilarityFound):
    """DES of a phase and the one before it, and what that suggests."""

    remedy: str


class _Embedder:
    """Sums of sources' embeddings; the encoder is loaded when the first is not in the cache."""

    def __init__(self, source: EncoderSource, watch: Watch) -> None:
        self.source = source
        self.watch = watch
        self._encode: Encode | None = None

    def sums(self, source: Source, column: str | None) -> EmbeddingSums:
        """The sums of one source, from the cache where they are there."""
        import numpy as np

        digest, rows = self._digest(source, column)
        key = hashlib.sha256(f"{FORMAT} {RESAMPLES} {self.source.digest} {digest}".encode()).hexdigest()[:20]

        def make(folder: Path) -> None:
            np.save(folder / "sums.npy", self._embed(source, column, digest, rows).sums)

        return EmbeddingSums(np.load(cached_folder(f"embeddings/{key}", make) / "sums.npy"), rows)

    def _digest(self, source: Source, column: str | None) -> tuple[str, int]:
        """A digest of the instructions in their order, and how many there are."""
        total, rows = hashlib.sha256(), 0
        for text in instructions(source, column):
            total.update(hashlib.sha256(text.encode()).digest())
            rows += 1
            if rows % 5000 == 0:
                self.watch.progress(f"reading {source.path}", rows, source.take or 0, "rows")
        return total.hexdigest(), rows

    def _embed(self, source: Source, column: str | None, digest: str, rows: int) -> EmbeddingSums:
        import numpy as np

        if self._encode is None:
            self._encode = load_encoder(self.source)
        # Seeded by the data, so that two data sets are resampled independently, and each always alike.
        draws = np.random.default_rng(int(digest[:16], 16))
        sums: EmbeddingSums | None = None
        all_texts = instructions(source, column)
        while texts := list(islice(all_texts, BATCH)):
            embeddings = self._encode(texts)
            sums = sums or EmbeddingSums.empty(embeddings.shape[1])
            sums.add(embeddings, draws)
            self.watch.progress(f"embedding {source.path}", sums.rows, rows, "rows")
        assert sums is not None
        return sums


def measure_similarity(a: Side, b: Side, encoder: str, watch: Watch) -> SimilarityFound:
    """DES of two data sets, of each language where a side has several, and of the pairs that ship with qcft.

    Raises InputError before anything is embedded for an encoder that can't be had, and for data that can't be read.
    """
    source = find_encoder(encoder)
    embedder = _Embedder(source, watch)
    each_a, each_b = ([embedder.sums(one, side.column) for one in side.sources] for side in (a, b))
    sums_a, sums_b = reduce(add, each_a), reduce(add, each_b)
    found = similarity(sums_a, sums_b)
    by_language: list[LanguageSimilarity] = [
        {"of": side.name, "lang": lang, **_as_record(similarity(group, other))}
        for side, own, other in ((a, each_a, sums_b), (b, each_b, sums_a))
        if len(own) > 1
        for lang, group in _by_language(side, own)
    ]
    own_pairs = {
        word: _as_record(similarity(*(embedder.sums(Source(path=path), None) for path in pair)))
        for word, pair in OWN.items()
    }
    return {
        "a": _described(a, sums_a),
        "b": _described(b, sums_b),
        "encoder": {"name": source.name, "digest": source.digest, "is_labse": source.name == LABSE},
        "des": _as_record(found),
        "languages": by_language,
        "scale": {"paper": PAPER if source.name == LABSE else None, "qcft": own_pairs},
        **_judged(found, [entry["value"] for entry in by_language], source, own_pairs),
    }


def compare_phases(recipe: Recipe, encoder: str | None, watch: Watch) -> list[PhasesCompared]:
    """DES of each phase's first rows and those of the phase before it, and the remedy that it suggests.

    By `encoder`, else by LaBSE where it is installed and fetched already; nothing where it is not. Raises InputError.
    """
    trained = [phase for phase in recipe.phases if not phase.adapter]
    if encoder is None:
        if not is_here(LABSE):
            return []
        encoder = LABSE
    find_encoder(encoder)  # a mistake is told though there be one phase, and nothing to compare

    def side(phase: Phase) -> Side:
        first = (one.model_copy(update={"take": min(one.take or FIRST_ROWS, FIRST_ROWS)}) for one in phase.sources())
        return Side(phase.name, tuple(first))

    compared: list[PhasesCompared] = []
    for before, phase in pairwise(trained):
        found = measure_similarity(side(before), side(phase), encoder, watch)
        compared.append({**found, "remedy": _remedy(found["verdict"], phase)})
    return compared


def _as_record(found: Similarity) -> SimilarityRecord:
    return {"value": found.value, "low": found.low, "high": found.high, "rows": list(found.rows)}


def _remedy(verdict: str, phase: Phase) -> str:
    has = [f"replay of {phase.replay.ratio:g}"] if phase.replay and phase.replay.ratio > 0 else []
    has += [f"freeze {phase.freeze}"] if phase.freeze.kind != "none" else []
    if has:
        return f"{phase.name} has a remedy: {' and '.join(has)}."
    if verdict == "alike":
        return f"{phase.name} may do without a remedy."
    word = "Try" if verdict == "unlike" else "To be safe:"
    return f"{word} --set {phase.name}.replay=0.2, or --set {phase.name}.freeze=first:0.5."


def _by_language(side: Side, sums: Sequence[EmbeddingSums]) -> Iterator[tuple[str, EmbeddingSums]]:
    langs = [str(source.lang or "?") for source in side.sources]
    for lang in dict.fromkeys(langs):
        yield lang, reduce(add, [one for one, its in zip(sums, langs, strict=True) if its == lang])


def _described(side: Side, sums: EmbeddingSums) -> SideOf:
    return {"name": side.name, "rows": sums.rows, "langs": [str(source.lang or "?") for source in side.sources]}


def _judged(
    found: Similarity, languages: Sequence[float], source: EncoderSource, own: Mapping[str, SimilarityRecord]
) -> Judged:
    """What the value implies for phase 2, and how sure that is: a `verdict` and sentences."""
    if source.name == LABSE:
        like, unlike = PAPER.values()
        scale = (
            f"the paper's pairs are {like} (Alpaca and MultiAlpaca: phase 2 cost no English) and {unlike} (Instruct "
            "and MultiAlpaca: it did)"
        )
    else:
        like, unlike = own["similar"]["value"], own["unlike"]["value"]
        scale = (
            f"{source.name} has a scale of its own, not that of LaBSE and the paper: it gives the like pair that ships "
            f"with qcft {like:.3f}, the unlike one {unlike:.3f}"
        )
    middle = (like + unlike) / 2
    apart = max(languages, default=0.0) - min(languages, default=0.0)
    if apart > like - unlike:
        word = (
            f"undecided: the values of its languages lie {apart:.3f} apart, further than the scale is wide, so the "
            "encoder may tell languages apart rather than instructions"
        )
    elif found.low > middle:
        word = "alike: expect phase 2 to cost little English"
    elif found.high < middle:
        word = "unlike: expect phase 2 to cost English; replay or freezing are the remedies"
    else:
        word = f"undecided: the interval holds {middle:.3f}, the middle of the scale"
    rows = min(found.rows)
    few = f" Its {rows} rows are few." if rows < 100 else ""
    says = [
        f"The instructions are {word}.",
        f"On what scale: {scale}.",
        f"How sure: two points make that scale, so it is a hint and no threshold; the live probe and the table measure "
        f"English itself.{few}",
    ]
    return {"verdict": word.split(":")[0], "says": says}
