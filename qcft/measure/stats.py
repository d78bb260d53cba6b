"""Means over answer tokens, paired differences with their intervals, and what a merge kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qcft.measure.score import RowScore

RESAMPLES = 2000
MEASURABLE_GAIN = 0.05  # nats per answer token
LOSS_ALLOWED = 0.02  # nats per answer token


@dataclass(frozen=True)
class Difference:
    """A difference of mean NLLs in nats per answer token, with its 95% interval over rows."""

    value: float
    low: float
    high: float
    rows: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Kept:
    """What merging and reloading kept of an adapter's gain; `share` is None where none was measurable."""

    share: float | None
    gain: Difference
    loss: Difference
    verdict: Literal["kept", "low", "lost", "not measurable", "not measurable, but worse"]


def mean_nll(scores: Sequence[RowScore]) -> float:
    """Mean NLL per answer token."""
    return sum(s.nll for s in scores) / sum(s.tokens for s in scores)


def accuracy(scores: Sequence[RowScore]) -> float:
    """Share of answer tokens whose most likely token was right."""
    return sum(s.correct for s in scores) / sum(s.tokens for s in scores)


def difference(a: Sequence[RowScore], b: Sequence[RowScore]) -> Difference:
    """mean_nll(b) - mean_nll(a) on the same rows, with a paired bootstrap over rows (percentiles).

    The same 2,000 resamples every time, so that the same scores give the same interval.
    """
    import numpy as np

    tokens = np.array([s.tokens for s in a], dtype=float)
    change = np.array([y.nll - x.nll for x, y in zip(a, b, strict=True)])
    draws = np.random.default_rng(0).integers(0, len(tokens), size=(RESAMPLES, len(tokens)))
    means = change[draws].sum(axis=1) / tokens[draws].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(float(change.sum() / tokens.sum()), float(low), float(high), len(tokens))


def kept(
    base: Sequence[RowScore],
    live: Sequence[RowScore],
    merged: Sequence[RowScore],
    warn_below: float = 0.8,
    refuse_below: float = 0.5,
) -> Kept:
    """The share of an adapter's gain that survives: (base - merged) / (base - live), mean NLLs.

    Measurable where the gain is at least 0.05 nats and its interval excludes zero; otherwise the test
    is whether the merged model is at most 0.02 nats worse than the live adapter. All three models are
    loaded alike, so reloading the base costs nothing by itself.
    """
    gain, loss = difference(live, base), difference(live, merged)
    if gain.value < MEASURABLE_GAIN or gain.low <= 0:
        worse = loss.value > LOSS_ALLOWED
        return Kept(None, gain, loss, "not measurable, but worse" if worse else "not measurable")
    share = (gain.value - loss.value) / gain.value
    verdict: Literal["kept", "low", "lost"] = (
        "lost" if share < refuse_below else "low" if share < warn_below else "kept"
    )
    return Kept(share, gain, loss, verdict)
