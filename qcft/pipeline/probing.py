"""The rows that a phase's live probe looks at."""

from __future__ import annotations

from qcft.data.encode import EncodedRow
from qcft.pipeline.prepare import Prepared
from qcft.recipe import Phase
from qcft.training.ranks import world


def english_rows(prepared: Prepared, phase: Phase) -> list[EncodedRow]:
    """Held-out English rows in an order that every arm shares; none for a phase that is not probed, nor where several
    processes train, each of which would probe."""
    group = prepared.english_group(phase) if world() == 1 else None
    if group is None:
        return []
    held = prepared.held_out(group)
    ranked = sorted(zip(held.rows, held.encoded, strict=True), key=lambda pair: pair[0].key)
    return [encoded for _, encoded in ranked]
