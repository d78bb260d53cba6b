"""What the trainer is fed: rows in their mixed order, epoch after epoch, packed or one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from qcft.data.encode import EncodedRow
from qcft.data.mix import pack
from qcft.recipe import Train


@dataclass(frozen=True)
class Batches:
    """Items in training order. An item is one row, or one pack of rows run without padding.

    Each optimizer step takes `accumulation` passes of `per_pass` items.
    """

    items: list[list[EncodedRow]]
    per_pass: int
    accumulation: int
    packed: bool

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return math.ceil(len(self.items) / (self.per_pass * self.accumulation))

    @property
    def rows(self) -> int:
        """Rows trained in all, each epoch's counted."""
        return sum(len(item) for item in self.items)

    def tokens_until(self, step: int) -> int:
        """Tokens run through the model in the first `step` optimizer steps."""
        return self._running_tokens[min(len(self.items), step * self.per_pass * self.accumulation)]

    @cached_property
    def _running_tokens(self) -> list[int]:
        return list(accumulate((sum(len(row.input_ids) for row in item) for item in self.items), initial=0))


def make_batches(rows: Sequence[EncodedRow], order: Callable[[int], list[int]], train: Train) -> Batches:
    """Lay out the training: `order(epoch)` gives the order of the rows in each epoch, from 0.

    `train.batch` counts rows. With packing, a pack holds at most `batch` rows and what `batch` rows take on
    average, up to `max_length` tokens; a step takes the number of packs that comes nearest to `batch` rows.
    So small data is not trained in two giant steps, and packing changes the speed, not the schedule.
    """
    if train.packing:
        mean = sum(len(row.input_ids) for row in rows) / len(rows)
        budget = round(min(train.max_length, train.batch * mean))
        per_pass = 1
    else:
        per_pass = max(n for n in range(1, min(train.micro_batch, train.batch) + 1) if train.batch % n == 0)
    sequence: list[EncodedRow] = []
    for epoch in itertools.count():
        sequence += [rows[i] for i in order(epoch)]
        if train.steps is None:
            wanted = max(1, round(train.epochs * len(rows)))
            if len(sequence) < wanted:
                continue
            sequence = sequence[:wanted]
        items = pack(sequence, budget, train.batch) if train.packing else [[row] for row in sequence]
        accumulation = max(1, round(train.batch * len(items) / len(sequence) / per_pass))
        if train.steps is None:
            break
        if len(items) >= train.steps * accumulation * per_pass:
            items = items[: train.steps * accumulation * per_pass]
            break
    return Batches(items, per_pass, accumulation, train.packing)
