"""How much replay a phase adds, in rows or answer tokens: exact fractions until rows are chosen."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import TypeVar

from qcft.recipe import Replay

T = TypeVar("T")


def replay_amount(replay: Replay | None, new: int) -> Fraction:
    """How much replay gives its share of the final mix with `new`, in the same unit: rows or answer tokens.

    r / (1 - r) * new, exact for the decimal ratio as written.
    """
    share = Fraction(str(replay.ratio)) if replay else Fraction(0)
    return share / (1 - share) * new


def rounded(amount: Fraction) -> int:
    """An amount as a whole number of rows or tokens, halves rounded up."""
    return int(amount + Fraction(1, 2))


def take_amount(rows: Iterable[T], amount: Fraction, weigh: Callable[[T], int]) -> tuple[list[T], Fraction]:
    """The first rows whose weights sum to nearly `amount` (half a row is rounded up), and how much is missing if there
    are too few rows, else 0.

    With a weight of 1 each, that is `amount` to the nearest row; with their answer tokens, to half a row's length. No
    more rows are read than needed, so they may be generated on demand.
    """
    taken: list[T] = []
    total, last = 0, 0
    source = iter(rows)
    while total < amount:
        row = next(source, None)
        if row is None:
            missing = amount - total
            # Not counted as missing: less than half of another row like the last one.
            return taken, missing if not last or missing * 2 >= last else Fraction(0)
        last = weigh(row)
        if total + last > amount and amount - total < total + last - amount:
            break
        taken.append(row)
        total += last
    return taken, Fraction(0)


def split_amount(amount: Fraction, weights: Sequence[float]) -> list[Fraction]:
    """An amount in parts proportional to the weights; they sum to it exactly."""
    exact = [Fraction(str(weight)) for weight in weights]
    return [amount * weight / sum(exact) for weight in exact]


def repeated(rows: Sequence[T], missing: Fraction, weigh: Callable[[T], int]) -> list[T]:
    """Rows repeated from the first, as often as needed to fill what is missing."""
    return take_amount(itertools.cycle(rows), missing, weigh)[0] if rows else []
