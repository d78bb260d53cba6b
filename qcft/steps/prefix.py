"""Whether a training starts from stored states of its frozen layers, and where they are stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qcft.data.encode import EncodedRow
from qcft.events import Watch
from qcft.files import disk_free
from qcft.recipe import Train
from qcft.store import Store
from qcft.store.states import RowStates
from qcft.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qcft.training.prefix import Prefix

FORMAT = 1  # raised when what is stored changes


def open_prefix(
    model: PreTrainedModel,
    below: int,
    rows: Sequence[EncodedRow],
    passes: int,
    weights: dict[str, Any],
    train: Train,
    store: Store,
    watch: Watch,
) -> Prefix | None:
    """Cut a model at its lowest adapted layer, `below`, and store the states of `rows`; None without a prefix cache.

    `passes`: how many rows are trained, over all epochs. `weights` identifies the weights of the frozen layers. States
    are stored if the recipe asks for it, if they take at most 1 GB, or if they are read again: in a later epoch, or
    because some are stored already.
    """
    from qcft.models.load import compute_dtype
    from qcft.training.prefix import SMALL, Prefix, cannot_split, fill_states, row_key, worth_storing

    asked = train.prefix_cache
    if asked is False or below == 0:
        if asked is True:
            watch.note("no prefix cache: layer 0 carries an adapter, so nothing is frozen below the adapters")
        return None
    reason = cannot_split(model, train)
    if reason:
        watch.note(f"no prefix cache: {reason}; training runs the frozen layers too")
        return None
    config: Any = model.config
    inputs = {
        **weights,
        "format": FORMAT,
        "below": below,
        "dtype": str(compute_dtype()),
        "attention": config._attn_implementation,
    }
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:10]
    step = f"prefix-{key}"
    width, itemsize = int(config.hidden_size), compute_dtype().itemsize
    there = RowStates(store.folder(step), width, itemsize)
    lengths = {row_key(row): len(row.input_ids) for row in rows}
    new = [length for key, length in lengths.items() if not there.has(key)]
    needed = sum(new) * there.token_bytes
    free = disk_free(store.runs)
    again = passes > len(lengths) or len(new) < len(lengths)
    if not worth_storing(train, needed, again):
        return None
    if needed > (free - SMALL if asked is True else free // 2):
        watch.note(
            f"no prefix cache: it needs {_size(needed)} of {_size(free)} free; training runs the frozen layers too",
            "warning",
        )
        return None
    watch.note(
        f"the lowest {counted(below, 'layer is', 'layers are')} frozen: the output is computed once per row and stored "
        f"({len(lengths) - len(new)} of {counted(len(lengths), 'row')} stored so far; {_size(needed)} on disk)"
    )
    with store.claim(step, inputs, watch) as folder:
        states = RowStates(folder, width, itemsize)
        fill_states(model, below, rows, states, watch)
    return Prefix(model, below, states)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
