"""Runs in use: which processes hold them, so that no run is removed between two of its steps.

A process that works on a run holds the lock of a file of its own in the run's folder; several may work on one run. The
system releases the lock when the process ends.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from qcft.errors import InputError
from qcft.files import reporting_unwritable

if TYPE_CHECKING:
    from filelock import FileLock

HELD = re.compile(r"\.working-(?P<pid>[0-9]+)-[0-9a-f]+@(?P<host>.+)")
PATIENCE = 10.0  # seconds; another process may test the new lock for a moment


def runs_lock(runs: Path) -> FileLock:
    """Held while a run is named or held, or steps that no run names are removed."""
    from filelock import FileLock

    return FileLock(runs / ".lock")


@contextmanager
def working(runs: Path, *names: str) -> Iterator[None]:
    """Hold runs while they are worked on. Raises InputError for one that was removed meanwhile."""
    with ExitStack() as held:
        with reporting_unwritable(runs), runs_lock(runs):
            for name in names:
                if not (runs / name / "run.json").is_file():
                    raise InputError(f"the run {name!r} was removed meanwhile", "its steps are kept: run it again")
                held.callback(hold(runs / name))
        yield


def hold(folder: Path) -> Callable[[], None]:
    """Hold the run in a folder, under `runs_lock`; returns the function that releases it."""
    from filelock import FileLock

    holders(folder, clean=True)
    place = folder / f".working-{os.getpid()}-{secrets.token_hex(4)}@{socket.gethostname()}"
    lock = FileLock(place)
    lock.acquire(timeout=PATIENCE)

    def release() -> None:
        with suppress(OSError):
            place.unlink(missing_ok=True)
        lock.release()

    return release


def holders(folder: Path, clean: bool = False) -> list[str]:
    """The processes that work on the run in a folder: `process 12 on HOST`. `clean`, under `runs_lock` only: remove the
    files of processes that have ended."""
    from filelock import FileLock, Timeout

    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = HELD.fullmatch(path.name)
        if match is None:
            continue
        try:
            with FileLock(path, timeout=0):
                if clean:
                    path.unlink(missing_ok=True)
        except (Timeout, PermissionError):  # another user's lock cannot be tested
            found.append(f"process {match['pid']} on {match['host']}")
        except OSError:  # a read-only disk, where nobody works
            continue
    return found
