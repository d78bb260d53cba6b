"""The program of the process that renders conversations for `render`; it reads and writes JSON lines.

The limits are the operating system's, which also apply inside C code: it kills this process when a conversation's CPU
time is used up (`'9' * 9**9` cannot be interrupted otherwise), and refuses memory over the limit. The program is run as
a file, so that it imports nothing from qcft.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template


def main() -> None:
    """Answer until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    seconds, refill, memory, longest, times = json.loads(sys.argv[1])
    _limit_memory(memory)
    start, stop = _watchdog()
    left = seconds
    template = ""
    out = sys.stdout.buffer
    out.write(b"ready\n")
    out.flush()
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        if asked["template"] is not None:
            template = asked["template"]
        answers = []
        for turns, options in asked["conversations"]:
            start(left)
            began = time.process_time()
            size = sum(len(text) for turn in turns for text in turn.values() if isinstance(text, str))
            answers.append(_render(template, turns, options, longest + times * size))
            stop()
            left = min(seconds, max(refill, left + began - time.process_time() + refill))
            if "limit" in answers[-1]:
                break
        out.write(json.dumps(answers).encode() + b"\n")
        out.flush()


def _render(template: str, turns: list[Any], options: dict[str, Any], most: int) -> dict[str, str]:
    """The text, the reason why there is none, or the limit that was reached."""
    try:
        found = render_jinja_template(conversations=[turns], chat_template=template, **options)
        text = found[0][0]
        if len(text) > most:
            return {"limit": "size"}
        text.encode()  # lone surrogates
    except MemoryError:
        return {"limit": "memory"}
    except Exception as error:  # a template may raise anything
        return {"refused": _reason(error)}
    return {"text": text}


def _reason(error: Exception) -> str:
    """The first line of an error's message, or the error's name."""
    with suppress(Exception):
        return (str(error)[:1000].strip().splitlines() or [type(error).__name__])[0][:80]
    return type(error).__name__


def _watchdog() -> Any:
    """Two functions: one kills this process after a number of seconds, the other cancels that."""
    if hasattr(signal, "setitimer"):
        clock = signal.ITIMER_PROF  # CPU time, so that other work on the machine is not counted
        return partial(signal.setitimer, clock), partial(signal.setitimer, clock, 0)
    null = open(os.devnull, "w")  # noqa: SIM115 (held to the end)
    return partial(faulthandler.dump_traceback_later, exit=True, file=null), faulthandler.cancel_dump_traceback_later


def _limit_memory(most: int) -> None:
    with suppress(ImportError, OSError, ValueError):  # if the system has no such limit, only the limit on time applies
        import resource

        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + most, used + most))


if __name__ == "__main__":
    main()
