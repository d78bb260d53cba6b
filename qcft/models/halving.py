"""Retrying work in smaller parts when memory runs out, on the GPU or in RAM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from qcft.errors import QcftError, is_out_of_memory
from qcft.models.load import free_memory

Item = TypeVar("Item")
Result = TypeVar("Result")


def attempt(work: Callable[[], Result]) -> Result | None:
    """The result of `work`, or None if memory ran out; the memory it held is freed then."""
    try:
        return work()
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
    free_memory()  # outside the handler, whose traceback keeps references to the tensors
    return None


def in_halves(work: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item], what: str) -> list[Result]:
    """`work(items)`, or on each half if memory runs out. Raises QcftError if not even one item fits."""
    done = attempt(lambda: work(items))
    if done is not None:
        return done
    if len(items) == 1:
        raise QcftError(f"memory ran out {what}", "use a smaller model or a smaller train.max_length, or free memory")
    half = len(items) // 2
    return in_halves(work, items[:half], what) + in_halves(work, items[half:], what)
