"""Files that are whole or not there: digests, seals, writes that end in a rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcft.errors import InputError, QcftError

SEAL = "files.sha256"
FULL = {code: os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT)}
ODD = {"a named pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK, "a device": stat.S_ISCHR, "a disk": stat.S_ISBLK}
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
LEAST = 1 << 20  # bytes; a disk with less is full
RECENT = 10**8  # nanoseconds: a file written less than this ago may change without a new modification time


def seal(folder: Path) -> None:
    """Write `files.sha256`, the list of a folder's files with their digests, as the last file."""
    lines = [f"{file_digest(p)}  {p.relative_to(folder).as_posix()}" for p in sorted(folder.rglob("*")) if p.is_file()]
    partial = folder / (SEAL + ".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.rename(folder / SEAL)


def is_whole(folder: Path) -> bool:
    """Whether a folder was sealed and every file in it still has its digest."""
    return altered_file(folder) is None


def altered_file(folder: Path) -> str | None:
    """The first file of a sealed folder that is missing or changed, or None; the seal itself where it is missing."""
    try:
        listed = (folder / SEAL).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return SEAL
    for line in listed:
        digest, _, name = line.partition("  ")
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            return name
    return None if listed else SEAL


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


_known: dict[tuple[int, ...], str] = {}


def known_digest(path: Path) -> str:
    """`file_digest`; a file that did not change since this process read it is not read again."""
    before = _stamp(path)
    if before not in _known:
        digest = file_digest(path)
        _, written, changed, *_ = before
        if _stamp(path) != before or time.time_ns() - max(written, changed) < RECENT:
            return digest
        _known[before] = digest
    return _known[before]


def _stamp(path: Path) -> tuple[int, ...]:
    """A file's size, times and identity by the system, which differ once the file is written."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev


@dataclass(frozen=True)
class SeenFile:
    """A file as it was when its digest was taken."""

    path: Path
    digest: str


def write_json(path: Path, document: Any) -> None:
    """Write JSON to a temporary file beside it and rename that, so that the file is never incomplete."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def read_json_lines(path: Path) -> list[Any]:
    """The records of a file with one JSON document per line. Only a line feed ends a line: text in a record may have
    other characters that `str.splitlines` takes for line ends, such as U+2028."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_text(path: Path, text: str) -> None:
    """Write text to a temporary file beside it and rename that."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes to a temporary file beside it and rename that."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # what a full disk left of it


def write_sealed(path: Path, document: Mapping[str, object]) -> None:
    """Write a JSON object with a digest of itself under `seal`."""
    write_json(path, {**document, "seal": _own_digest(document)})


def read_sealed(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, without its seal; None where there is none, or it was changed.

    An object that never had a seal is accepted.
    """
    document = read_json(path)
    if not isinstance(document, dict):
        return None
    seal = document.pop("seal", None)
    return document if seal is None or seal == _own_digest(document) else None


def _own_digest(document: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """The JSON in a file, or None where there is no file or no JSON in it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


@contextmanager
def reporting_full_disk(place: Path, hint: str) -> Iterator[None]:
    """Turn what writers raise when the disk that holds `place` is full into a QcftError with this hint."""
    try:
        yield
    except QcftError:
        raise
    except Exception as error:
        if not is_disk_full(error, place):
            raise
        raise QcftError(f"the disk that holds {str(place)!r} is full", hint) from error


@contextmanager
def reporting_unwritable(
    folder: Path, what: str = "the runs folder", hint: str = "name another with --runs"
) -> Iterator[None]:
    """Turn what the system raises where a folder cannot be written into an InputError with this hint."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error, folder):
            raise
        raise InputError(f"{what} {str(folder)!r} cannot be written: {error.strerror or error}", hint) from None


def is_disk_full(error: BaseException, place: Path) -> bool:
    """Whether a full disk or quota caused an error. Some writers give no reason; then the free space decides."""
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "errno", None) in FULL or any(reason in str(cause) for reason in FULL.values()):
            return True
        cause = cause.__cause__ or cause.__context__
    if not isinstance(error, (OSError, RuntimeError)) or getattr(error, "errno", None) is not None:
        return False
    return disk_free(place) < LEAST


def disk_free(place: Path) -> int:
    """Free bytes on the disk where a path is, or would be created."""
    place = place.absolute()
    while not exists(place) and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def exists(path: Path) -> bool:
    """Whether a path exists; one that is too long for the disk does not."""
    try:
        return path.exists()
    except OSError:
        return False


def oddity(path: Path) -> str | None:
    """What a path is, in words, where it is neither a file nor a folder nor missing: reading it may never end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # a name too long for the disk, or with NUL in it
        if getattr(error, "errno", None) == errno.ELOOP:
            return "a link that leads in a circle"
        return "a link that leads nowhere" if os.path.islink(path) else None
    return next((words for words, is_so in ODD.items() if is_so(mode)), None)


def is_whole_safetensors(path: Path) -> bool:
    """Whether a safetensors file has a valid header, and exactly the length that the header gives."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            return True
    except (SafetensorError, OSError, ValueError):
        return False
