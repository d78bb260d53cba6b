"""A process for the arms of an ablation, started again for the remaining arms when it crashes.

A process cannot catch its own crash (the system out of memory, a fault in a native library). All arms share one
process, as importing and preparing takes as long as a short arm; only a crash needs another.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qcft.errors import QcftError
from qcft.events import Watch
from qcft.store.ablations import readable_ablations

# Not `python -m qcft`, which loads modules from the working folder; the package's own place comes last.
START = f"import sys; sys.path.append({str(Path(__file__).parents[2])!r}); from qcft.cli import main; main()"

ENDED, STOPPED = {0, 1, 2}, {129, 130, 143}  # exit codes of our process when it ends by itself, or is asked to stop


def supervise(arguments: Sequence[str], runs: Path, report: Callable[[str], None]) -> int:
    """Run `qcft ARGUMENTS --supervised ...`, and after a crash again, for the arms that did not crash. Returns the exit
    code of the last process, or 1 if that is 0 and an arm crashed.

    `report` is called with a line for each arm whose process crashed.

    Raises QcftError when it crashes outside of any arm.
    """
    crashed: list[str] = []
    while True:
        none = ","  # an empty value would be refused
        command = [sys.executable, "-P", "-c", START, *arguments, "--supervised", ",".join(crashed) or none]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process, _forwarding_signals(process):
            code = process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        found = [
            (ablation, run)
            for ablation in readable_ablations(runs)[0]
            for run, worker in ablation.document["working"].items()
            if worker["pid"] == process.pid
        ]
        # A library may end the process with an exit code of ours (bitsandbytes does with 1), an arm unfinished.
        if code in STOPPED or (code in ENDED and not found):
            return 1 if crashed and code == 0 else code
        if not found:
            raise QcftError(f"the process crashed ({how}) outside of any arm", "the system's log (dmesg) may show why")
        for ablation, run in found:
            hint = "out of memory? see the system's log (dmesg); run the same command again to retry"
            ablation.end(run, {"message": f"its process crashed ({how})", "hint": hint, "step": None, "title": None})
            report(f"{run}: its process crashed ({how}); continuing with the other arms")
            crashed.append(run)


@contextmanager
def stop_with_parent(watch: Watch, supervised: bool) -> Iterator[None]:
    """Request a stop when the supervising process has ended, which closes its end of standard input."""

    def wait() -> None:
        while os.read(0, 1):  # unbuffered: a thread that holds sys.stdin's lock would disturb the interpreter's exit
            pass
        watch.ask_to_stop(143)

    if supervised:
        threading.Thread(target=wait, daemon=True).start()
    yield


@contextmanager
def _forwarding_signals(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Ctrl-C reaches the process directly, as it is in the same group; SIGTERM and a closed terminal's SIGHUP are
    forwarded."""
    handlers = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
    }
    hang_up = getattr(signal, "SIGHUP", None)  # Windows has none
    if hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN:
        handlers[hang_up] = signal.signal(hang_up, lambda *_: process.send_signal(hang_up))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
