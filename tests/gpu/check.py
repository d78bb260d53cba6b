"""Check qcft on a CUDA card: speed, memory, resuming, running out of memory. Failures are recorded, not raised.

    python tests/gpu/check.py [--out DIR] [--work DIR] [--parts first|second|all|PART,PART:SIZE] [--seconds N] [--dry]

Run it in the repository's root. Each part runs in its own process, with a time limit. Each result is written to
DIR/results.jsonl at once, as one line; DIR/log.txt has all output. If a part fails, hangs or crashes, that is a line
too, and the next part runs. `--dry` runs the same on a CPU with a tiny model, to test the check itself.
tests/gpu/RESULTS.md explains the results.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of this folder, whose files have the names of other modules

from tests.gpu.common import Part, write_result  # noqa: E402


class Limits(NamedTuple):
    """The seconds that a part may take, and the seconds that must be left for it to start."""

    most: float
    least: float


LIMITS = {
    "env": Limits(60, 10),
    "doctor": Limits(40, 10),
    "gpu_tests": Limits(120, 25),
    "optimizer": Limits(40, 10),
    "resume": Limits(120, 30),
    "memory:1B": Limits(90, 25),
    "memory:3B": Limits(100, 35),
    "memory:8B": Limits(150, 60),
    "quickstart": Limits(200, 45),
    "step:8B": Limits(190, 60),
    "generate:8B": Limits(120, 40),
    "oom:1B": Limits(110, 35),
    "card8:8B": Limits(150, 60),
    "suite": Limits(200, 40),
    # For tests/test_gpu_check.py, hidden from the user.
    "selftest:fail": Limits(10, 0),
    "selftest:die": Limits(10, 0),
    "selftest:hang": Limits(2, 0),
}
FIRST = "env,doctor,gpu_tests,optimizer,resume,memory:8B,memory:1B,memory:3B"
SECOND = "quickstart,step:8B,oom:1B,generate:8B,card8:8B,suite"
GROUPS = {"first": FIRST, "second": SECOND, "all": f"{FIRST},{SECOND}"}
SIZES = ("1B", "3B", "8B")
SLOWER = 5  # a CPU, with --dry, compared with a card


def main() -> None:
    """Read the arguments; walk the parts, or be one of them."""
    options = read_arguments()
    if options.child:
        be_part(options)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that child processes are ended too
    with (options.out / "log.txt").open("a", encoding="utf-8") as log:
        walk(options, log)


def read_arguments() -> argparse.Namespace:
    """The arguments. Exits with code 2, an error and a hint, if they are wrong."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog=f"Parts: {', '.join(visible())}.", allow_abbrev=False
    )
    parser.error = lambda message: refuse(message, "see python tests/gpu/check.py --help")
    home = Path.home() / ".qcft-gpu"
    parser.add_argument("--out", type=Path, default=home / "out", help="folder for results.jsonl and log.txt")
    parser.add_argument("--work", type=Path, default=home, help="folder for models and runs: 30 GB with all sizes")
    parser.add_argument("--parts", default="first", help="first, second, all, or parts with commas [first]")
    parser.add_argument(
        "--seconds", type=float, default=540, help="time for all parts together, not kept by --dry [540]"
    )
    parser.add_argument("--dry", action="store_true", help="on a CPU, with a tiny model")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.names = GROUPS.get(options.parts, options.parts).split(",")
    for name in options.names:
        if limits_of(name) is None:
            refuse(f"there is no part {name!r}", f"parts are {', '.join(visible())}; or first, second, all")
    if not options.child and not options.dry and not any("selftest" in name for name in options.names):
        require_card()
    options.out, options.work = options.out.absolute(), options.work.absolute()  # parts run in the repository's root
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        options.work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"{error.filename!r} cannot be written: {error.strerror}", "name other folders with --out and --work")
    return options


def limits_of(name: str) -> Limits | None:
    """A part's limits; a part with a size may have any size. None for an unknown part."""
    base, _, size = name.partition(":")
    return LIMITS.get(name) or next(
        (limits for known, limits in LIMITS.items() if size in SIZES and known.partition(":")[0] == base != known), None
    )


def visible() -> list[str]:
    """The parts that a user may request."""
    return [name for name in LIMITS if not name.startswith("selftest")]


def require_card() -> None:
    """Exit with code 2 if there is no CUDA card, or this process may not use it."""
    with suppress(OSError):
        count = ctypes.c_int()
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value:
            return
    refuse("there is no CUDA card here", "run it on a machine with one, or with --dry")


def refuse(message: str, hint: str) -> NoReturn:
    """Print what is wrong with the arguments, and exit."""
    sys.stderr.write(f"error: {message}\nhint: {hint}\n")
    sys.exit(2)


# ---- walking the parts --------------------------------------------------------------------------------------------


