"""Shared by the parts: writing results at once, running `qcft` as a user does, reading the files of a run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2**30
ROOT = Path(__file__).resolve().parents[2]
OVERHEAD = 20  # tokens that the models' chat template adds to a row with one question and one answer


class Part:
    """One part of the check: its name and size, its folders, the seconds it may take."""

    def __init__(self, name: str, work: Path, out: Path, dry: bool, limit: float) -> None:
        self.full = name
        self.name, _, self.size = name.partition(":")
        self.work, self.out, self.dry = work, out, dry
        self.cuda = not dry
        self.end = time.monotonic() + limit

    @property
    def left(self) -> float:
        """Seconds until the part times out."""
        return max(0.0, self.end - time.monotonic())

    def report(self, what: str, **found: Any) -> None:
        """Write one result at once, so that it is kept if the part is killed later."""
        write_result(self.out, {"part": self.full, "what": what, **found})
        print("RESULT", what, found, flush=True)  # into the log, next to the messages it belongs to

    def attempt(self, what: str, work: Callable[[], dict[str, Any]], **more: Any) -> dict[str, Any] | None:
        """Run one piece of a part and report its result, or how it failed; the part continues in both cases."""
        start = time.monotonic()
        try:
            found = work()
        except Exception as error:  # any error belongs in the results
            self.failed(what, error, **more)
            return None
        self.report(what, seconds=round(time.monotonic() - start, 1), **more, **found)
        return found

    def failed(self, what: str, error: BaseException, **more: Any) -> None:
        """Report an exception."""
        traceback.print_exception(error)
        trace = "".join(traceback.format_exception(error))[-1500:]
        self.report(what, failed=f"{type(error).__name__}: {error}"[:800], trace=trace, **more)

    def folder(self, *names: str) -> Path:
        """An empty folder of this part."""
        place = self.work.joinpath("parts", self.full.replace(":", "-"), *names)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        return place

    def model(self, size: str | None = None, alone: bool = False) -> Path:
        """The folder of the random model of this part's size (`--dry`: a tiny one); waits until it is made.

        `alone`: waits until all models are made, so that nothing else runs on the card.
        """
        models = self.work / "models"
        folder = models / ("tiny" if self.dry else size or self.size)
        for place in [folder, *(models.iterdir() if alone else ())]:
            while not (place / "ready").is_file() and not (place / "failed").is_file():
                time.sleep(0.1)
        if not (folder / "ready").is_file():
            raise RuntimeError(f"no model {folder.name}: {(folder / 'failed').read_text(encoding='utf-8')}")
        return folder


def write_result(out: Path, found: Mapping[str, Any]) -> None:
    """Append a line to results.jsonl."""
    with (out / "results.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(found, default=str) + "\n")


# ---- commands -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """A command that has ended. `stopped`: ended by this check on purpose."""

    exit: int
    seconds: float
    stdout: str
    stderr: str
    stopped: bool

    def json(self) -> Any:
        """The output of `--json`. Raises RuntimeError if the command failed."""
        self.check()
        return json.loads(self.stdout)

    def check(self) -> None:
        """Raise RuntimeError, with the last of its messages, if the command failed."""
        if self.exit and not self.stopped:
            raise RuntimeError(f"exit code {self.exit} after {self.seconds:.0f} s: {self.stderr[-1000:].strip()}")

    def warnings(self) -> list[str]:
        """The lines with warnings, and errors with their hints."""
        wanted = ("warning:", "error:", "hint:")
        return [line[:400] for line in self.stderr.splitlines() if line.startswith(wanted)][:12]


def qcft(*arguments: object, before: str = "", **options: Any) -> Ended:
    """Run the command line in its own process; `before` is Python code to run first in it."""
    start = ["-c", f"{before}\nfrom qcft.cli import main\nmain()"] if before else ["-m", "qcft"]
    return command([sys.executable, *start, *map(str, arguments)], **options)


def share_of_cores(processes: int) -> dict[str, str]:
    """The environment of each of several processes, with its share of the threads: more threads than cores are slow."""
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}


def command(
    line: Sequence[str],
    stop: Callable[[], bool] | None = None,
    environment: Mapping[str, str] | None = None,
    limit: float | None = None,
    keep: list[str] | None = None,
) -> Ended:
    """Run a command to its end, with its output printed at once, or kill it when `stop` returns true.

    The command stays in the part's process group, so that it ends with the part. Raises TimeoutError after `limit`
    seconds; `keep` then has the lines of its output so far.
    """
    start = time.monotonic()
    print("$", *(word if len(word) < 200 else word[:200] + " ..." for word in line), flush=True)
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        env={**os.environ, **(environment or {})}, cwd=ROOT,
    )  # fmt: skip
    streams: dict[str, list[str]] = {"stdout": [] if keep is None else keep, "stderr": []}
    readers = [threading.Thread(target=_read, args=(getattr(process, name), streams[name])) for name in streams]
    for reader in readers:
        reader.start()
    stopped = False
    while process.poll() is None:
        if stop is not None and stop():
            process.send_signal(signal.SIGKILL)
            stopped = True
            break
        if limit is not None and time.monotonic() - start > limit:
            process.kill()
            process.wait()
            raise TimeoutError(f"not done after {limit:.0f} s: {''.join(streams['stderr'])[-600:].strip()}")
        time.sleep(0.005 if stop else 0.05)
    process.wait()
    for reader in readers:
        reader.join(5)
    seconds = round(time.monotonic() - start, 1)
    return Ended(process.returncode, seconds, "".join(streams["stdout"]), "".join(streams["stderr"]), stopped)


def _read(stream: Any, lines: list[str]) -> None:
    for line in stream:
        lines.append(line)
        print(line, end="", flush=True)


# ---- recipes and runs ---------------------------------------------------------------------------------------------


def write_recipe(
    place: Path, name: str, model: Path, phases: list[dict[str, Any]], quantize: str = "nf4", **more: Any
) -> Path:
    """A recipe with as little measuring between its phases as possible: one row, no answers, no live probe.

    `epochs` has no effect if `steps` is given, but it is part of a step's id: without it, phases that differ only in
    settings without an effect on the result (checkpointing, stored states, passes) would be one step, trained once.
    """
    numbered = [
        {**phase, "train": {**phase["train"], "epochs": number}} for number, phase in enumerate(phases, start=1)
    ]
    recipe = {
        "name": name,
        "model": {"name": str(model), "quantize": quantize},
        "heldout": {"rows": 1},
        "answers": {"prompts": 0},
        "forgetting": None,
        "phases": numbered,
        **more,
    }
    path = place / f"{name}.yaml"
    path.write_text(json.dumps(recipe, indent=1), encoding="utf-8")  # JSON is YAML
    return path


def write_rows(path: Path, count: int, least: int, most: int, answer: int | None = None) -> Path:
    """Write rows of random words with `least` to `most` tokens of the random models' tokenizer, template included.

    The second half of each is the answer, or its last `answer` tokens.
    """
    draw = random.Random(5)
    lines = []
    for _ in range(count):
        length = draw.randint(least, most) - OVERHEAD
        words = "".join(draw.choice("abcdefghijklmnopqrstuvwxyz     ") for _ in range(length))
        text = "q" + words[1:-1] + "z"  # no spaces at the ends, which templates strip
        cut = length - (answer or length // 2)
        prompt, completion = text[:cut].rstrip() or "q", text[cut:].lstrip() or "z"
        prompt += "." * (cut - len(prompt))
        completion = "." * (length - cut - len(completion)) + completion
        lines.append(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


class Runs:
    """A runs folder with one run, read from its files: run.json, done.json, log.jsonl."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def stages(self) -> dict[str, str]:
        """Stage -> step; empty until the run has started."""
        try:
            return dict(json.loads((self.folder / self.name / "run.json").read_text(encoding="utf-8"))["stages"])
        except (OSError, ValueError):
            return {}

    def place(self, stage: str, *names: str) -> Path:
        """The path of a file of a stage's step."""
        return self.folder.joinpath(".steps", self.stages()[stage], *names)

    def done(self, stage: str) -> dict[str, Any] | None:
        """The content of done.json; None until the step is done."""
        try:
            return dict(json.loads(self.place(stage, "done.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError):
            return None

    def log(self, stage: str) -> list[dict[str, Any]]:
        """The training's log so far, a record for each optimizer step."""
        try:
            lines = self.place(stage, "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        except (OSError, KeyError):
            return []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def copy_without(self, folder: Path, *stages: str) -> Runs:
        """A copy of the runs folder without the results of these stages."""
        shutil.copytree(self.folder, folder, symlinks=True)
        there = Runs(folder, self.name)
        for stage in stages:
            shutil.rmtree(there.place(stage), ignore_errors=True)
        return there


def run_recipe(
    recipe: Path | str,
    runs: Runs,
    report: Callable[[str, dict[str, Any]], None] | None = None,
    until: str = "",
    changes: Sequence[str] = (),
    **options: Any,
) -> Ended:
    """`qcft run`; calls `report` with each stage when it is done, and kills the run when the stage `until` is done.

    `changes`: further arguments of the command line.
    """
    reported: set[str] = set()

    def look() -> bool:
        for stage in runs.stages() if report or until else ():
            if stage not in reported and (record := runs.done(stage)) is not None:
                reported.add(stage)
                if report:
                    report(stage, record)
        return until in reported

    ended = qcft("run", recipe, "--runs", runs.folder, "--json", *changes, stop=_every(0.1, look), **options)
    look()
    return ended


def _every(seconds: float, look: Callable[[], bool]) -> Callable[[], bool]:
    """`look`, called at most once in this interval; false in between."""
    last = 0.0

    def rarely() -> bool:
        nonlocal last
        if time.monotonic() - last < seconds:
            return False
        last = time.monotonic()
        return look()

    return rarely


def peak(record: Mapping[str, Any]) -> int:
    """A step's peak memory in bytes: on the card, or the process's resident set."""
    metrics = record["metrics"]
    return int(metrics.get("peak_GPU_bytes") or metrics.get("peak_RAM_bytes") or 0)


def gib(count: float) -> float:
    """Bytes in GiB, rounded."""
    return round(count / GIB, 3)


def step_seconds(log: Sequence[Mapping[str, Any]]) -> list[float]:
    """The seconds of each optimizer step, from the tokens so far and their rate since the training started."""
    ends = [entry["tokens"] / entry["tokens_per_second"] for entry in log]
    return [round(b - a, 4) for a, b in zip([0.0, *ends], ends, strict=False)]
