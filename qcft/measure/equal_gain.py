"""English at an equal gain in the other languages: interpolated between the points of a dial. Pure.

Arms differ in how much they learn, and an arm that learns less forgets less. Along its dial each arm reaches the same
gain at some point, where the arms' English can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

from qcft.measure.score import RowScore


def place_of(gains: Sequence[float], wanted: float) -> tuple[int, float] | None:
    """Where a dial first has the wanted gain: the point i before it, and the share w of the way to the next point, so
    that (1 - w) gains[i] + w gains[i + 1] = wanted. `gains`: at each point, by increasing scale. None where no two
    neighbouring points enclose it."""
    for i, gain in enumerate(gains):
        if gain == wanted:
            return i, 0.0
        if i and min(gains[i - 1], gain) < wanted < max(gains[i - 1], gain):
            return i - 1, (wanted - gains[i - 1]) / (gain - gains[i - 1])
    return None


def between(values: Sequence[float], place: tuple[int, float]) -> float:
    """The value at a place between two points, by linear interpolation."""
    i, way = place
    return values[i] if way == 0 else (1 - way) * values[i] + way * values[i + 1]


def english_at_gain(gains: Sequence[float], english: Sequence[float], wanted: float) -> float | None:
    """The change of English NLL where a dial has the wanted gain; None where its points do not reach it."""
    place = place_of(gains, wanted)
    return None if place is None else between(english, place)


def scores_between(points: Sequence[Sequence[RowScore]], place: tuple[int, float]) -> list[RowScore]:
    """Each row's score at a place between two points, its NLL by linear interpolation."""
    return [
        RowScore(between([row.nll for row in rows], place), rows[0].tokens, 0, rows[0].key)
        for rows in zip(*points, strict=True)
    ]
