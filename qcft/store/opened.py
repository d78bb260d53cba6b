"""Done steps, opened: a file is read unchanged, or an error names the file and the command that rebuilds it."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from qcft.errors import InputError
from qcft.events import Watch
from qcft.files import known_digest, read_json, read_sealed

BEGUN, DONE, LOG = "step.json", "done.json", "log.jsonl"
SLOW = 10**9  # bytes whose digests take seconds
ID = re.compile(r"[a-z]+-[0-9a-f]{10}")
# The commands that rebuild steps which a recipe's plan may lack.
REBUILT_BY = {"drift": "qcft drift {}", "dial": "qcft dial {}", "suite": "qcft eval {}"}


class Record(TypedDict):
    """What done.json holds: what the step measured, and the digests of its files and of its log."""

    layout: int
    step: str
    metrics: Mapping[str, Any]
    seconds: float
    files: dict[str, str]
    log: NotRequired[str | None]


class StepInputs(TypedDict):
    """The inputs of a step, which are all that changes its result; `settings` are those of its kind."""

    kind: str
    format: int
    weights: str | None
    adapter: str | None
    settings: dict[str, Any]
    parents: list[str]
    under: NotRequired[list[str]]


class Begun(TypedDict):
    """What step.json holds: the step's inputs, and the versions and hardware it runs on."""

    layout: int
    step: str
    inputs: StepInputs
    begun: str | None
    versions: dict[str, str]
    hardware: dict[str, object]


@dataclass(frozen=True)
class DoneStep:
    """A done step. Its methods check the files they return against the step's digests, each file once in a process.

    All raise InputError for a file that is missing or was altered.
    """

    step: str
    folder: Path
    record: Record

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What the step measured; store.metrics has the keys of each kind."""
        return self.record["metrics"]

    @property
    def begun(self) -> Begun:
        """Its step.json."""
        found = read_begun(self.folder)
        if found is None:
            raise altered(self.folder, BEGUN)
        return found

    @property
    def inputs(self) -> StepInputs:
        """What it was made from."""
        return self.begun["inputs"]

    def has(self, name: str) -> bool:
        """Whether the step wrote a file."""
        return name in self.record["files"]

    def file(self, name: str) -> Path:
        """One of its files."""
        self._check([name])
        return self.folder / name

    def json(self, name: str) -> Any:
        """The JSON in one of its files."""
        return json.loads(self.file(name).read_text(encoding="utf-8"))

    def part(self, name: str, watch: Watch | None = None) -> Path:
        """One of its folders, such as `adapter` or `model`, with all files that it wrote there."""
        inside = [one for one in self.record["files"] if one.startswith(f"{name}/")]
        self._check(inside or [name], watch)
        return self.folder / name

    def log(self) -> Path | None:
        """Its log; None where it has none, or it changed after the step ended (not known for earlier versions).

        It is not part of the result: a damaged log does not make the step be rebuilt.
        """
        path = self.folder / LOG
        if not path.is_file() or self.record.get("log", known := _digest(path)) != known:
            return None
        return path

    def _check(self, names: Iterable[str], watch: Watch | None = None) -> None:
        wanted = {name: self.record["files"].get(name, "") for name in names}
        found = first_altered(self.folder, wanted, watch)
        if found is not None:
            raise altered(self.folder, found)


def first_altered(folder: Path, files: Mapping[str, str], watch: Watch | None) -> str | None:
    """The first of a step's files, given with their digests, that is missing or changed."""
    sizes = {name: path.stat().st_size for name in files if (path := folder / name).is_file()}
    read, total = 0, sum(sizes.values())
    for name, digest in files.items():
        if name not in sizes or _digest(folder / name) != digest:
            return name
        read += sizes[name]
        if watch is not None and total > SLOW:
            watch.progress(f"checking {folder.name}", read / 1e6, total / 1e6, "MB")
    return None


def _digest(path: Path) -> str | None:
    """A file's digest; None where the file cannot be read."""
    try:
        return known_digest(path)
    except OSError:
        return None


def altered(folder: Path, name: str) -> InputError:
    """The error for a step's file that is missing or changed, with the command that rebuilds the step."""
    return InputError(f"{folder.name}: {name} is missing or altered", _remedy(folder))


def read_begun(folder: Path) -> Begun | None:
    """A step's step.json; None where it is missing or changed.

    Earlier versions did not seal it: there its inputs are compared with the step's id, which is their digest.
    """
    begun = read_sealed(folder / BEGUN)
    inputs = begun.get("inputs") if begun else None
    if not isinstance(inputs, dict):
        return None
    named = "kind" in inputs and ID.fullmatch(folder.name)  # else its id is of something else
    return None if named and step_id(cast("StepInputs", inputs)) != folder.name else cast("Begun", begun)


def step_id(inputs: StepInputs) -> str:
    """The id of the step with these inputs."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return f"{inputs['kind']}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def run_again(folder: Path) -> str:
    """The command that runs a named run's own recipe."""
    return f"qcft run {shlex.quote(str(folder / 'recipe.yaml'))}{runs_flag(folder.parent)}"


def runs_flag(runs: Path) -> str:
    """The flag that names a runs folder in a command, empty for the default."""
    return "" if runs == Path("runs") else f" --runs {shlex.quote(str(runs))}"


def _remedy(folder: Path) -> str:
    """How to rebuild a step: the command of a run that names it."""
    runs = folder.parent.parent
    for path in sorted(runs.glob("*/run.json")):
        document = read_json(path)
        stages = document.get("stages") if isinstance(document, dict) else None
        stage = next((k for k, v in stages.items() if v == folder.name), None) if isinstance(stages, dict) else None
        if stage is None:
            continue
        kind, run = folder.name.split("-")[0], path.parent.name
        own = REBUILT_BY.get(kind)
        command = f"{own.format(run)}{runs_flag(runs)}" if own else run_again(path.parent)
        more = f" (or `qcft merge {run}`, if that made it)" if "merged" in stage else ""
        return f"rebuild it: `{command}`{more}; intact steps are reused"
    return "rebuild it: run again the recipe of the run that made it; intact steps are reused"
