"""Backward transfer and forgetting over a sequence of phases, and paired changes of scores. Pure.

`results[i][j]` is the performance after phase i on what phase j taught, higher is better; losses enter with their
sign turned. Only j <= i is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 2000
Matrix = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Change(Interval):
    """A difference of mean scores, its interval over items."""

    items: int


def backward_transfer(results: Matrix) -> float:
    """BWT = 1/(T-1) sum_{i<T} (R[T][i] - R[i][i]): below zero where later phases cost what earlier ones taught.

    Lopez-Paz & Ranzato 2017, "Gradient Episodic Memory for Continual Learning" (arXiv 1706.08840), equation 3.
    Raises ValueError for fewer than two phases.
    """
    last = _last(results)
    return sum(results[last][i] - results[i][i] for i in range(last)) / last


def forgetting(results: Matrix) -> float:
    """F = 1/(T-1) sum_{j<T} f_j, f_j = max_{j<=l<T} a[l][j] - a[T][j]: above zero where the best there was is lost.

    Chaudhry et al. 2018, "Riemannian Walk for Incremental Learning" (arXiv 1801.10112), section 3; the maximum is
    over the phases from j on, as before it nothing was taught. Raises ValueError for fewer than two phases.
    """
    last = _last(results)
    return sum(max(results[i][j] for i in range(j, last)) - results[last][j] for j in range(last)) / last


def paired_change(
    before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], weights: Sequence[float] = (1.0,)
) -> Change:
    """The change of the weighted sum of tasks' means, with a paired bootstrap over each task's items.

    Percentile interval (Efron & Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3), items drawn for
    both models alike (Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation").
    `before` and `after` hold tasks, these the scores of the same items. Items are drawn within their tasks, in the
    same 2,000 resamples every time.
    """
    import numpy as np

    generator = np.random.default_rng(0)
    value, sums = 0.0, np.zeros(RESAMPLES)
    for one, other, weight in zip(before, after, weights, strict=True):
        change = np.array(other, dtype=float) - np.array(one, dtype=float)
        draws = generator.integers(0, len(change), size=(RESAMPLES, len(change)))
        value += weight * float(change.mean())
        sums += weight * change[draws].mean(axis=1)
    low, high = np.percentile(sums, [2.5, 97.5])
    return Change(value, float(low), float(high), sum(map(len, before)))


def _last(results: Matrix) -> int:
    if len(results) < 2:
        raise ValueError(f"{len(results)} phases: there is nothing to forget before a second")
    return len(results) - 1
