"""The one place where scales by range of decoder layers are read: `layers=0-9:0.5,20-29:0`."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from qcft.errors import InputError

LARGEST_SCALE = 1000  # the largest factor for a delta in 16 bits
START = "layers="
HINT = "give --by layers=0-9:1,10-19:0.5,20-29:0 (layers from 0, then the scale of their delta), or --by auto"
PART = re.compile(r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?\s*:(.*)")
LONGEST = 60  # characters of a name


@dataclass(frozen=True)
class ByLayer:
    """Scales of a delta by range of decoder layers (both ends included), the lowest first.

    Everything else keeps the scale 1: layers that no range names, and modules outside the decoder layers. Two that
    scale in the same way are equal: ranges of scale 1 are dropped, and adjacent ranges of one scale are joined.
    """

    ranges: tuple[tuple[int, int, float], ...]

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int, float]]) -> ByLayer:
        """From ranges that do not overlap, in any order."""
        joined: list[tuple[int, int, float]] = []
        for low, high, scale in sorted(one for one in ranges if one[2] != 1):
            if joined and joined[-1][1] + 1 == low and joined[-1][2] == scale:
                low = joined.pop()[0]
            joined.append((low, high, scale))
        return cls(tuple(joined))

    def __str__(self) -> str:
        """The form that `--by` reads, which also enters ids."""
        return START + ",".join(f"{_range(low, high)}:{_number(scale)}" for low, high, scale in self.ranges)

    @property
    def label(self) -> str:
        """A readable form: `layers 0-9 at 0.5, 20-29 at 0`."""
        one = len(self.ranges) == 1 and self.ranges[0][0] == self.ranges[0][1]
        named = ", ".join(f"{_range(low, high)} at {_number(scale)}" for low, high, scale in self.ranges)
        return f"{'layer' if one else 'layers'} {named}"

    @property
    def path(self) -> str:
        """The form used in file names; a digest if it is long."""
        name = str(self).replace("=", "-").replace(":", "x").replace(",", "_")
        return name if len(name) <= LONGEST else f"layers-{hashlib.sha256(name.encode()).hexdigest()[:10]}"

    def scale(self, layer: int | None) -> float:
        """The scale of a decoder layer; None: of modules outside the layers."""
        inside = (scale for low, high, scale in self.ranges if layer is not None and low <= layer <= high)
        return next(inside, 1.0)

    def check(self, layers: int) -> None:
        """Check that a model with this many decoder layers has the named layers. Raises InputError."""
        highest = max(high for _, high, _ in self.ranges)
        if highest >= layers:
            raise InputError(
                f"--by {str(self)!r} names layer {highest}, but the model's layers are 0 to {layers - 1}",
                "count layers from 0",
            )


def parse_by_layer(text: str) -> ByLayer:
    """Read `layers=LOW-HIGH:SCALE,...`. Raises InputError."""
    given = f"--by {text[:80]!r}"
    if not text.strip().startswith(START):
        raise InputError(f"{given} does not begin with {START!r}", HINT)
    ranges: list[tuple[int, int, float]] = []
    for part in text.strip().removeprefix(START).split(","):
        match = PART.fullmatch(part)
        if not match:
            raise InputError(f"{given}: {part[:40]!r} is not a range of layers and a scale", HINT)
        low, high = int(match[1]), int(match[2] or match[1])
        if high < low:
            raise InputError(f"{given}: the range {_range(low, high)} is empty", f"write {_range(high, low)}")
        for other_low, other_high, _ in ranges:
            if low <= other_high and other_low <= high:
                raise InputError(
                    f"{given}: the ranges {_range(other_low, other_high)} and {_range(low, high)} overlap",
                    "name each layer once",
                )
        ranges.append((low, high, _scale(given, match[3])))
    found = ByLayer.of(ranges)
    if not found.ranges:
        raise InputError(f"{given}: every scale is 1: the whole delta", "omit --by, or give another scale")
    return found


def patterns(layers: Iterable[int]) -> tuple[ByLayer, ...]:
    """What `--by auto` tries on the layers that have a delta, after work on merging by layers (arXiv 2410.01335,
    2505.18356): the lower, middle and upper third at scale 0.5 and 0, and the lowest and highest sixth at 0.
    Raises InputError for fewer than two layers."""
    has = sorted(set(layers))
    if len(has) < 2:
        there = "no decoder layer" if not has else f"layer {has[0]} alone"
        raise InputError(f"--by auto has nothing to scale: {there} has a delta", "use --scales")
    third, sixth = math.ceil(len(has) / 3), math.ceil(len(has) / 6)
    parts = [has[:third], has[third : len(has) - third], has[len(has) - third :]]
    tried = [(part, scale) for part in parts if part for scale in (0.5, 0.0)]
    tried += [(part, 0.0) for part in (has[:sixth], has[len(has) - sixth :])]
    return tuple(dict.fromkeys(ByLayer.of([(part[0], part[-1], scale)]) for part, scale in tried))


def _scale(given: str, text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not 0 <= scale <= LARGEST_SCALE:  # true for NaN too
        raise InputError(
            f"{given}: {text[:40]!r} is not a scale for a layer's delta", f"give numbers from 0 to {LARGEST_SCALE}"
        )
    return abs(scale)  # -0 is 0


def _range(low: int, high: int) -> str:
    return f"{low}-{high}" if high != low else str(low)


def _number(scale: float) -> str:
    short = f"{scale:g}"
    return short if float(short) == scale else repr(scale)
