"""Which point of a dial to use: chosen on one half of the held-out rows, reported on the other. Pure.

The choice is made on other rows than the report, so it does not bias the reported values. Rows with one key, the
translations of one row, are in the same half and count as one observation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from qcft.measure.intervals import Interval
from qcft.measure.score import RowScore
from qcft.measure.stats import Difference, difference, mean_nll

MINIMUM = 8  # observations of English, and of the other languages, in each half
RowsByGroup = Mapping[str, Sequence[RowScore]]  # one model's scores of the held-out rows, group by group


@dataclass(frozen=True)
class Half:
    """The results of a point on half the rows: changes of mean NLL in nats per answer token, below zero is better.

    `english` is relative to the model that English is compared with, `others` to the base; `full_...` are the same for
    the full delta. `against_full`: English NLL of the point minus that of the full delta. `kept`: the point's share of
    the full delta's gain in the other languages; None where that gain is not clear on these rows.
    """

    english: Difference
    others: Difference
    full_english: Difference
    full_others: Difference
    against_full: Difference
    kept: Interval | None


@dataclass(frozen=True)
class Pick:
    """The point with the best English among those that keep the share of the gain (`enough` of all `points`); its
    results on the rows it was chosen on, and on the others."""

    point: str
    points: int
    enough: int
    chosen: Half
    reported: Half


@dataclass(frozen=True)
class NoPick:
    """Why no point can be picked."""

    why: str


@dataclass(frozen=True)
class _Scores:
    english: list[RowScore]
    others: list[RowScore]


def pick_point(
    points: Mapping[str, RowsByGroup],
    full: str,
    base: RowsByGroup,
    since: RowsByGroup,
    english: Collection[str],
    share: float,
) -> Pick | NoPick:
    """The point with the lowest English NLL among those that keep `share` (0 to 1] of the other languages' gain.

    The gain is that of the point `full`, the full delta, over the base. `english`: the names of the groups of English
    rows. All models are scored on the same rows.
    """
    keys = halves(base)

    def on(half: int, groups: RowsByGroup) -> _Scores:
        inside = [name for name in groups if name in english], [name for name in groups if name not in english]
        return _Scores(*(observations(groups, names, keys[half]) for names in inside))

    counts = [len(rows) for half in (0, 1) for rows in (on(half, base).english, on(half, base).others)]
    if min(counts) < MINIMUM:
        return NoPick(
            f"half of the held-out rows are too few: {counts[0]} and {counts[2]} English, {counts[1]} and {counts[3]} "
            f"others, translations of one row counted once; each must be at least {MINIMUM}"
        )
    before, first = on(0, base), {name: on(0, groups) for name, groups in points.items()}
    gained = difference(before.others, first[full].others)
    if gained.value >= 0 or not gained.is_clear:
        over = gained.method if gained.low is None else f"95% interval {gained.low:+.3f} to {gained.high:+.3f}"
        return NoPick(
            f"the other languages have no clear gain on half of the held-out rows: their NLL changed by "
            f"{gained.value:+.3f} nats ({over})"
        )
    gains = {name: mean_nll(before.others) - mean_nll(scores.others) for name, scores in first.items()}
    enough = {name: scores for name, scores in first.items() if gains[name] >= share * gains[full]}
    best = min(enough, key=lambda name: (mean_nll(enough[name].english), mean_nll(enough[name].others)))
    found = (_half(*(on(half, groups) for groups in (points[best], points[full], base, since))) for half in (0, 1))
    return Pick(best, len(points), len(enough), *found)


def halves(groups: RowsByGroup) -> tuple[frozenset[str], frozenset[str]]:
    """The rows' keys in two halves, by a digest of the key: the same on every machine, independent of the scores.

    Keys that are in the same groups go to the two halves in turn.
    """
    inside: dict[str, set[str]] = {}
    for name, rows in groups.items():
        for row in rows:
            inside.setdefault(row.key, set()).add(name)
    order = sorted(inside, key=lambda key: (sorted(inside[key]), hashlib.sha256(f"pick:{key}".encode()).digest()))
    return frozenset(order[::2]), frozenset(order[1::2])


def observations(groups: RowsByGroup, names: Iterable[str], keys: Collection[str]) -> list[RowScore]:
    """The rows with these groups and keys, those of one key summed; in the order of the keys."""
    found: dict[str, RowScore] = {}
    for name in names:
        for row in groups[name]:
            if row.key in keys:
                sum_ = found.get(row.key, RowScore(0.0, 0, 0, row.key))
                found[row.key] = RowScore(
                    sum_.nll + row.nll, sum_.tokens + row.tokens, sum_.correct + row.correct, row.key
                )
    return [found[key] for key in sorted(found)]


def _half(point: _Scores, full: _Scores, base: _Scores, since: _Scores) -> Half:
    return Half(
        difference(since.english, point.english),
        difference(base.others, point.others),
        difference(since.english, full.english),
        difference(base.others, full.others),
        difference(full.english, point.english),
        _kept(base.others, point.others, full.others),
    )


def _kept(base: Sequence[RowScore], point: Sequence[RowScore], full: Sequence[RowScore]) -> Interval | None:
    """The share R of the full delta's gain, with a 95% interval by linearisation.

    The error of a ratio of two means is that of the mean of (point's gain - R full's gain), divided by full's mean gain
    (Cochran 1977, "Sampling Techniques", section 6.4).
    """
    whole = difference(full, base)
    if whole.value <= 0 or not whole.is_clear:
        return None
    share = difference(point, base).value / whole.value
    as_much = [RowScore(b.nll - share * (b.nll - f.nll), b.tokens, 0, b.key) for b, f in zip(base, full, strict=True)]
    error = difference(point, as_much)
    low, high = (None if end is None else share + end / whole.value for end in (error.low, error.high))
    return Interval(share, low, high, clusters=error.clusters, method=error.method)
