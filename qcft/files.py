"""Files that are whole or not there: digests, seals, writes that end in a rename."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

SEAL = "files.sha256"


def seal(folder: Path) -> None:
    """Write `files.sha256`, the list of a folder's files with their digests, last of all."""
    lines = [f"{file_digest(p)}  {p.relative_to(folder).as_posix()}" for p in sorted(folder.rglob("*")) if p.is_file()]
    partial = folder / (SEAL + ".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.rename(folder / SEAL)


def is_whole(folder: Path) -> bool:
    """Whether a folder was sealed and every file in it still has its digest."""
    try:
        listed = (folder / SEAL).read_text(encoding="utf-8").splitlines()
        for line in listed:
            digest, _, name = line.partition("  ")
            if file_digest(folder / name) != digest:
                return False
    except OSError:
        return False
    return bool(listed)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, document: Any) -> None:
    """Write JSON by way of a file beside it and a rename, so that it is never half there."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text by way of a file beside it and a rename."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes by way of a file beside it and a rename."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def read_json(path: Path) -> Any:
    """The JSON in a file, or None where there is no file or no JSON in it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def is_whole_safetensors(path: Path) -> bool:
    """Whether a safetensors file is exactly as long as its header says."""
    try:
        with path.open("rb") as stream:
            size = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(min(size, 1 << 28)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return bool(8 + size + max(ends, default=0) == path.stat().st_size)
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError):
        return False
