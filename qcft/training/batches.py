"""What the trainer is fed: rows in their mixed order, epoch after epoch, packed or one by one."""

from __future__ import annotations

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

    `train.batch` counts rows. With packing, a pack holds up to `max_length` tokens but no more than a
    step should see, and a step takes the number of packs that comes nearest to `batch` rows, so small
    data is not trained in two giant steps.
    """
    sequence = _epochs(rows, order, train)
    if not train.packing:
        per_pass = min(train.micro_batch, train.batch)
        accumulation = math.ceil(train.batch / per_pass)
        return Batches(_cut([[r] for r in sequence], per_pass * accumulation, train), per_pass, accumulation, False)
    lengths = [len(row.input_ids) for row in sequence]
    wanted = train.batch * sum(lengths) / len(lengths)
    packs = pack(sequence, round(min(train.max_length, max(max(lengths), wanted))))
    accumulation = max(1, round(train.batch * len(packs) / len(sequence)))
    return Batches(_cut(packs, accumulation, train), 1, accumulation, True)


def _epochs(rows: Sequence[EncodedRow], order: Callable[[int], list[int]], train: Train) -> list[EncodedRow]:
    # With a number of steps asked for, `batch` rows a step are laid out, and a tenth more for packs
    # that turn out fuller than their mean; `_cut` takes what is too much.
    wanted = round(train.epochs * len(rows)) if train.steps is None else math.ceil(train.steps * train.batch * 1.1)
    sequence: list[EncodedRow] = []
    epoch = 0
    while len(sequence) < max(1, wanted):
        sequence += [rows[i] for i in order(epoch)]
        epoch += 1
    return sequence[: max(1, wanted)]


def _cut(items: list[list[EncodedRow]], per_step: int, train: Train) -> list[list[EncodedRow]]:
    return items if train.steps is None else items[: train.steps * per_step]
