"""How similar the instructions of two data sets are (DES); each is embedded once, and the sums are cached."""

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

FORMAT = 1  # raised when the cached data changes
BATCH = 256
FIRST_ROWS = 500  # of each source: enough for a hint before anything runs
# Pairs that ship with qcft, named as the paper's: an encoder's own values for similar and dissimilar instructions.
OWN = {
    "similar": ("qcft:instructions/en", "qcft:instructions/es"),
    "unlike": ("qcft:instructions/en", "qcft:passages/es"),
}


@dataclass(frozen=True)
class DataSide:
    """One of the two data sets: its name, and its sources, one per language. `stands_for`: the model whose unknown
    training data it is used for."""

    name: str
    sources: tuple[Source, ...]
    column: str | None = None
    stands_for: str | None = None


def instruct_side(recipe: Recipe) -> DataSide:
    """The data used for an instruct model that serves as phase 1 unmodified, as qcft cannot know its training data.

    It is the data of that model's replay: the phase's replay.data, else the English instructions that ship with qcft.
    """
    replay = recipe.phases[0].replay
    data = [source for part in (replay.parts() if replay else ()) for source in part.data]
    sources = [one for source in data for one in source.expanded()] or [Source(path=OWN["similar"][0], lang="en")]
    return DataSide(",".join(one.path for one in sources), tuple(sources), stands_for=recipe.model.name)


class SimilarityRecord(TypedDict):
    """A cosine with its 95% interval, and the rows of the two data sets (des.Similarity)."""

    value: float
    low: float
    high: float
    rows: list[int]


class LanguageSimilarity(SimilarityRecord):
    """One language of a side that has several, compared with the whole other side."""

    of: str
    lang: str


class SideOf(TypedDict):
    """A side of a comparison."""

    name: str
    rows: int
    langs: list[str]


class EncoderOf(TypedDict):
    """The encoder of the instructions."""

    name: str
    digest: str
    is_labse: bool


class ReferenceValues(TypedDict):
    """The values to compare with: of the paper's pairs if the encoder is LaBSE, and of those that ship with qcft."""

    paper: dict[str, float] | None
    qcft: dict[str, SimilarityRecord]


class Judged(TypedDict):
    """What a value implies for phase 2: a verdict and sentences."""

    verdict: str
    says: list[str]


class SimilarityFound(Judged):
    """DES of two data sets; stored in similarity.json in a run's report folder."""

    a: SideOf
    b: SideOf
    encoder: EncoderOf
    des: SimilarityRecord
    languages: list[LanguageSimilarity]
    scale: ReferenceValues


class PhasesCompared(SimilarityFound):
    """DES of a phase and the one before it, and the suggested remedy."""

    remedy: str


class _Embedder:
    """Sums of sources' embeddings; the encoder is loaded when a source is not in the cache."""

    def __init__(self, source: EncoderSource, watch: Watch) -> None:
        self.source = source
        self.watch = watch
        self._encode: Encode | None = None

    def sums(self, source: Source, column: str | None) -> EmbeddingSums:
        """The sums of one source, from the cache if they are there."""
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
        # Seeded by the data: two data sets are resampled independently, and each one always in the same way.
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


