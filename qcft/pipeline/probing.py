"""Which held-out English rows a phase's live probe looks at."""

from __future__ import annotations

from qcft.data.encode import EncodedRow
from qcft.pipeline.pools import ENGLISH
from qcft.pipeline.prepare import Prepared
from qcft.recipe import Phase
from qcft.training.ranks import world


def english_rows(prepared: Prepared, phase: Phase) -> list[EncodedRow]:
    """Held-out English rows, in an order that every arm shares: those of another phase, of `probe`, or that ship with
    qcft. None for a phase that is itself where the English rows are from: it makes what the probe would measure; nor
    where several processes train, which would each probe."""
    if world() > 1:
        return []
    for group in prepared.groups:
        if group.lang == ENGLISH and group.phase != phase.name:
            held = prepared.held_out(group)
            ranked = sorted(zip(held.rows, held.encoded, strict=True), key=lambda pair: pair[0].key)
            return [encoded for _, encoded in ranked]
    return []
