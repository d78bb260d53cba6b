"""Step folders under runs/.steps. No folder: to do. No done.json: partial. Else done, once verified.

step.json     inputs, versions, hardware: written first
done.json     metrics, seconds, file digests: written last, by rename
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qcft.errors import InputError
from qcft.events import Watch
from qcft.files import file_digest, read_json, write_json

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
UNSEALED = {"step.json", "done.json", "log.jsonl"}  # not part of a step's result


class Store:
    """The steps under one runs folder."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.steps = runs / ".steps"
        self._verified: set[str] = set()

    def folder(self, step: str) -> Path:
        """Where a step's files lie."""
        return self.steps / step

    def state(self, step: str) -> str:
        """`done`, `partial` or `to do`, without looking into the files."""
        if (self.folder(step) / "done.json").is_file():
            return "done"
        return "partial" if (self.folder(step) / "step.json").is_file() else "to do"

    def is_claimed(self, step: str) -> bool:
        """Whether a process works on the step now."""
        from filelock import FileLock, Timeout

        if not (self.steps / f".{step}.holder").exists():
            return False
        try:
            with FileLock(str(self.steps / f".{step}.lock"), timeout=0):
                return False
        except (Timeout, OSError):
            return True

    def record(self, step: str) -> dict[str, Any] | None:
        """The step's done.json, or None; the files it lists are not looked at."""
        record = read_json(self.folder(step) / "done.json")
        return record if isinstance(record, dict) and isinstance(record.get("files"), dict) else None

    def done(self, step: str, watch: Watch | None = None) -> dict[str, Any] | None:
        """The step's done.json if the step is done and its files are whole, else None.

        A file that is missing or was altered is named in a warning, and the step is made anew.
        """
        folder = self.folder(step)
        record = self.record(step)
        if record is None:
            return None
        if step not in self._verified:
            for name, digest in record["files"].items():
                path = folder / name
                if not path.is_file() or file_digest(path) != digest:
                    if watch is not None:
                        watch.note(f"{step}: {name} is missing or altered; the step is made anew", "warning")
                    return None
            self._verified.add(step)
        return record

    @contextmanager
    def claim(self, step: str, inputs: dict[str, Any], watch: Watch) -> Iterator[Path]:
        """The step's folder, held by this process alone; what a killed process left there stays.

        Waits when another process works on the step. Raises InputError when the folder can't be written.
        """
        folder = self.folder(step)
        try:
            self.steps.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the runs folder {str(self.runs)!r} cannot be written: {error.strerror}", "name another with --runs"
            ) from None
        with self._lock(step, watch):
            if (folder / "done.json").exists() and self.done(step) is None:
                shutil.rmtree(folder)  # not whole, as `done` told
            folder.mkdir(exist_ok=True)
            if read_json(folder / "step.json") is None:
                write_json(folder / "step.json", {"step": step, "inputs": inputs, **_circumstances()})
            yield folder

    def finish(self, step: str, metrics: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Mark a step done: digests of its files, its metrics and the seconds this process worked on it."""
        folder = self.folder(step)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        files = {
            path.relative_to(folder).as_posix(): file_digest(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in UNSEALED and path.name[0] != "." and "tensorboard" not in path.parts
        }
        record = {"step": step, "metrics": metrics, "seconds": round(seconds, 2), "files": files}
        write_json(folder / "done.json", record)
        self._verified.add(step)
        return record

    @contextmanager
    def _lock(self, step: str, watch: Watch) -> Iterator[None]:
        from filelock import FileLock, Timeout

        lock, holder = FileLock(str(self.steps / f".{step}.lock")), self.steps / f".{step}.holder"
        told = False
        while True:
            try:
                lock.acquire(timeout=0.5)
                break
            except Timeout:
                if not told:
                    who = read_json(holder) or {}
                    watch.note(
                        f"waiting for {step}: process {who.get('pid', '?')} on {who.get('host', '?')} works on it"
                    )
                    told = True
                watch.check_stop()
        try:
            write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()})
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()


def writable(runs: Path) -> None:
    """Check that a runs folder can be written, writing nothing. Raises InputError."""
    place = runs
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise InputError(
            f"the runs folder {str(runs)!r} cannot be made: {str(place)!r} is a file", "name another with --runs"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"the runs folder {str(runs)!r} cannot be written", "name another with --runs")


def package_versions() -> dict[str, str]:
    """Versions of the packages that results rest on."""
    found = {}
    for package in ("qcft", *PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _circumstances() -> dict[str, Any]:
    return {
        "begun": _now(),
        "versions": {"python": platform.python_version(), **package_versions()},
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "device": _device_name()},
    }


def _device_name() -> str:
    import sys

    torch = sys.modules.get("torch")  # named only where it is loaded already
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0))
    return "cpu"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
