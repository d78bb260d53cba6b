"""The trainer's input: rows in their mixed order, epoch after epoch, packed or one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from qcft.data.encode import IGNORED, EncodedRow
from qcft.data.mix import in_groups
from qcft.errors import QcftError
from qcft.recipe import Train
from qcft.store.metrics import FedSource

FILLER = "(filler)"  # the source of a row that only fills up a process's passes: it bears no loss


@dataclass(frozen=True)
class Batches:
    """Items in training order. An item is one row, or one pack of rows that run without padding.

    Each optimizer step takes `accumulation` passes of `per_pass` items.
    """

    items: list[list[EncodedRow]]
    per_pass: int
    accumulation: int
    packed: bool

    @property
    def steps(self) -> int:
        """The total number of optimizer steps."""
        return math.ceil(len(self.items) / (self.per_pass * self.accumulation))

    @property
    def rows(self) -> int:
        """The total number of trained rows, over all epochs."""
        return sum(len(item) for item in self.items)

    @property
    def answer_tokens(self) -> int:
        """The total number of tokens that bear loss, over all epochs."""
        return sum(row.answer_tokens for item in self.items for row in item)

    def rows_of(self, step: int) -> list[EncodedRow]:
        """The rows of one optimizer step, counted from 1."""
        each = self.per_pass * self.accumulation
        return [row for item in self.items[(step - 1) * each : step * each] for row in item]

    def tokens_until(self, step: int) -> int:
        """Tokens run through the model in the first `step` optimizer steps."""
        return self._running_tokens[min(len(self.items), step * self.per_pass * self.accumulation)]

    @cached_property
    def _running_tokens(self) -> list[int]:
        return list(accumulate((sum(len(row.input_ids) for row in item) for item in self.items), initial=0))


class Fed:
    """Counts the items that the trainer receives, pass by pass, and checks each pass against the plan.

    With several processes, each takes the `rank`th pass of every `world` passes and counts them all.
    """

    def __init__(self, batches: Batches, rank: int = 0, world: int = 1) -> None:
        self.batches = batches
        self.items = 0
        self.rank = rank
        self.world = world

    def take(self, step: int, items: Sequence[int]) -> None:
        """Count one pass of optimizer step `step` (from 0); `items`: the numbers of its items.

        Raises QcftError if the pass is not the planned one, as then the mix was not trained as it should be.
        """
        begin = step * self.batches.per_pass * self.batches.accumulation
        if self.items < begin:  # resumed from a checkpoint: earlier passes were counted and checked before it
            self.items = begin
        own = self.items + self.rank * self.batches.per_pass
        wanted = list(range(own, min(own + self.batches.per_pass, len(self.batches.items))))
        if list(items) != wanted:
            raise QcftError(
                f"the training was fed items {list(items)} at step {step + 1}, where the mix has {wanted}",
                "please report this",
            )
        self.items = min(len(self.batches.items), self.items + self.world * self.batches.per_pass)

    def exposure(self, steps: int) -> list[FedSource]:
        """Rows, tokens and answer tokens of the first `steps` (all trained), by source, over all epochs."""
        end = min(len(self.batches.items), steps * self.batches.per_pass * self.batches.accumulation)
        if self.items < end:
            self.items = end  # a checkpoint held every step already, so no item was received again
        found: dict[str, FedSource] = {}
        fed = (row for item in self.batches.items[: min(self.items, end)] for row in item if row.source != FILLER)
        for row in fed:
            entry = found.setdefault(row.source, {"source": row.source, "rows": 0, "tokens": 0, "answer_tokens": 0})
            entry["rows"] += 1
            entry["tokens"] += len(row.input_ids)
            entry["answer_tokens"] += row.answer_tokens
        return list(found.values())


def check_collated(labels: Any, rows: Sequence[EncodedRow]) -> None:
    """Check that a pass has as many tokens that bear loss as its rows. Raises QcftError."""
    found, wanted = int((labels != IGNORED).sum()), sum(row.answer_tokens for row in rows)
    if found != wanted:
        raise QcftError(
            f"{found} tokens of {len(rows)} rows would bear loss, where the rows have {wanted}", "please report this"
        )


def make_batches(rows: Sequence[EncodedRow], order: Callable[[int], list[int]], train: Train) -> Batches:
    """Plan the training: `order(epoch)` gives the order of the rows in each epoch, from 0.

    `train.batch` counts rows. With packing, a pack holds at most `batch` rows and at most the tokens of `batch` rows on
    average, up to `max_length` tokens; a step takes the number of packs that is closest to `batch` rows.
    So small data is not trained in two huge steps, and packing changes the speed, not the schedule.
    """
    if train.packing:
        mean = sum(len(row.input_ids) for row in rows) / len(rows)
        budget = round(min(train.max_length, train.batch * mean))
        per_pass = 1
    elif train.micro_batch == "auto":
        per_pass = train.batch  # divided to fit into memory when it runs
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
        # A pack runs without padding, and positions start again at 0 for each row, so no row sees another and a pack
        # that is not full costs nothing.
        if train.packing:
            items = [*in_groups(sequence, lambda row: len(row.input_ids), budget, train.batch)]
        else:
            items = [[row] for row in sequence]
        accumulation = max(1, round(train.batch * len(items) / len(sequence) / per_pass))
        if train.steps is None:
            break
        if len(items) >= train.steps * accumulation * per_pass:
            items = items[: train.steps * accumulation * per_pass]
            break
    return Batches(items, per_pass, accumulation, train.packing)
