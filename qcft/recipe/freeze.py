"""The one place where a freeze spec is read. Every spec names what is FROZEN, that is, gets no adapter.

none, first:N, last:N, middle:N, every:K, layers:0-11,20 and random:SHARE[@SEED]. N is a count, or a share
when it has a decimal point (0.5); shares round half up. `middle:N` freezes all but N layers at each end.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass

from qcft.errors import InputError, nearest

KINDS = ("none", "first", "last", "middle", "every", "layers", "random")
HINT = "use none, first:N, last:N, middle:N, every:K, layers:0-11,20 or random:0.5@SEED"


@dataclass(frozen=True)
class FreezeSpec:
    """A parsed spec; `amount` is an int (layers) or a float (share of the layers)."""

    kind: str
    amount: int | float | None = None
    ranges: tuple[tuple[int, int], ...] = ()
    seed: int | None = None
    text: str = "none"


def parse_freeze(text: str) -> FreezeSpec:
    """Read a spec. Raises InputError when it is not one."""
    kind, _, argument = text.strip().partition(":")
    if kind not in KINDS:
        raise InputError(f"freeze: {text!r} is not a freeze spec", nearest(kind, list(KINDS)) + HINT)
    if kind == "none":
        if argument:
            raise InputError(f"freeze: {text!r}: 'none' takes nothing after it", HINT)
        return FreezeSpec("none")
    if kind == "layers":
        return FreezeSpec(kind, ranges=_ranges(text, argument), text=text)
    seed = None
    if kind == "random":
        argument, at, seed_text = argument.partition("@")
        if at:
            if not re.fullmatch(r"\d+", seed_text):
                raise InputError(f"freeze: {text!r}: the seed {seed_text!r} is not a whole number", HINT)
            seed = int(seed_text)
    amount = _amount(text, argument)
    if kind == "every" and (isinstance(amount, float) or amount < 2):
        raise InputError(f"freeze: {text!r}: every:K takes a whole number K of 2 or more", HINT)
    return FreezeSpec(kind, amount, seed=seed, text=text)


def frozen_layers(spec: FreezeSpec, layers: int, seed: int = 0) -> frozenset[int]:
    """The layers, counted from 0, that a spec freezes in a model with `layers` decoder layers.

    `seed` is the arm's, used by `random` specs that name none. Raises InputError for a layer that the
    model does not have and for a spec that leaves nothing to train.
    """
    frozen = _frozen(spec, layers, seed)
    if len(frozen) == layers:
        raise InputError(
            f"freeze: {spec.text!r} freezes all {layers} layers: nothing is left to train",
            f"freeze at most {layers - 1} of the model's {layers} layers",
        )
    return frozen


def _frozen(spec: FreezeSpec, layers: int, seed: int) -> frozenset[int]:
    if spec.kind == "none":
        return frozenset()
    if spec.kind == "layers":
        wanted = {i for low, high in spec.ranges for i in range(low, high + 1)}
        _in_range(spec, max(wanted), layers)
        return frozenset(wanted)
    assert spec.amount is not None
    if spec.kind == "every":
        return frozenset(range(0, layers, int(spec.amount)))
    count = spec.amount if isinstance(spec.amount, int) else math.floor(spec.amount * layers + 0.5)
    if count > layers:
        raise InputError(
            f"freeze: {spec.text!r} asks for {count} layers, but the model has {layers}",
            f"give a number up to {layers - 1}",
        )
    if spec.kind == "first":
        return frozenset(range(count))
    if spec.kind == "last":
        return frozenset(range(layers - count, layers))
    if spec.kind == "middle":
        return frozenset(range(count, layers - count))
    seed = spec.seed if spec.seed is not None else seed
    # Ranked by digest rather than drawn by a generator: the same on every machine and Python version.
    ranked = sorted(range(layers), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())
    return frozenset(ranked[:count])


def _amount(text: str, argument: str) -> int | float:
    if re.fullmatch(r"\d+", argument):
        return int(argument)
    if re.fullmatch(r"\d*\.\d+", argument) and 0 <= float(argument) <= 1:
        return float(argument)
    raise InputError(f"freeze: {text!r}: {argument!r} is neither a number of layers nor a share from 0.0 to 1.0", HINT)


def _ranges(text: str, argument: str) -> tuple[tuple[int, int], ...]:
    ranges = []
    for part in argument.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            raise InputError(f"freeze: {text!r}: {part!r} is not a layer or a range of layers", HINT)
        low, high = int(match[1]), int(match[2] or match[1])
        if high < low:
            raise InputError(f"freeze: {text!r}: the range {part.strip()!r} runs backwards", HINT)
        ranges.append((low, high))
    return tuple(ranges)


def _in_range(spec: FreezeSpec, highest: int, layers: int) -> None:
    if highest >= layers:
        raise InputError(
            f"freeze: {spec.text!r} names layer {highest}, but the model's layers are 0 to {layers - 1}",
            "count layers from 0",
        )