def measure_similarity(a: DataSide, b: DataSide, encoder: str, watch: Watch) -> SimilarityFound:
    """DES of two data sets, of each language where a side has several, and of the pairs that ship with qcft.

    Raises InputError before anything is embedded for an encoder that is not available, and for data that cannot be
    read.
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
    verdict, says = _judged(found, [entry["value"] for entry in by_language], source, own_pairs)
    return {
        "a": _described(a, sums_a),
        "b": _described(b, sums_b),
        "encoder": {"name": source.name, "digest": source.digest, "is_labse": source.name == LABSE},
        "des": _as_record(found),
        "languages": by_language,
        "scale": {"paper": PAPER if source.name == LABSE else None, "qcft": own_pairs},
        "verdict": verdict,
        "says": [*says, *(_stands_for(side, sums) for side, sums in ((a, sums_a), (b, sums_b)) if side.stands_for)],
    }


def compare_phases(recipe: Recipe, encoder: str | None, watch: Watch) -> list[PhasesCompared]:
    """DES of each phase's first rows and those of the phase before it, and the suggested remedy.

    With `encoder`, by default LaBSE if it is installed and downloaded already; nothing otherwise. Raises InputError.
    """
    trained = [phase for phase in recipe.phases if not phase.adapter]
    if encoder is None:
        if not is_here(LABSE):
            return []
        encoder = LABSE
    find_encoder(encoder)  # raises even if there is only one phase, and so nothing to compare

    def side(phase: Phase) -> DataSide:
        first = (one.model_copy(update={"take": min(one.take or FIRST_ROWS, FIRST_ROWS)}) for one in phase.sources())
        return DataSide(phase.name, tuple(first))

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
        return f"{phase.name} may not need a remedy."
    word = "Try" if verdict == "unlike" else "To be safe:"
    return f"{word} --set {phase.name}.replay=0.2, or --set {phase.name}.freeze=first:0.5."


def _stands_for(side: DataSide, sums: EmbeddingSums) -> str:
    return (
        f"The training data of {side.stands_for} is not known: {sums.rows:,} instructions of {side.name} are used "
        "instead: the English that replay uses in a recipe without a phase 1. The paper's Instruct data is not public "
        "either."
    )


def _by_language(side: DataSide, sums: Sequence[EmbeddingSums]) -> Iterator[tuple[str, EmbeddingSums]]:
    langs = [str(source.lang or "?") for source in side.sources]
    for lang in dict.fromkeys(langs):
        yield lang, reduce(add, [one for one, its in zip(sums, langs, strict=True) if its == lang])


def _described(side: DataSide, sums: EmbeddingSums) -> SideOf:
    return {"name": side.name, "rows": sums.rows, "langs": [str(source.lang or "?") for source in side.sources]}


def _judged(
    found: Similarity, languages: Sequence[float], source: EncoderSource, own: Mapping[str, SimilarityRecord]
) -> tuple[str, list[str]]:
    """What the value implies for phase 2, and how certain that is: a verdict and sentences."""
    if source.name == LABSE:
        like, unlike = PAPER.values()
        scale = (
            f"the paper's pairs have {like} (Alpaca and MultiAlpaca: phase 2 did not hurt English) and {unlike} "
            "(Instruct and MultiAlpaca: it did)"
        )
    else:
        like, unlike = own["similar"]["value"], own["unlike"]["value"]
        scale = (
            f"{source.name} has a scale of its own, not that of LaBSE and the paper: of the pairs that ship with qcft, "
            f"the similar one has {like:.3f}, the dissimilar one {unlike:.3f}"
        )
    middle = (like + unlike) / 2
    apart = max(languages, default=0.0) - min(languages, default=0.0)
    if apart > like - unlike:
        verdict = "undecided"
        text = (
            f"It is not clear whether the instructions are similar: the values of the languages differ by {apart:.3f}, "
            "more than the scale is wide, so the encoder may distinguish languages rather than instructions."
        )
    elif found.low > middle:
        verdict = "alike"
        text = "The instructions are similar: expect phase 2 to cost little English."
    elif found.high < middle:
        verdict = "unlike"
        text = "The instructions are dissimilar: expect phase 2 to cost English; replay or freezing are the remedies."
    else:
        verdict = "undecided"
        text = (
            f"It is not clear whether the instructions are similar: the interval includes {middle:.3f}, the middle "
            "of the scale."
        )
    rows = min(found.rows)
    few = f" {rows} rows are few." if rows < 100 else ""
    says = [
        text,
        f"The scale: {scale}.",
        f"This is a hint, not a threshold, as the scale has only two points; the live probe and the table measure "
        f"English itself.{few}",
    ]
    return verdict, says
