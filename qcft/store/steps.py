"""Step folders under runs/.steps. No folder: to do. No done.json: partial. Else done, once verified.

step.json     inputs, versions, hardware, and a digest of itself: written first
done.json     metrics, seconds, file digests, and a digest of itself: written last, by rename

Files of done steps are read through `Store.open`.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from qcft.errors import InputError
from qcft.events import Watch
from qcft.files import (
    known_digest,
    read_json,
    read_sealed,
    reporting_full_disk,
    reporting_unwritable,
    write_json,
    write_sealed,
)
from qcft.store.opened import BEGUN, DONE, LOG, Begun, DoneStep, Record, altered, first_altered, read_begun

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
FREE = (
    "free some space (`qcft gc` lists what no run uses), then run the same command again: it resumes where it stopped"
)
LAYOUT = 2  # of step folders; raised when an older qcft could misread them
UNSEALED = {BEGUN, DONE, LOG}  # not part of a step's result
SCRATCH = {"checkpoints", "tensorboard"}  # folders that are not part of the result


class Store:
    """The steps under one runs folder."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.steps = runs / ".steps"
        self._held: set[str] = set()
        self.claimed: list[str] = []  # by this process, in their order

    def folder(self, step: str) -> Path:
        """The folder of a step's files."""
        return self.steps / step

    def state(self, step: str) -> str:
        """`done`, `partial` or `to do`, without looking into the files."""
        if (self.folder(step) / DONE).is_file():
            return "done"
        return "partial" if (self.folder(step) / BEGUN).is_file() else "to do"

    def is_trained(self, step: str) -> bool:
        """Whether a step is a training that is done, or has a checkpoint."""
        checkpoints = self.folder(step) / "checkpoints"
        begun = self.state(step) == "done" or (checkpoints.is_dir() and any(checkpoints.iterdir()))
        return step.startswith("train-") and begun

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
        """The process that works on a step, as it recorded itself."""
        who = read_json(self.steps / f".{step}.holder") or {}
        return f"process {who.get('pid', '?')} on {who.get('host', '?')}"

    def record(self, step: str) -> Record | None:
        """The step's done.json, or None where it is missing or was altered; the files it lists are not checked.

        Raises InputError when a newer qcft wrote it.
        """
        record = read_sealed(self.folder(step) / DONE)
        if record is None:
            return None
        check_layout(record.get("layout", 1), LAYOUT, f"the step {step}")
        whole = all(isinstance(record.get(key), dict) for key in ("files", "metrics")) and "seconds" in record
        return cast("Record", record) if whole else None

    def open(self, step: str) -> DoneStep | None:
        """A done step, whose files are checked as they are read; None where it is not done.

        Raises InputError where its done.json was altered.
        """
        record = self.record(step)
        if record is None and self.state(step) == "done":
            raise altered(self.folder(step), DONE)
        return None if record is None else DoneStep(step, self.folder(step), record)

    def opened(self, step: str) -> DoneStep:
        """`open` of a step that another depends on. Raises InputError where it is not done."""
        found = self.open(step)
        if found is None:
            raise altered(self.folder(step), DONE)
        return found

    def done(self, step: str, watch: Watch | None = None) -> Record | None:
        """The step's done.json if the step is done and its files are intact, else None.

        A file that is missing or was altered is named in a warning, and the step is rebuilt.
        """
        record = self.record(step)
        what = DONE if record is None else first_altered(self.folder(step), record["files"], watch)
        if what is None or self.state(step) != "done":
            return record
        if watch is not None:
            watch.note(f"{step}: {what} is missing or altered; the step is rebuilt", "warning")
        return None

    def reuse(self, step: str, inputs: Mapping[str, object], watch: Watch) -> None:
        """Write a done step's step.json again where it is missing or changed; the rest of the step stays."""
        if read_begun(self.folder(step)) is None:
            document = {"layout": LAYOUT, "step": step, "inputs": inputs, "begun": None, "versions": {}, "hardware": {}}
            write_sealed(self.folder(step) / BEGUN, document)
            watch.note(
                f"{step}: step.json is missing or altered; it is written again, without the versions that made the "
                "step",
                "warning",
            )

    @contextmanager
    def claim(self, step: str, inputs: Mapping[str, object], watch: Watch) -> Iterator[Path]:
        """The step's folder, held by this process alone; files that a killed process left there stay.

        Waits while another process works on the step. Raises InputError when the folder can't be written, QcftError
        when the disk is full, then or while the step is worked on.
        """
        folder = self.folder(step)
        with reporting_unwritable(self.runs):
            self.steps.mkdir(parents=True, exist_ok=True)
        with reporting_full_disk(self.runs, FREE), self._lock(step, watch):
            self.claimed.append(step)
            if (folder / DONE).exists() and self.done(step) is None:
                shutil.rmtree(folder)  # damaged, as `done` reported
            folder.mkdir(exist_ok=True)
            begun = read_begun(folder)
            if begun is not None:
                check_layout(begun.get("layout", 1), LAYOUT, f"the step {step}")
                if self.state(step) == "partial":
                    _note_versions(step, begun, watch)
            else:
                document = {"layout": LAYOUT, "step": step, "inputs": inputs, **_circumstances()}
                write_sealed(folder / BEGUN, document)
            yield folder

    def finish(self, step: str, metrics: Mapping[str, object], seconds: float) -> Record:
        """Mark a step done: digests of its files, its metrics and the seconds this process worked on it."""
        folder = self.folder(step)
        files = {
            name.as_posix(): known_digest(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in UNSEALED and path.name[0] != "."
            if not SCRATCH.intersection((name := path.relative_to(folder)).parts)
        }
        took = round(seconds, 2)
        record: Record = {"layout": LAYOUT, "step": step, "metrics": metrics, "seconds": took, "files": files}
        if (folder / LOG).is_file():  # not part of the result, but shown
            record["log"] = known_digest(folder / LOG)
        write_sealed(folder / DONE, record)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # only now: a kill before would lose the training
        return record

    def discard(self, step: str) -> None:
        """Remove a step that this process made, unless another process works on it now."""
        from filelock import FileLock, Timeout

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
        noted = False
        while True:
            try:
                lock.acquire(timeout=0.5)
                break
            except Timeout:
                if not noted:
                    watch.note(f"waiting for {step}: {self.holder(step)} works on it")
                    noted = True
                watch.check_stop()
        try:
            write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": now()})
            self._held.add(step)
            yield
        finally:
            self._held.discard(step)
            holder.unlink(missing_ok=True)
            lock.release()


def check_layout(written: Any, known: int, what: str) -> None:
    """Refuse what a newer qcft wrote. Raises InputError."""
    if not isinstance(written, int) or written > known:
        raise InputError(
            f"{what} was written by a newer qcft (layout {written!r}; this one reads up to {known})",
            "update qcft, or name another folder with --runs",
        )


def writable(runs: Path) -> None:
    """Check that a runs folder can be written, without writing to it. Raises InputError."""
    place = runs
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        what = "a link that leads nowhere" if place.is_symlink() else "a file"
        raise InputError(
            f"the runs folder {str(runs)!r} cannot be created: {str(place)!r} is {what}", "name another with --runs"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"the runs folder {str(runs)!r} cannot be written", "name another with --runs")


def package_versions() -> dict[str, str]:
    """Versions of the packages that results depend on, without those that are not installed."""
    found = {package: _version(package) for package in ("qcft", *PACKAGES)}
    return {package: version for package, version in found.items() if version is not None}


@cache  # parsing a package's metadata takes milliseconds, and every step records the versions
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _circumstances() -> dict[str, object]:
    return {
        "begun": now(),
        "versions": _versions(),
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "device": _device_name()},
    }


def _note_versions(step: str, begun: Begun, watch: Watch) -> None:
    """Report which packages changed since a step that is resumed was started."""
    before = begun.get("versions") or {}
    changed = [f"{k} {before[k]} -> {now}" for k, now in _versions().items() if before.get(k, now) != now]
    if changed:
        watch.note(f"{step} is resumed with other versions than it was started with: {', '.join(changed)}", "warning")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **package_versions()}


def _device_name() -> str:
    import sys

    torch = sys.modules.get("torch")  # only where it is loaded already
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return "cpu"


def now() -> str:
    """The current time in UTC, as files record it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def model_digest(store: Store, step: str) -> str:
    """The digest of a merged model's files. Raises KeyError for a step that is not done."""
    record = store.record(step)
    if record is None:
        raise KeyError(step)
    files = sorted((name, digest) for name, digest in record["files"].items() if name.endswith(".safetensors"))
    return hashlib.sha256(repr(files).encode()).hexdigest()
