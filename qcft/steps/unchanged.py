"""Work that rests on files which others may change meanwhile: what was made of changed ones is not kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qcft.errors import ChangedInput
from qcft.models.inputs import Inputs
from qcft.store import Store


@contextmanager
def inputs_unchanged(inputs: Inputs, store: Store) -> Iterator[None]:
    """Check a model's files before and after the work on a step that is claimed. Raises ChangedInput; of the step, and
    what was claimed since, nothing is left then."""
    inputs.check()
    begun = max(len(store.claimed) - 1, 0)
    try:
        yield
    except Exception:  # it may come of the change, and a checkpoint be made of it
        discard_changed(inputs, store, begun)
        raise
    discard_changed(inputs, store, begun)


def discard_changed(inputs: Inputs, store: Store, begun: int, thorough: bool = False) -> None:
    """Raise ChangedInput where a model's files changed, after removing what the store claimed since `begun`."""
    try:
        inputs.check(thorough)
    except ChangedInput:
        for step in dict.fromkeys(store.claimed[begun:]):
            store.discard(step)
        raise
