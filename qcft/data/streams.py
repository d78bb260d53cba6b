"""A data file's bytes and lines, within limits: a small file may unpack to any size, or have endless blank lines."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, AnyStr

from qcft.errors import InputError

UNPACKED, TIMES = 256_000_000, 100  # bytes that any file may unpack to; a larger file: this many times its size
LONGEST = 256_000_000  # characters of a line
BLANKS = 10_000_000  # characters of consecutive blank lines


def most_unpacked(path: Path) -> int:
    """How many bytes a file may unpack to. Compression makes text 3 to 20 times smaller."""
    return max(UNPACKED, TIMES * path.stat().st_size)


def unpacks_too_far(path: Path, most: int, hint: str) -> InputError:
    """The error for a file that unpacks to more than its limit."""
    return InputError(
        f"data: {str(path)!r} of {path.stat().st_size / 1e6:,.1f} MB unpacks to over {most / 1e6:,.0f} MB, the limit "
        f"for its size",
        hint,
    )


@contextmanager
def open_file(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked where they are gzipped (by content, not by name). Raises InputError."""
    try:
        with path.open("rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
        if not packed:
            with path.open("rb") as stream:
                yield stream
        else:
            with gzip.open(path) as inner, io.BufferedReader(_Unpacked(inner, path), 1 << 18) as unpacked:
                yield unpacked
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"data: {str(path)!r} cannot be read: {reason}", "check that the file is complete") from None


class _Unpacked(io.RawIOBase):
    """The unpacked content of a gzip file, up to the limit."""

    def __init__(self, inner: gzip.GzipFile, path: Path) -> None:
        self.inner = inner
        self.path = path
        self.most = most_unpacked(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.inner.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        data = self.inner.read1(len(buffer))
        if self.inner.tell() > self.most:
            raise unpacks_too_far(self.path, self.most, "if that is the right size, unpack it yourself with gzip -d")
        buffer[: len(data)] = data
        return len(data)


def lines_of(stream: IO[AnyStr], path: Path) -> Iterator[AnyStr]:
    """The lines of a stream. Raises InputError for a line, or for consecutive blank lines, over the limits."""
    blanks = 0
    for number, line in enumerate(iter(lambda: stream.readline(LONGEST + 1), stream.read(0)), start=1):
        if len(line) > LONGEST:
            raise InputError(
                f"data: {str(path)!r}, line {number}: it has over {LONGEST // 10**6} million characters",
                "write one record per line",
            )
        blanks = 0 if line.strip() else blanks + len(line)
        if blanks > BLANKS:
            raise InputError(
                f"data: {str(path)!r}, before line {number}: over {BLANKS // 10**6} million characters of blank lines",
                "check that the file is complete, or remove them",
            )
        yield line
