"""Draws the rows of each language for an epoch where the recipe balances languages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qcft.data.encode import EncodedSet
from qcft.data.mix import shuffled
from qcft.recipe import Temperature

NOT_DRAWN = "not drawn, to balance languages"


def balanced_rows(rows: Mapping[str, int], balance: str | Temperature) -> dict[str, int]:
    """How many rows each language gives, from how many it has: `none` all, `equal` as many as the smallest has.

    With a temperature T, in proportion to the T-th root of its rows (Conneau et al. 2020, arXiv 1911.02116, where
    T is 1 / alpha); the smallest language gives all of its rows, so no row is repeated.
    """
    if balance == "none":
        return dict(rows)
    least = min(rows.values())
    power = 1 / balance.temperature if isinstance(balance, Temperature) else 0.0
    return {lang: min(count, int(least * (count / least) ** power + 0.5)) for lang, count in rows.items()}


def draw_balanced(
    sets: Sequence[EncodedSet], langs: Sequence[str], balance: str | Temperature, seed: int
) -> list[EncodedSet]:
    """The sets with only the drawn rows, in their order; `langs` has the language of each set.

    Every row of a language has the same chance, whichever set it is in. Rows that are not drawn are counted as dropped.
    """
    rows: dict[str, list[tuple[int, int]]] = {lang: [] for lang in langs}
    for number, (one, lang) in enumerate(zip(sets, langs, strict=True)):
        rows[lang] += [(number, place) for place in range(len(one.rows))]
    wanted = balanced_rows({lang: len(places) for lang, places in rows.items()}, balance)
    drawn = {one for lang, places in rows.items() for one in shuffled(places, f"{seed}:balance:{lang}")[: wanted[lang]]}
    return [_only(one, [i for i in range(len(one.rows)) if (number, i) in drawn]) for number, one in enumerate(sets)]


def _only(one: EncodedSet, places: Sequence[int]) -> EncodedSet:
    missing = len(one.rows) - len(places)
    left_out = {**one.left_out, NOT_DRAWN: missing} if missing else one.left_out
    rows, encoded = tuple(one.rows[i] for i in places), tuple(one.encoded[i] for i in places)
    return replace(one, rows=rows, encoded=encoded, left_out=left_out)
