"""The folder that a model or an adapter is delivered to: whole, or not there.

It is filled beside its place and renamed. Where nothing can be renamed onto it, as it is a mount point, it is filled
inside itself, then each file is moved to its place: the config, without which nothing is loaded, and the digests last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from qcft.errors import InputError
from qcft.files import SEAL, exists, reporting_full_disk, reporting_unwritable, seal

ELSEWHERE = "name another folder with --to"
INSIDE = ".qcft-partial"
LAST = ("config.json", "adapter_config.json", SEAL)
FOUND = "lost+found"  # in an empty disk


def check_place(to: Path) -> None:
    """Check that a folder can be written, by writing to it: there is none, or an empty one. Raises InputError."""
    place = _real(to)
    if exists(place) and (not place.is_dir() or {p.name for p in place.iterdir()} - {FOUND}):
        if exists(place / INSIDE):
            raise InputError(f"{str(to)!r} holds an interrupted delivery", f"remove what is in it, or {ELSEWHERE}")
        raise InputError(f"{str(to)!r} already exists", "name a new folder with --to, or remove it")
    parent = place.parent
    while not exists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"{str(to)!r} cannot be created: {str(parent)!r} is a file", ELSEWHERE)
    with _reporting(to):
        if exists(place) and not _is_replaceable(place):
            _try(place / INSIDE)
        else:
            _try(_beside(place) if parent == place.parent else parent / INSIDE)


@contextmanager
def whole_folder(to: Path) -> Iterator[Path]:
    """A folder to fill, which is renamed to its place when it is complete; a killed process leaves none there that
    looks complete. Raises InputError."""
    from filelock import FileLock

    place = _real(to)
    with ExitStack() as held:
        with _reporting(to):
            check_place(to)
            place.parent.mkdir(parents=True, exist_ok=True)
            work = place / INSIDE
            if not exists(place) or _is_replaceable(place):
                lock, work = place.with_name(f".{place.name}.lock"), _beside(place)
                held.callback(lock.unlink, missing_ok=True)
                held.enter_context(FileLock(lock))
                check_place(to)  # again: another process may have delivered meanwhile
                shutil.rmtree(work, ignore_errors=True)  # what a killed process left
            work.mkdir()
            held.callback(shutil.rmtree, work, ignore_errors=True)
        with reporting_full_disk(work, f"free some space, or {ELSEWHERE}"):
            yield work
            if work.parent == place:
                seal(work)
        with _reporting(to):
            if work.parent == place:
                _move_into(work, place)
            else:
                if place.exists():
                    place.rmdir()
                work.rename(place)


def _reporting(to: Path) -> AbstractContextManager[None]:
    return reporting_unwritable(to, "the folder", ELSEWHERE)


def _move_into(work: Path, place: Path) -> None:
    """Move the files of a folder into `place`, which holds it: all of them or none; last those that mark a complete
    folder."""
    names = sorted((p.name for p in work.iterdir()), key=lambda name: (name in LAST, name == SEAL, name))
    try:
        for name in names:
            (work / name).rename(place / name)
    except BaseException:
        for name in names:
            with suppress(OSError):
                (place / name).unlink(missing_ok=True)
        raise


def _is_replaceable(place: Path) -> bool:
    """Whether an empty folder can be replaced by renaming another one: tried, which leaves an empty folder there."""
    work = _beside(place)
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        shutil.copymode(place, work)
        place.rmdir()
        work.rename(place)
        return True
    except OSError:
        if not exists(place):
            place.mkdir()
        return False
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _try(work: Path) -> None:
    """Make a folder, a file in it, and rename that."""
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir()
        (work / "a").write_bytes(b"a")
        (work / "a").rename(work / "b")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _beside(place: Path) -> Path:
    return place.with_name(f".{place.name}.partial")


def _real(to: Path) -> Path:
    """Where a folder really is: what a link leads to. Raises InputError for a link that leads nowhere."""
    if to.is_symlink() and not exists(to):
        raise InputError(f"{str(to)!r} is a link that leads nowhere", ELSEWHERE)
    return Path(os.path.realpath(to))
