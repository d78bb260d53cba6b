"""A chat in a terminal, where answers are shown as they are generated, or in a pipe, line by line."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.errors import InputError, QcftError, nearest
from qcft.events import Watch
from qcft.safe import shown
from qcft.terminal.streams import said, stdout
from qcft.terminal.tables import print_error, say

if TYPE_CHECKING:
    from qcft.inspect.chat import Chat
    from qcft.models.generate import Answer

HELP = {
    "/stage NAME": "continue with another stage: base, a phase or a merge",
    "/both [NAME]": "let a second stage answer too; again: only the first",
    "/reset": "clear the conversation",
    "/save FILE": "write the conversation as JSON lines",
    "/help": "this list; to send a prompt that begins with a slash, write // instead of /",
    "/quit": "quit, as Ctrl-D does; Ctrl-C stops an answer",
}
COMMANDS = [usage.split()[0] for usage in HELP]


def is_terminal() -> bool:
    """Whether input and output are a terminal, not a pipe."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


class _Keyboard:
    """Typed lines, and Ctrl-C: it stops an answer; at the prompt, twice in a row, it quits."""

    def __init__(self) -> None:
        self.answering = self.stop = self.twice = False

    def __call__(self, number: int, frame: Any) -> None:
        """Handle Ctrl-C. A second one during an answer does not wait for the next token."""
        if not self.answering or self.stop:
            raise KeyboardInterrupt
        self.stop = self.twice = True

    def line(self) -> str | None:
        """The next line; None to quit."""
        while True:
            try:
                line = input("> ")
                self.stop = self.twice = False
                return line
            except UnicodeDecodeError:
                print_error("what was typed is not UTF-8 text", "use a terminal in UTF-8")
            except (EOFError, KeyboardInterrupt) as end:
                sys.stdout.write("\n")
                if self.twice or isinstance(end, EOFError):
                    return None
                self.twice = True
                say("Ctrl-C again, or Ctrl-D, quits", "dim")


def talk(chat: Chat) -> None:
    """Prompts from the keyboard, answers as they are generated, until /quit, Ctrl-D, or Ctrl-C twice in a row."""
    with suppress(ImportError):
        import readline  # noqa: F401 (gives `input` a line that can be edited, and its history)
    chat.load()
    say(f"{chat.run}, {chat.stages[0]}: /help lists the commands, Ctrl-D quits", "dim")
    keyboard, before = _Keyboard(), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, keyboard)
    try:
        while (line := keyboard.line()) is not None:
            try:
                prompt = run_command(line, chat)
                if prompt is None:
                    return
                if prompt:
                    _show_answers(chat, prompt, keyboard)
            except QcftError as error:
                print_error(error.message, error.hint)
    finally:
        signal.signal(signal.SIGINT, before)


def answer_lines(chat: Chat, watch: Watch) -> None:
    """Prompts and commands from stdin, one per line; answers on stdout. Raises InputError where there is none."""
    number = 0
    try:
        for number, line in enumerate(sys.stdin, start=1):
            prompt = run_command(line, chat)
            if prompt is None:
                break
            for stage, answer in chat.answers(prompt, stopped=lambda: watch.stop_code is not None) if prompt else ():
                watch.check_stop()
                label = f"[{stage}] " if len(chat.stages) > 1 else ""
                sys.stdout.write(shown(f"{label}{answer.text}\n"))
                if not answer.finished:
                    watch.note(f"line {number}: the answer was cut off at {answer.tokens} tokens", "warning")
                sys.stdout.flush()
            watch.check_stop()
    except UnicodeDecodeError:
        raise InputError("stdin is not UTF-8 text", "give one prompt per line, in UTF-8") from None
    if not number:
        raise InputError("stdin is empty", "give one prompt per line, or chat from a terminal")


def run_command(line: str, chat: Chat) -> str | None:
    """Run a line that is a command, else return it as a prompt. Empty: nothing to answer; None: quit.

    Raises InputError.
    """
    line = line.strip()
    if not line.startswith("/") or line.startswith("//"):
        return line[1:] if line.startswith("//") else line
    word, _, given = line.partition(" ")
    given = given.strip()
    if word not in COMMANDS or (bool(given) and word in {"/reset", "/help", "/quit"}):
        raise InputError(
            f"there is no command {line[:40]!r}",
            nearest(word, COMMANDS) + "/help lists them; to send this as a prompt, write // instead of /",
        )
    if not given and word in {"/stage", "/save"}:
        usage = next(usage for usage in HELP if usage.startswith(word))
        raise InputError(f"{word} needs {usage.split()[1]}", f"write {usage}")
    if word == "/quit":
        return None
    if word == "/help":
        width = max(map(len, HELP))
        say("\n".join(f"{usage:{width}}  {what}" for usage, what in HELP.items()))
    elif word == "/reset":
        chat.reset()
        say("the conversation is cleared", "dim")
    elif word == "/save":
        say(f"{chat.save(Path(given).expanduser())} turns written to {given}", "dim")
    elif word == "/both" and (given or len(chat.stages) == 1):
        chat.both(given or None)
        say(f"{' and '.join(chat.stages)} answer", "dim")
    else:
        chat.use(given or chat.stages[0])
        say(f"{chat.stages[0]} answers", "dim")
    return ""


def _show_answers(chat: Chat, prompt: str, keyboard: _Keyboard) -> None:
    """Write the answers as they are generated; Ctrl-C stops them."""
    begun: set[str] = set()

    def on_text(stage: str, text: str) -> None:
        if stage not in begun and len(chat.stages) > 1:
            stdout().print(said(f"{stage}:", "cyan"))
        begun.add(stage)
        sys.stdout.write(shown(text))
        sys.stdout.flush()

    keyboard.answering = True
    try:
        for stage, answer in chat.answers(prompt, on_text, lambda: keyboard.stop):
            sys.stdout.write("\n" if answer.text else "")
            _say_end(stage, answer, keyboard.stop)
    except KeyboardInterrupt:  # a second Ctrl-C, before the next token was complete
        sys.stdout.write("\n")
        say("stopped; this answer is discarded", "dim")
    finally:
        keyboard.answering = False


def _say_end(stage: str, answer: Answer, stopped: bool) -> None:
    """Report an answer that did not end by itself, or has no text."""
    if stopped:
        say("stopped", "dim")
    elif not answer.finished:
        say(f"{stage} was cut off at {answer.tokens} tokens; --max-new-tokens allows more", "dim")
    elif not answer.text:
        say(f"{stage} ended its answer without a text", "dim")
