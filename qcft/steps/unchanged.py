"""Work on files that others may change meanwhile: results from changed files are discarded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qcft.errors import ChangedInput
from qcft.models.inputs import Inputs
from qcft.store import Store


@contextmanager
def inputs_unchanged(inputs: Inputs, store: Store) -> Iterator[None]:
    """Check a model's files before and after the work on a claimed step. Raises ChangedInput, after removing the step
    and those claimed since."""
    inputs.check()
    begun = max(len(store.claimed) - 1, 0)
    try:
        yield
    except Exception:  # the change may be its cause, and may be in a checkpoint
        discard_changed(inputs, store, begun)
        raise
    discard_changed(inputs, store, begun)


def discard_changed(inputs: Inputs, store: Store, begun: int, thorough: bool = False) -> None:
    """Raise ChangedInput if a model's files changed, after removing the steps that were claimed since `begun`."""
    try:
        inputs.check(thorough)
    except ChangedInput:
        for step in dict.fromkeys(store.claimed[begun:]):
            store.discard(step)
        raise
