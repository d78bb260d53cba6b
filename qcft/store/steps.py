"""Step folders under runs/.steps. No folder: to do. No done.json: partial. Else done, once verified.

step.json     inputs, versions, hardware: written first
done.json     metrics, seconds, file digests, and a digest of itself: written last, by rename
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qcft.errors import InputError
from qcft.events import Watch
from qcft.files import (
    file_digest,
    read_json,
    read_sealed,
    telling_full_disk,
    telling_unwritable,
    write_json,
    write_sealed,
)

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
FREE = "free some space (`qcft gc` lists what no run uses), then give the same command: it goes on where it stopped"
LAYOUT = 2  # of step folders; raised when an older qcft could misread them
UNSEALED = {"step.json", "done.json", "log.jsonl"}  # not part of a step's result
SLOW = 10**9  # bytes whose digests take seconds
SCRATCH = {"checkpoints", "tensorboard"}  # folders that are not part of it either


class Store:
    """The steps under one runs folder."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.steps = runs / ".steps"
        self._verified: set[str] = set()
        self._held: set[str] = set()
        self.claimed: list[str] = []  # by this process, in their order

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

    def holder(self, step: str) -> str:
        """The process that works on a step, as it wrote down itself."""
        who = read_json(self.steps / f".{step}.holder") or {}
        return f"process {who.get('pid', '?')} on {who.get('host', '?')}"

    def record(self, step: str) -> dict[str, Any] | None:
        """The step's done.json, or None where it is not there or was altered; the files it lists are not looked at.

        Raises InputError when a newer qcft wrote it.
        """
        record = read_sealed(self.folder(step) / "done.json")
        if record is None:
            return None
        check_layout(record.get("layout", 1), LAYOUT, f"the step {step}")
        whole = all(isinstance(record.get(key), dict) for key in ("files", "metrics")) and "seconds" in record
        return record if whole else None

    def done(self, step: str, watch: Watch | None = None) -> dict[str, Any] | None:
        """The step's done.json if the step is done and its files are whole, else None.

        A file that is missing or was altered is named in a warning, and the step is made anew.
        """
        record = self.record(step)
        if record is None:
            if watch is not None and self.state(step) == "done":
                watch.note(f"{step}: done.json is altered; the step is made anew", "warning")
            return None
        if step not in self._verified:
            altered = self._altered(step, record["files"], watch)
            if altered is not None:
                if watch is not None:
                    watch.note(f"{step}: {altered} is missing or altered; the step is made anew", "warning")
                return None
            self._verified.add(step)
        return record

    def _altered(self, step: str, files: dict[str, str], watch: Watch | None) -> str | None:
        """The first of a step's files that is not as it was written."""
        folder = self.folder(step)
        sizes = {name: path.stat().st_size for name in files if (path := folder / name).is_file()}
        read, total = 0, sum(sizes.values())
        for name, digest in files.items():
            if name not in sizes or file_digest(folder / name) != digest:
                return name
            read += sizes[name]
            if watch is not None and total > SLOW:
                watch.progress(f"checking {step}", read / 1e6, total / 1e6, "MB")
        return None

    @contextmanager
    def claim(self, step: str, inputs: dict[str, Any], watch: Watch) -> Iterator[Path]:
        """The step's folder, held by this process alone; what a killed process left there stays.

        Waits when another process works on the step. Raises InputError when the folder can't be written, QcftError
        when the disk is full, then or while the step is worked on.
        """
        folder = self.folder(step)
        with telling_unwritable(self.runs):
            self.steps.mkdir(parents=True, exist_ok=True)
        with telling_full_disk(self.runs, FREE), self._lock(step, watch):
            self.claimed.append(step)
            if (folder / "done.json").exists() and self.done(step) is None:
                shutil.rmtree(folder)  # not whole, as `done` told
            folder.mkdir(exist_ok=True)
            begun = read_json(folder / "step.json")
            if isinstance(begun, dict):
                check_layout(begun.get("layout", 1), LAYOUT, f"the step {step}")
            else:
                document = {"layout": LAYOUT, "step": step, "inputs": inputs, **_circumstances()}
                write_json(folder / "step.json", document)
            yield folder

    def finish(self, step: str, metrics: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Mark a step done: digests of its files, its metrics and the seconds this process worked on it."""
        folder = self.folder(step)
        files = {
            name.as_posix(): file_digest(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in UNSEALED and path.name[0] != "."
            if not SCRATCH.intersection((name := path.relative_to(folder)).parts)
        }
        record = {"layout": LAYOUT, "step": step, "metrics": metrics, "seconds": round(seconds, 2), "files": files}
        write_sealed(folder / "done.json", record)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # only now: a kill before would lose the training
        self._verified.add(step)
        return record

    def discard(self, step: str) -> None:
        """Remove a step that this process made, unless another works on it by now."""
        from filelock import FileLock, Timeout

        self._verified.discard(step)
        if step in self._held:
            shutil.rmtree(self.folder(step), ignore_errors=True)
            return
        with suppress(Timeout), FileLock(self.lock_file(step), timeout=0):
            shutil.rmtree(self.folder(step), ignore_errors=True)

    def lock_file(self, step: str) -> Path:
        """The file whose lock says that a process works on a step."""
        return self.steps / f".{step}.lock"

    @contextmanager
    def _lock(self, step: str, watch: Watch) -> Iterator[None]:
        from filelock import FileLock, Timeout

        lock, holder = FileLock(self.lock_file(step)), self.steps / f".{step}.holder"
        told = False
        while True:
            try:
                lock.acquire(timeout=0.5)
                break
            except Timeout:
                if not told:
                    watch.note(f"waiting for {step}: {self.holder(step)} works on it")
                    told = True
                watch.check_stop()
        try:
            write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()})
            self._held.add(step)
            yield
        finally:
            self._held.discard(step)
            holder.unlink(missing_ok=True)
            lock.release()


def check_layout(written: Any, known: int, what: str) -> None:
    """Refuse in words what a newer qcft wrote. Raises InputError."""
    if not isinstance(written, int) or written > known:
        raise InputError(
            f"{what} was written by a newer qcft (layout {written!r}; this one reads up to {known})",
            "update qcft, or name another folder with --runs",
        )


def writable(runs: Path) -> None:
    """Check that a runs folder can be written, writing nothing. Raises InputError."""
    place = runs
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        what = "a link that leads nowhere" if place.is_symlink() else "a file"
        raise InputError(
            f"the runs folder {str(runs)!r} cannot be made: {str(place)!r} is {what}", "name another with --runs"
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
        return str(torch.cuda.get_device_name())
    return "cpu"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def model_digest(store: Store, step: str) -> str:
    """The digest of a merged model's files. Raises KeyError for a step that is not done."""
    record = store.record(step)
    if record is None:
        raise KeyError(step)
    files = sorted((name, digest) for name, digest in record["files"].items() if name.endswith(".safetensors"))
    return hashlib.sha256(repr(files).encode()).hexdigest()
