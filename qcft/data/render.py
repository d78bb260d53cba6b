"""Renders conversations with a model's chat template, which is untrusted code.

It runs in a separate process with limits on time, memory and size (see `render_worker`). One such process serves all
templates, one conversation after the other, and adds about 50 microseconds to the rendering itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.errors import InputError, QcftError
from qcft.private import private

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 5.0  # of CPU time for one conversation
REFILL = 0.05  # seconds that each conversation adds to the time left for the next, up to SECONDS
MEMORY = 2 << 30  # bytes
LONGEST, TIMES = 1_000_000, 20  # characters of output, plus so many for each character of the conversation
LIMITS = (
    f"{SECONDS:.0f} s of CPU time, {MEMORY >> 30} GB of memory, output of {TIMES} times its length and {LONGEST:,} "
    "characters more"
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # each thread would need memory, and has no work

Conversation = tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]  # turns, options


class TemplateRefused(ValueError):
    """The chat template cannot render a conversation; the text gives the reason."""


def render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The text that `tokenizer.apply_chat_template` returns for a conversation, with its options.

    Raises TemplateRefused if the template raises an error, InputError if it exceeds the limits.
    """
    found = render_all(tokenizer, [(turns, options)])[0]
    if isinstance(found, TemplateRefused):
        raise found
    return found


def render_all(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]
) -> list[str | TemplateRefused]:
    """The same for several conversations at once, which is faster: each text, or why the template refuses it."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise TemplateRefused(f"the chat template cannot be chosen: {str(error).splitlines()[0][:80]}") from None
    tokens = tokenizer.special_tokens_map
    answers = _WORKER.ask(template, [(turns, {**tokens, **options}) for turns, options in conversations])
    if len(answers) < len(conversations) or "limit" in answers[-1]:
        raise InputError(
            f"model: its chat template exceeds the limits for one conversation ({LIMITS})",
            "name a built-in template with --set model.chat_template=chatml, or use another model",
        )
    return [
        answer["text"] if "text" in answer else TemplateRefused(f"the chat template refuses it: {answer['refused']}")
        for answer in answers
    ]


def start_rendering() -> None:
    """Start the rendering process before its first use, as starting takes a second or two."""
    _WORKER.start()


class _Worker:
    """The rendering process; started again after it was killed, and in a forked process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._ready = False
        self._template: str | None = None

    def start(self) -> None:
        """Start the process if it is not running."""
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return
        # -P: do not import modules from the program's folder. Its errors are in its answers.
        command = [sys.executable, "-P", str(Path(__file__).with_name("render_worker.py"))]
        command.append(json.dumps([SECONDS, REFILL, MEMORY, LONGEST, TIMES]))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **ENVIRONMENT},
        )
        self._owner, self._ready, self._template = os.getpid(), False, None

    def ask(self, template: str, conversations: Sequence[Conversation]) -> list[dict[str, str]]:
        """The answers, in order; fewer if a limit was reached, none if the process was killed for it."""
        with self._lock:
            self.start()
            process = self._process
            assert process is not None
            assert process.stdin is not None
            assert process.stdout is not None
            if not self._ready and process.stdout.readline() != b"ready\n":
                private("transformers.utils.chat_template_utils:render_jinja_template")  # what it imports
                raise QcftError(
                    f"the process that renders chat templates exits at once, with code {process.wait()}",
                    "check that `python -c 'import transformers'` works",
                )
            self._ready = True
            asked = {"template": None if template == self._template else template, "conversations": conversations}
            self._template = template
            line = b""
            try:
                process.stdin.write(json.dumps(asked).encode() + b"\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                pass
            finally:  # if interrupted, it must not give this answer to the next request
                if not line.endswith(b"\n"):
                    process.kill()
                    process.wait()
                    self._process = None
            answers: list[dict[str, str]] = json.loads(line) if self._process else []
            return answers


_WORKER = _Worker()
