"""The user's cache folder: files that can always be rebuilt, each entry complete or absent."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from qcft.errors import InputError
from qcft.events import Watch
from qcft.files import altered_file, reporting_full_disk, seal


def cache_folder() -> Path:
    """`$QCFT_CACHE`, else qcft's folder in the user's cache folder."""
    named = os.environ.get("QCFT_CACHE")
    if named:
        return Path(os.path.expanduser(named))
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", str(Path.home()))) / "qcft" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "qcft"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qcft"


def ensure_home() -> None:
    """Set HOME where the system has no home folder (no HOME, and a user without an entry), to a private folder among
    the temporary files: libraries would write to a folder `~` here, or fail. Raises InputError where others can access
    that folder."""
    if sys.platform == "win32" or os.path.expanduser("~") != "~":
        return
    user = os.getuid()
    place = Path(tempfile.gettempdir()) / f"qcft-home-{user}"
    with suppress(OSError):
        place.mkdir(mode=0o700)
    if not _is_own(place, user):
        raise InputError(
            f"there is no home folder, as HOME is not set, and other users can access {str(place)!r}",
            "set HOME to a writable folder; caches are stored there",
        )
    os.environ["HOME"] = str(place)
    os.environ.setdefault("USER", str(user))  # PyTorch names a folder by it


def _is_own(place: Path, user: int) -> bool:
    """Whether a folder exists that only its user can read or write."""
    try:
        found = place.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & 0o077


def cached_folder(name: str, make: Callable[[Path], None], watch: Watch | None = None) -> Path:
    """The cached folder `name`, built by `make(empty_folder)` when it is missing or incomplete.

    It is built beside its place, listed with digests, and renamed when it is complete; one process
    builds it, others wait.
    """
    from filelock import FileLock

    place = cache_folder() / name
    lock = FileLock(str(place) + ".lock")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise InputError(
            f"the cache folder {str(cache_folder())!r} cannot be written: {error.strerror}",
            "name another with the environment variable QCFT_CACHE",
        ) from None
    try:
        altered = altered_file(place)
        if altered is not None:
            if watch is not None and place.exists():
                watch.note(f"{altered} in the cache ({place}) is missing or altered; it is rebuilt", "warning")
            work = place.with_name(place.name + ".partial")
            shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(place, ignore_errors=True)
            work.mkdir(parents=True)
            try:
                with reporting_full_disk(work, "free some space, or name another cache folder with QCFT_CACHE"):
                    make(work)
                    seal(work)
                work.rename(place)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    finally:
        lock.release()
    return place
