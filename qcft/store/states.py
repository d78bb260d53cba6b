"""Hidden states of tokenised rows, in one growing file that is mapped into memory: each row complete or absent.

states.bin    the rows one after the other, each (tokens, width)
index.jsonl   a line per row, written after its states: key, first token, tokens, checksum
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.files import write_text

if TYPE_CHECKING:
    import numpy as np

STATES, INDEX = "states.bin", "index.jsonl"


class RowStates:
    """The rows of one folder. `width` values of `itemsize` bytes (2 or 4) a token, held as plain integers.

    One process may add rows, under a lock that the caller holds, while others read those they found.
    """

    def __init__(self, folder: Path, width: int, itemsize: int) -> None:
        self.folder = folder
        self.width = width
        self.itemsize = itemsize
        self._index: dict[str, tuple[int, int, int]] = {}  # key -> first token, tokens, checksum
        self._map: Any = None
        self._read_index()

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes."""
        return self.width * self.itemsize

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` whose rows are missing or damaged. Reads every row once."""
        return [key for key in dict.fromkeys(keys) if key not in self._index or not self._is_whole(key)]

    def has(self, key: str) -> bool:
        """Whether a row is listed; its bytes are not checked."""
        return key in self._index

    def add(self, rows: Sequence[tuple[str, np.ndarray]]) -> None:
        """Append rows of shape (tokens, width); they are listed once their states are on disk."""
        path = self.folder / STATES
        end = max((first + tokens for first, tokens, _ in self._index.values()), default=0)
        lines = []
        with path.open("r+b" if path.exists() else "w+b") as stream:
            stream.truncate(end * self.token_bytes)  # what a killed process wrote but did not list
            stream.seek(end * self.token_bytes)
            for key, states in rows:
                data = states.tobytes()
                entry = (end, len(states), zlib.crc32(data))
                stream.write(data)
                lines.append(json.dumps([key, *entry]) + "\n")
                self._index[key] = entry
                end += len(states)
            stream.flush()
            os.fsync(stream.fileno())
        with (self.folder / INDEX).open("a", encoding="utf-8") as stream:
            stream.write("".join(lines))
        self._map = None

    def read(self, key: str) -> np.ndarray:
        """A row's states, of shape (tokens, width), mapped and not copied. Raises KeyError."""
        import numpy as np

        first, tokens, _ = self._index[key]
        if self._map is None:
            self._map = np.memmap(self.folder / STATES, dtype=f"int{8 * self.itemsize}", mode="c")
        flat: np.ndarray = self._map[first * self.width : (first + tokens) * self.width]
        return flat.reshape(tokens, self.width)

    def _read_index(self) -> None:
        path = self.folder / INDEX
        if not path.is_file():
            return
        text = path.read_text(encoding="utf-8", errors="replace")
        size = (self.folder / STATES).stat().st_size if (self.folder / STATES).is_file() else 0
        good = []
        for line in text.splitlines(keepends=True):
            entry = _entry(line)
            if entry and (entry[1] + entry[2]) * self.token_bytes <= size:
                self._index[entry[0]] = entry[1:]
                good.append(line)
        if "".join(good) != text:  # a line cut short by a kill would swallow the next
            write_text(path, "".join(good))

    def _is_whole(self, key: str) -> bool:
        return zlib.crc32(self.read(key).tobytes()) == self._index[key][2]


def _entry(line: str) -> tuple[str, int, int, int] | None:
    try:
        key, first, tokens, checksum = json.loads(line)
        return (str(key), int(first), int(tokens), int(checksum)) if line.endswith("\n") else None
    except (ValueError, TypeError):
        return None
