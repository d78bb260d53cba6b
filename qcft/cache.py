"""The user's cache folder: things that can always be made again, each whole or absent."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from qcft.errors import InputError
from qcft.events import Watch
from qcft.files import altered_file, seal, telling_full_disk


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


def cached_folder(name: str, make: Callable[[Path], None], watch: Watch | None = None) -> Path:
    """The cached folder `name`, made by `make(empty_folder)` when it is not there or not whole.

    It is made beside its place, listed with sizes and digests, and renamed when whole; one process
    makes it, others wait.
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
                watch.note(f"{altered} in the cache ({place}) is missing or altered; it is made anew", "warning")
            work = place.with_name(place.name + ".partial")
            shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(place, ignore_errors=True)
            work.mkdir(parents=True)
            try:
                with telling_full_disk(work, "free some space, or name another cache folder with QCFT_CACHE"):
                    make(work)
                    seal(work)
                work.rename(place)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    finally:
        lock.release()
    return place
