"""Parses freeze specs. Every spec names what is FROZEN, that is, gets no adapter.

none, first:N, last:N, middle:N, every:K, layers:0-11,20, random:N[@SEED], most-changed:N, least-changed:N
and snr:N. N is a count, or a share when it has a decimal point (0.5); shares round half up. `middle:N`
freezes all but N layers at each end; `snr:N` freezes modules, N of each type, and not whole layers.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qcft.errors import InputError, nearest

KINDS = ("none", "first", "last", "middle", "every", "layers", "random", "most-changed", "least-changed", "snr")
HINT = (
    "use none, first:N, last:N, middle:N, every:K, layers:0-11,20, random:0.5@SEED, "
    "most-changed:0.5, least-changed:0.5 or snr:0.5"
)


@dataclass(frozen=True)
class FreezeSpec:
    """A parsed spec; `amount` is an int (layers) or a float (share of the layers); `text` is shown and hashed."""

    kind: str
    amount: int | float | None = None
    ranges: tuple[tuple[int, int], ...] = ()
    seed: int | None = None
    text: str = "none"

    def __str__(self) -> str:
        return self.text

    @property
    def measure(self) -> Literal["change", "snr"] | None:
        """What must be measured on the weights before the spec can be resolved to layers."""
        if self.kind == "snr":
            return "snr"
        return "change" if self.kind in {"most-changed", "least-changed"} else None

    def count(self, of: int, what: str = "layers") -> int:
        """The spec's N as a number of `of` layers (or modules of a type). Raises InputError if it is more than `of`."""
        assert self.amount is not None
        count = self.amount if isinstance(self.amount, int) else math.floor(self.amount * of + 0.5)
        if count > of:
            raise InputError(
                f"freeze: {self.text!r} asks for {count} {what}, but the model has {of}",
                f"give a number up to {of - 1}",
            )
        return count


def parse_freeze(text: str) -> FreezeSpec:
    """Parse a spec. Raises InputError if it is not valid."""
    kind, _, argument = text.strip().partition(":")
    if kind not in KINDS:
        raise InputError(f"freeze: {text!r} is not a freeze spec", nearest(kind, list(KINDS)) + HINT)
    if kind == "none":
        if argument:
            raise InputError(f"freeze: {text!r}: 'none' takes no argument", HINT)
        return FreezeSpec(kind, text=text)
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


def frozen_layers(
    spec: FreezeSpec, layers: int, seed: int = 0, change: Sequence[float] | None = None
) -> frozenset[int]:
    """The layers, counted from 0, that a spec freezes whole in a model with `layers` decoder layers.

    `seed` is the arm's, used by `random` specs without a seed. `change` is how much phase 1 changed each layer; without
    it most-changed and least-changed return the right number of layers, but not yet the right ones.
    Raises InputError for a layer that the model does not have and for a spec that freezes everything.
    """
    frozen = _frozen(spec, layers, seed, change or [0.0] * layers)
    if len(frozen) == layers:
        raise InputError(
            f"freeze: {spec.text!r} freezes all {layers} layers: nothing is left to train",
            f"freeze at most {layers - 1} of the model's {layers} layers",
        )
    return frozen


def frozen_modules(spec: FreezeSpec, snr: Mapping[str, float], type_of: Mapping[str, str]) -> frozenset[str]:
    """The modules an `snr` spec freezes: of each type, those with the lowest signal-to-noise ratio.

    `snr` and `type_of` give each module's ratio and type by its full name; ties go to the lower layer, that is, to
    the module named first. Raises InputError for a spec that freezes everything.
    """
    by_type: dict[str, list[str]] = {}
    for name, kind in type_of.items():
        by_type.setdefault(kind, []).append(name)
    frozen: set[str] = set()
    for kind, names in by_type.items():
        ranked = sorted(names, key=lambda name: snr[name])
        frozen.update(ranked[: spec.count(len(names), f"{kind} modules")])
    if len(frozen) == len(type_of):
        raise InputError(
            f"freeze: {spec.text!r} freezes all {len(frozen)} modules: nothing is left to train", "freeze fewer of them"
        )
    return frozenset(frozen)


def _frozen(spec: FreezeSpec, layers: int, seed: int, change: Sequence[float]) -> frozenset[int]:
    if spec.kind in {"none", "snr"}:
        return frozenset()
    if spec.kind == "layers":
        wanted = {i for low, high in spec.ranges for i in range(low, high + 1)}
        if max(wanted) >= layers:
            raise InputError(
                f"freeze: {spec.text!r} names layer {max(wanted)}, but the model's layers are 0 to {layers - 1}",
                "count layers from 0",
            )
        return frozenset(wanted)
    if spec.kind == "every":
        assert spec.amount is not None
        return frozenset(range(0, layers, int(spec.amount)))
    count = spec.count(layers)
    if spec.kind == "first":
        return frozenset(range(count))
    if spec.kind == "last":
        return frozenset(range(layers - count, layers))
    if spec.kind == "middle":
        return frozenset(range(count, layers - count))
    if spec.kind == "most-changed":
        return frozenset(sorted(range(layers), key=lambda i: (-change[i], i))[:count])
    if spec.kind == "least-changed":
        return frozenset(sorted(range(layers), key=lambda i: (change[i], i))[:count])
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
