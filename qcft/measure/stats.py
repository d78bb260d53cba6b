"""Means over answer tokens, paired differences with their intervals, and the share of a gain left after a merge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, cast

from qcft.measure.intervals import Bounds, Interval, by_cluster, one_interval, ratio, together, with_seeds
from qcft.measure.score import RowScore
from qcft.store.metrics import Paired

if TYPE_CHECKING:
    from qcft.measure.intervals import Array

MEASURABLE_GAIN = 0.05  # nats per answer token
LOSS_ALLOWED = 0.02  # nats per answer token


Runs = Mapping[int, Sequence[RowScore]]  # an arm's scores of the same rows, by seed


@dataclass(frozen=True, kw_only=True)
class Difference(Interval):
    """A difference of mean NLLs in nats per answer token; its interval is over rows, and over seeds if several ran."""

    rows: int

    def as_dict(self) -> Paired:
        """The difference as plain data."""
        return cast("Paired", asdict(self))


@dataclass(frozen=True)
class KeptGain:
    """How much of an adapter's gain is left after merging and reloading.

    `share` is None where no gain was measurable; then `worse` is whether the loss from merging is above the limit.
    """

    share: float | None
    gain: Difference
    loss: Difference
    worse: bool


def mean_nll(scores: Sequence[RowScore]) -> float:
    """Mean NLL per answer token in nats, over all rows' tokens: the logarithm of perplexity (Jelinek et al. 1977)."""
    return sum(s.nll for s in scores) / sum(s.tokens for s in scores)


def bits_per_byte(scores: Sequence[RowScore], size: int) -> float:
    """Bits per UTF-8 byte of the scored text (`size` bytes): sum of NLL / ln 2 / bytes, comparable between tokenizers
    (Gao et al. 2020, "The Pile", arXiv 2101.00027, section 3.1)."""
    return sum(s.nll for s in scores) / math.log(2) / size


def accuracy(scores: Sequence[RowScore]) -> float:
    """Share of answer tokens that the model found most likely."""
    return sum(s.correct for s in scores) / sum(s.tokens for s in scores)


def difference(a: Sequence[RowScore], b: Sequence[RowScore]) -> Difference:
    """mean_nll(b) - mean_nll(a) on the same rows, with a paired 95% interval over rows (`intervals.one_interval`).

    Both models are compared row by row (Koehn 2004, "Statistical Significance Tests for Machine Translation
    Evaluation"). Rows with one key, the translations of one row, are one observation. The interval is deterministic.
    Raises ValueError where the numbers of rows differ.
    """
    return changes([({0: a}, {0: b})])[0]


def changes(arms: Sequence[tuple[Runs, Runs]]) -> list[Difference]:
    """Each arm's change of mean NLL, the mean over its runs; `arms` are scores before and after, by seed.

    The intervals are not simultaneous. Each is over rows, and over seeds too where any arm has several runs; the
    variance of seeds is pooled over the arms. With one run per arm it is not measured (`seeds` is 1). All scores are of
    the same rows.
    """
    import numpy as np

    for before, after in arms:
        if {len(rows) for rows in (*before.values(), *after.values())} != {len(next(iter(before.values())))}:
            raise ValueError("scores of different rows cannot be compared")
    sums = [_sums([after[seed] for seed in before]) - _sums([*before.values()]) for before, after in arms]
    rows = next(iter(arms[0][1].values()))
    tokens = _tokens(rows)
    means = [one.sum(axis=1) / tokens.sum() for one in sums]
    found = []
    for at, one in enumerate(sums):
        value, influence = ratio(one.mean(axis=0)[:, None], tokens[:, None])
        bounds = one_interval(influence[:, 0], tokens / tokens.sum())
        if any(len(runs) > 1 for runs in means):
            bounds = with_seeds(bounds, means, np.eye(len(arms))[at : at + 1], paired=False)
        low, high, method = bounds.around(float(value[0]))
        counts = {"clusters": len(tokens), "seeds": len(one), "rows": len(rows)}
        found.append(Difference(float(value[0]), low, high, method=method, **counts))
    return found


