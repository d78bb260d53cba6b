"""Checking a GGUF file's header before a library reads it: no length in it may exceed the file.

The reader of the gguf package trusts every length: some fifty bytes with an array of 2**62 elements keep it busy for
ever while memory fills. Layout: docs/gguf.md of the ggml project.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of each scalar type
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
DEEPEST = 4  # arrays in arrays; no known file has any


def check_lengths(path: Path) -> None:
    """Raise ValueError if a count, a length or a type in the header is impossible."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        walk = _Walk(data)
        tensors, values = walk.begin()
        for _ in range(values):
            walk.skip_string()
            walk.skip_value(walk.integer("I"))
        for _ in range(tensors):
            walk.skip_string()
            dimensions = walk.integer("I")
            if dimensions > MOST_DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            walk.skip(8 * dimensions + 12)  # their sizes, the type, the offset


class _Walk:
    """A position in the header, which only moves forward and never past the end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at, self.order = data, 4, "<"

    def begin(self) -> tuple[int, int]:
        """The number of tensors and of values; also sets the byte order, by the version field."""
        version = self.integer("I")
        if version & 0xFFFF == 0:
            self.order = ">"
        return self.integer("Q"), self.integer("Q")

    def integer(self, kind: str) -> int:
        at = self.at
        self.skip(struct.calcsize("=" + kind))
        return int(struct.unpack_from(self.order + kind, self.data, at)[0])

    def skip(self, size: int) -> None:
        if size > len(self.data) - self.at:
            raise ValueError(f"{size} bytes announced where {len(self.data) - self.at} are left")
        self.at += size

    def skip_string(self) -> None:
        self.skip(self.integer("Q"))

    def skip_value(self, kind: int, depth: int = 0) -> None:
        if kind == STRING:
            self.skip_string()
        elif kind == ARRAY:
            self.skip_array(depth + 1)
        elif kind in SIZES:
            self.skip(SIZES[kind])
        else:
            raise ValueError(f"a value of the unknown type {kind}")

    def skip_array(self, depth: int) -> None:
        kind, count = self.integer("I"), self.integer("Q")
        if kind in SIZES:
            self.skip(SIZES[kind] * count)
        elif depth > DEEPEST:
            raise ValueError(f"arrays in arrays, more than {DEEPEST} deep")
        else:
            for _ in range(count):  # each has eight bytes or more, so the loop stops at the end of the file
                self.skip_value(kind, depth)
