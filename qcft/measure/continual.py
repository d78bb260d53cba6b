"""Backward transfer and forgetting over a sequence of phases, and paired changes of scores. Pure.

`results[i][j]` is the performance after phase i on the tasks of phase j, higher is better (negative losses). Only
j <= i is used.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from qcft.measure.intervals import NO_INTERVAL, Interval, by_cluster, ratio, together

Matrix = Sequence[Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class MeanChange(Interval):
    """A difference of mean scores, its interval over items."""

    items: int


@dataclass(frozen=True)
class Items:
    """A task's scores item by item, before and after; items of one cluster are one observation."""

    before: Sequence[float]
    after: Sequence[float]
    clusters: Sequence[Hashable]


def backward_transfer(results: Matrix) -> float:
    """BWT = 1/(T-1) sum_{i<T} (R[T][i] - R[i][i]): below zero where later phases hurt earlier ones.

    Lopez-Paz & Ranzato 2017, "Gradient Episodic Memory for Continual Learning" (arXiv 1706.08840), equation 3.
    Raises ValueError for fewer than two phases.
    """
    last = _last(results)
    return sum(results[last][i] - results[i][i] for i in range(last)) / last


def forgetting(results: Matrix) -> float:
    """F = 1/(T-1) sum_{j<T} f_j, f_j = max_{j<=l<T} a[l][j] - a[T][j]: above zero where the best result is lost.

    Chaudhry et al. 2018, "Riemannian Walk for Incremental Learning" (arXiv 1801.10112), section 3; the maximum is
    over the phases from j on, as the tasks of j are not trained before. Raises ValueError for fewer than two phases.
    """
    last = _last(results)
    return sum(max(results[i][j] for i in range(j, last)) - results[last][j] for j in range(last)) / last


def paired_changes(tasks: Sequence[Items], averages: Sequence[Sequence[float]]) -> list[MeanChange]:
    """The changes of the tasks' means, then those of their weighted averages (a weight for each task).

    The 95% intervals are simultaneous (`intervals.together`): the more there are, the wider they are. They are over
    clusters of items; the same cluster in several tasks, such as a question in several languages, is one observation.
    Raises ValueError where a task's lists differ in length.
    """
    import numpy as np

    keys: list[Hashable] = []
    columns, counts, values = [], [], []
    for number, task in enumerate(tasks):
        scores = [(b - a, 1.0) for a, b in zip(task.before, task.after, strict=True)]
        sums = by_cluster(task.clusters, np.array(scores, dtype=float))
        value, influence = ratio(sums[:, :1], sums[:, 1:])
        scale = len(sums) / max(len(sums) - 1, 1)
        column = np.zeros((len(sums), len(tasks)))
        column[:, number] = influence[:, 0] * scale**0.5
        keys += dict.fromkeys(task.clusters)
        columns.append(column)
        counts.append(len(sums))
        values.append(float(value[0]))
    weights = np.concatenate([np.eye(len(tasks)), np.array(averages, dtype=float).reshape(-1, len(tasks))])
    scaled = by_cluster(keys, np.concatenate(columns)) @ weights.T
    bounds = together(scaled, min((count for count in counts if count > 1), default=1) - 1)
    found = []
    for at, (weight, value) in enumerate(zip(weights, weights @ np.array(values), strict=True)):
        own = [int(i) for i in np.flatnonzero(weight)]
        clusters = len({key for i in own for key in tasks[i].clusters})
        low, high, method = bounds.around(float(value), at)
        if min(counts[i] for i in own) < 2:
            low, high, method = None, None, NO_INTERVAL
        items = sum(len(tasks[i].before) for i in own)
        found.append(
            MeanChange(float(value), low, high, clusters=clusters, method=method, compared=len(weights), items=items)
        )
    return found


def _last(results: Matrix) -> int:
    if len(results) < 2:
        raise ValueError(f"{len(results)} phases: forgetting needs at least two")
    return len(results) - 1
