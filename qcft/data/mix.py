"""Mixing replay into new rows: sized first, then interleaved, so that nothing is lost or repeated."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeVar

from qcft.data.encode import EncodedRow

T = TypeVar("T")
BLOCK = 10  # replay rows per interleaved block: keeps the share even along the training


def replay_rows_needed(new_rows: int, ratio: float) -> int:
    """How many replay rows make up `ratio` of the final mix beside `new_rows`, to the nearest row.

    n = r / (1 - r) * new, rounded half up; exact in the decimal ratio that was written.
    """
    share = Fraction(str(ratio))
    return int(share / (1 - share) * new_rows + Fraction(1, 2))


def mixed_order(new_rows: int, replay_rows: int, seed: int | str) -> list[int]:
    """An order of `new_rows + replay_rows` rows, the replay rows numbered after the new ones.

    Both are shuffled, cut into blocks of about ten replay rows, and each block is interleaved by
    `datasets.interleave_datasets` without replacement: every row comes exactly once, and no stretch of
    the training has much more or less replay than the whole.
    """
    new = shuffled(range(new_rows), f"{seed}:new")
    if not replay_rows:
        return new
    replay = shuffled(range(new_rows, new_rows + replay_rows), f"{seed}:replay")
    if not new_rows:
        return replay
    from datasets import Dataset, interleave_datasets

    blocks = max(1, min(new_rows, replay_rows) // BLOCK)
    order: list[int] = []
    for block in range(blocks):
        parts = [_slice(new, block, blocks), _slice(replay, block, blocks)]
        total = len(parts[0]) + len(parts[1])
        mixed = interleave_datasets(
            [Dataset.from_dict({"row": part}) for part in parts],
            probabilities=[len(part) / total for part in parts],
            seed=stable_seed(f"{seed}:{block}"),
            stopping_strategy="all_exhausted_without_replacement",
        )
        order += list(mixed["row"])
    return order


def pack(rows: Sequence[EncodedRow], max_tokens: int, max_rows: int) -> list[list[EncodedRow]]:
    """Join neighbouring rows into packs of at most `max_tokens` tokens and `max_rows` rows, in their order.

    A pack is run without padding and with positions that begin anew at each row, so no row sees another
    and a pack that is not full costs nothing. A row longer than `max_tokens` is a pack of its own.
    """
    packs: list[list[EncodedRow]] = []
    room = 0
    for row in rows:
        length = len(row.input_ids)
        if not packs or length > room or len(packs[-1]) == max_rows:
            packs.append([])
            room = max_tokens
        packs[-1].append(row)
        room -= length
    return packs


def shuffled(items: Sequence[T], seed: str) -> list[T]:
    """The items in an order drawn from the seed."""
    result = list(items)
    random.Random(stable_seed(seed)).shuffle(result)
    return result


def stable_seed(text: str) -> int:
    """A 32-bit seed from a text, the same on every machine."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def _slice(items: list[int], block: int, blocks: int) -> list[int]:
    return items[len(items) * block // blocks : len(items) * (block + 1) // blocks]
