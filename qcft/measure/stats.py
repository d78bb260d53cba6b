"""Means over answer tokens, paired differences with their intervals, and what a merge kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcft.measure.continual import RESAMPLES, Interval
from qcft.measure.score import RowScore

MEASURABLE_GAIN = 0.05  # nats per answer token
LOSS_ALLOWED = 0.02  # nats per answer token


@dataclass(frozen=True)
class Difference(Interval):
    """A difference of mean NLLs in nats per answer token, its interval over rows."""

    rows: int


@dataclass(frozen=True)
class Kept:
    """What merging and reloading kept of an adapter's gain.

    `share` is None where no gain was measurable; then `worse` tells whether merging cost more than is allowed.
    """

    share: float | None
    gain: Difference
    loss: Difference
    worse: bool


def mean_nll(scores: Sequence[RowScore]) -> float:
    """Mean NLL per answer token in nats, whatever row it is of: the logarithm of perplexity (Jelinek et al. 1977)."""
    return sum(s.nll for s in scores) / sum(s.tokens for s in scores)


def accuracy(scores: Sequence[RowScore]) -> float:
    """Share of answer tokens whose most likely token was right."""
    return sum(s.correct for s in scores) / sum(s.tokens for s in scores)


def difference(a: Sequence[RowScore], b: Sequence[RowScore]) -> Difference:
    """mean_nll(b) - mean_nll(a) on the same rows, with a paired bootstrap over rows.

    Percentile interval (Efron & Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3), rows drawn for both
    models alike (Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation").
    The same 2,000 resamples every time, so that the same scores give the same interval.
    """
    import numpy as np

    tokens = np.array([s.tokens for s in a], dtype=float)
    change = np.array([y.nll - x.nll for x, y in zip(a, b, strict=True)])
    draws = np.random.default_rng(0).integers(0, len(tokens), size=(RESAMPLES, len(tokens)))
    means = change[draws].sum(axis=1) / tokens[draws].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(float(change.sum() / tokens.sum()), float(low), float(high), len(tokens))


def kept(base: Sequence[RowScore], live: Sequence[RowScore], merged: Sequence[RowScore]) -> Kept:
    """The share of an adapter's gain that survives: (base - merged) / (base - live), mean NLLs.

    Measurable where the gain is at least 0.05 nats and its interval excludes zero; otherwise the test
    is whether the merged model is at most 0.02 nats worse than the live adapter. All three models are
    loaded alike, so reloading the base costs nothing by itself.
    """
    gain, loss = difference(live, base), difference(live, merged)
    measurable = gain.value >= MEASURABLE_GAIN and gain.low > 0
    share = (gain.value - loss.value) / gain.value if measurable else None
    return Kept(share, gain, loss, worse=not measurable and loss.value > LOSS_ALLOWED)