def walk(options: argparse.Namespace, log: IO[str]) -> None:
    """Run the parts one after the other, each until it ends or times out; models are made in the background."""
    start = time.monotonic()
    shown = Shown(options.out / "results.jsonl")
    models = start_models(options, log)
    running: list[subprocess.Popen[bytes]] = [models] if models else []
    try:
        for name in options.names:
            left = options.seconds - (time.monotonic() - start)
            limits = limits_of(name) or Limits(0, 0)
            if left < limits.least and not options.dry:
                write_result(options.out, {"part": name, "skipped": f"{left:.0f} s left, {limits.least:.0f} needed"})
                continue
            most = min(limits.most, left - 2)
            if options.dry:
                most = limits.most * (1 if name.startswith("selftest") else SLOWER)
            begin = time.monotonic()
            part = start_child(options, log, ["--child", name, "--parts", name, "--limit", str(most)])
            running.append(part)
            ended = wait(part, most, models, options.work, shown)
            running.remove(part)
            seconds = {"part_seconds": round(time.monotonic() - begin, 1), "at": round(time.monotonic() - start, 1)}
            write_result(options.out, {"part": name, "what": "end", **ended, **seconds})
        write_result(options.out, {"part": "all", "what": "end", "seconds": round(time.monotonic() - start, 1)})
        shown.show()
    finally:
        for process in running:
            end_group(process)


class Shown:
    """Prints new lines of results.jsonl, from any process."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.read = file.stat().st_size if file.is_file() else 0

    def show(self) -> None:
        """Print the new lines."""
        if not self.file.is_file():
            return
        with self.file.open("rb") as stream:
            stream.seek(self.read)
            lines = stream.read().decode(errors="replace")
            self.read = stream.tell()
        sys.stdout.write(lines)
        sys.stdout.flush()


def wait(
    part: subprocess.Popen[bytes], most: float, models: subprocess.Popen[bytes] | None, work: Path, shown: Shown
) -> dict[str, Any]:
    """How a part ended: its exit code, with `failed` if it is not 0 or the part timed out."""
    until = time.monotonic() + most
    while part.poll() is None:
        if models is not None and models.poll():  # it crashed: parts that wait for a model should know
            for folder in (work / "models").iterdir():
                if folder.is_dir() and not (folder / "ready").is_file():
                    (folder / "failed").write_text(f"the process that makes models ended with {models.returncode}")
            models = None
        shown.show()
        if time.monotonic() > until:
            end_group(part)
            return {"failed": f"not done after {most:.0f} s"}
        time.sleep(0.05)
    end_group(part)  # it may have left processes running
    if part.returncode < 0:
        return {"exit": part.returncode, "failed": f"killed by {signal.Signals(-part.returncode).name}"}
    return {"exit": part.returncode} | ({"failed": "see above"} if part.returncode else {})


def start_models(options: argparse.Namespace, log: IO[str]) -> subprocess.Popen[bytes] | None:
    """Make the models that the parts need, in their order, in the background."""
    wanted = ["small" if name == "resume" else name.partition(":")[2] for name in options.names]
    sizes = [size for size in dict.fromkeys(wanted) if size == "small" or size in SIZES]
    if options.dry:
        sizes = ["tiny"]
    if not sizes:
        return None
    models = options.work / "models"
    models.mkdir(exist_ok=True)
    for folder in models.iterdir():
        if not (folder / "ready").is_file():  # an incomplete folder from an earlier check; parts would wait for it
            shutil.rmtree(folder)
    for size in sizes:
        (models / size).mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.gpu.models", str(models), ",".join(sizes)]
    return start_process(options, log, command)


def start_child(options: argparse.Namespace, log: IO[str], arguments: list[str]) -> subprocess.Popen[bytes]:
    """Start a part in its own process and process group."""
    log.write(f"\n===== {arguments[1]}\n")
    log.flush()
    same = ["--out", str(options.out), "--work", str(options.work), *(["--dry"] if options.dry else [])]
    return start_process(options, log, [sys.executable, "-m", "tests.gpu.check", *same, *arguments])


def start_process(options: argparse.Namespace, log: IO[str], command: list[str]) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if options.dry:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=ROOT)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the remaining processes of a process's group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ---- a part -------------------------------------------------------------------------------------------------------


def be_part(options: argparse.Namespace) -> None:
    """Run one part in this process."""
    part = Part(options.child, options.work, options.out, options.dry, options.limit or 3600)
    try:
        work_of(part.name)(part)
    except Exception as error:  # any error belongs in the results
        part.failed("part", error)
        sys.exit(1)


def work_of(name: str) -> Callable[[Part], None]:
    """The function of a part; only its file is imported."""
    if name in {"env", "doctor", "gpu_tests", "optimizer", "suite"}:
        from tests.gpu import machine

        return getattr(machine, name)
    if name in {"resume", "quickstart"}:
        from tests.gpu import resuming

        return {"resume": resuming.resume, "quickstart": resuming.quickstart}[name]
    if name in {"memory", "step", "generate"}:
        from tests.gpu import figures

        return {"memory": figures.memory, "step": figures.step, "generate": figures.generate}[name]
    if name in {"oom", "card8"}:
        from tests.gpu import full_card

        return {"oom": full_card.oom, "card8": full_card.card8}[name]
    return selftest


def selftest(part: Part) -> None:
    """What the check must handle: a part that fails, one that is killed, one that hangs with a child process."""
    part.report("started")
    if part.size == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if part.size == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        part.report("child", pid=child.pid)
        child.wait()
    raise ValueError("as asked")


if __name__ == "__main__":
    main()
