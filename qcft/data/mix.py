"""Mixes replay with new rows: shuffled, then interleaved, so that no row is lost or repeated."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import TypeVar

T = TypeVar("T")
BLOCK = 5  # replay rows per interleaved block: keeps the share even throughout training
LANGUAGE_BLOCK = 50  # rows of the smallest language per interleaved block of languages


def stratified(items: Sequence[T], stratum: Callable[[T], Hashable], seed: str) -> list[T]:
    """A seeded order in which any first part has every stratum in proportion.

    The i-th of the n items of a stratum is placed at (i + u) / n, with one u in [0, 1) for each stratum.
    """
    strata: dict[Hashable, list[T]] = {}
    for item in shuffled(items, seed):
        strata.setdefault(stratum(item), []).append(item)
    placed = []
    for key, members in strata.items():
        offset = Fraction(stable_seed(f"{seed}:{key}"), 2**32)
        placed += [((i + offset) / len(members), str(key), i, member) for i, member in enumerate(members)]
    return [member for *_, member in sorted(placed, key=lambda entry: entry[:3])]


def mixed_order(new_rows: int, replay_rows: int, seed: int | str, langs: Sequence[Hashable] | None = None) -> list[int]:
    """An order of `new_rows + replay_rows` rows, the replay rows numbered after the new ones.

    Both are shuffled and cut into blocks of at most five replay rows, and each block is interleaved by
    `datasets.interleave_datasets` without replacement: every row appears exactly once, and any part of the training
    that should have 20 replay rows or more has at least half and at most twice as many.
    With `langs`, the language of each new row, the new rows are interleaved by language in the same way, in blocks of
    at most fifty rows of the smallest.
    """
    if langs is None:
        new = shuffled(range(new_rows), f"{seed}:new")
    else:
        parts = [[i for i in range(new_rows) if langs[i] == lang] for lang in dict.fromkeys(langs)]
        parts = [shuffled(part, f"{seed}:new:{number}") for number, part in enumerate(parts)]
        new = _interleaved(parts, -(-min(map(len, parts), default=0) // LANGUAGE_BLOCK), f"{seed}:new")
    if not replay_rows:
        return new
    replay = shuffled(range(new_rows, new_rows + replay_rows), f"{seed}:replay")
    return _interleaved([new, replay], -(-replay_rows // BLOCK), seed) if new_rows else replay


def _interleaved(parts: Sequence[list[int]], blocks: int, seed: int | str) -> list[int]:
    """The parts in one order, each spread evenly: every row once, each part's rows in their order."""
    from datasets import Dataset, interleave_datasets

    order: list[int] = []
    for block in range(blocks):
        slices = [one for part in parts if (one := _slice(part, block, blocks))]
        if len(slices) == 1:
            order += slices[0]
            continue
        total = sum(map(len, slices))
        mixed = interleave_datasets(
            [Dataset.from_dict({"row": part}) for part in slices],
            probabilities=[len(part) / total for part in slices],
            seed=stable_seed(f"{seed}:{block}"),
            stopping_strategy="all_exhausted_without_replacement",
        )
        order += list(mixed["row"])
    return order


def in_groups(
    items: Iterable[T], size: Callable[[T], int], most: float, count: float = math.inf, padded: bool = False
) -> Iterator[list[T]]:
    """Adjacent items in groups of at most `count` items and a total size of at most `most`, each as large as possible.

    A larger item has a group of its own. `padded`: every item counts as the largest of its group.
    """
    group: list[T] = []
    held = largest = 0
    for item in items:
        own = size(item)
        held, largest = held + own, max(largest, own)
        if group and (len(group) == count or ((len(group) + 1) * largest if padded else held) > most):
            yield group
            group, held, largest = [], own, own
        group.append(item)
    if group:
        yield group


def shuffled(items: Sequence[T], seed: str) -> list[T]:
    """The items in a seeded order."""
    result = list(items)
    random.Random(stable_seed(seed)).shuffle(result)
    return result


def stable_seed(text: str) -> int:
    """A 32-bit seed from a text, the same on every machine."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def _slice(items: list[int], block: int, blocks: int) -> list[int]:
    return items[len(items) * block // blocks : len(items) * (block + 1) // blocks]