def all_pairs(arms: Mapping[str, Runs]) -> dict[tuple[str, str], Difference]:
    """Mean NLL of the second minus that of the first for every ordered pair of arms, means over their runs.

    The 95% intervals of all pairs are simultaneous, so that the best of many arms does not look better than it is:
    where all arms are equal, the chance that any interval excludes zero is 5%. They are over rows, and over seeds where
    an arm has several runs, paired by seed where all arms have the same seeds. All scores are of the same rows.
    """
    rows = next(iter(next(iter(arms.values())).values()))
    seeds = [sorted(runs) for runs in arms.values()]
    ordered = [_sums([runs[seed] for seed in own]) for runs, own in zip(arms.values(), seeds, strict=True)]
    tokens = _tokens(rows)
    values, bounds = compare_arms(ordered, tokens, paired=all(own == seeds[0] for own in seeds))
    found: dict[tuple[str, str], Difference] = {}
    pairs = list(combinations(zip(arms, seeds, strict=True), 2))
    for at, ((one, own), (other, others)) in enumerate(pairs):
        value = float(values[at])
        low, high, method = bounds.around(value, at)
        counts = {"clusters": len(tokens), "seeds": min(len(own), len(others)), "rows": len(rows)}
        there = Difference(value, low, high, method=method, compared=len(pairs), **counts)
        back = Difference(
            -value, None if high is None else -high, None if low is None else -low,
            method=method, compared=len(pairs), **counts,
        )  # fmt: skip
        found |= {(one, other): there, (other, one): back}
    return found


def compare_arms(sums: Sequence[Array], tokens: Array, *, paired: bool) -> tuple[Array, Bounds]:
    """The differences of all pairs of arms (first with second, first with third ...) and their simultaneous bounds.

    `sums` holds each arm's summed NLLs (runs x clusters), `tokens` the clusters' answer tokens; with `paired`, run i of
    every arm has the same seed.
    """
    import numpy as np

    pairs = list(combinations(range(len(sums)), 2))
    contrasts = np.zeros((len(pairs), len(sums)))
    for at, (one, other) in enumerate(pairs):
        contrasts[at, one], contrasts[at, other] = -1, 1
    means = np.array([one.mean(axis=0) for one in sums])
    values, influence = ratio((contrasts @ means).T, tokens[:, None])
    clusters = len(tokens)
    if len(pairs) == 1:
        bounds = one_interval(influence[:, 0], tokens / tokens.sum())
    else:
        bounds = together(influence * np.sqrt(clusters / max(clusters - 1, 1)), clusters - 1)
    if any(len(one) > 1 for one in sums):
        by_run = [one.sum(axis=1) / tokens.sum() for one in sums]
        bounds = with_seeds(bounds, by_run, contrasts, paired=paired)
    return values, bounds


def _sums(runs: Sequence[Sequence[RowScore]]) -> Array:
    """Summed NLLs of clusters: runs x clusters. Raises ValueError where the runs' numbers of rows differ."""
    import numpy as np

    columns = np.array([[score.nll for score in rows] for rows in runs]).T
    return by_cluster(_keys(runs[0]), columns).T


def _tokens(rows: Sequence[RowScore]) -> Array:
    import numpy as np

    return by_cluster(_keys(rows), np.array([[float(score.tokens)] for score in rows]))[:, 0]


def _keys(rows: Sequence[RowScore]) -> list[str | int]:
    """What identifies an observation: the row's key; its position where the scores have no keys."""
    return [score.key or place for place, score in enumerate(rows)]


def kept(base: Sequence[RowScore], live: Sequence[RowScore], merged: Sequence[RowScore]) -> KeptGain:
    """The share of an adapter's gain that survives: (base - merged) / (base - live), mean NLLs.

    Measurable where the gain is at least 0.05 nats and its interval excludes zero; otherwise the test is whether the
    merged model is at most 0.02 nats worse than the live adapter. All three models are loaded in the same way, so
    reloading alone does not change the base.
    """
    gain, loss = difference(live, base), difference(live, merged)
    measurable = gain.value >= MEASURABLE_GAIN and gain.is_clear
    share = (gain.value - loss.value) / gain.value if measurable else None
    return KeptGain(share, gain, loss, worse=not measurable and loss.value > LOSS_ALLOWED)
