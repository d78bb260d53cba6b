"""The `qcft` command: what it does with errors."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from qcft.cli.options import app, hear, stop_at_once


def main() -> NoReturn:
    """The `qcft` command: errors as two lines, exit codes 0, 1, 2, 130 and 143."""
    debug = "--debug" in sys.argv
    if "--cpu" in sys.argv:
        os.environ["QCFT_DEVICE"] = "cpu"
    sys.argv = [argument for argument in sys.argv if argument not in {"--debug", "--cpu"}]
    if os.environ.get("QCFT_DEVICE") == "cpu":  # for libraries that look for a card by themselves, too
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["PYTHONSAFEPATH"] = "1"  # no process that a library begins loads modules from the working folder
    from qcft.cache import ensure_home
    from qcft.errors import QcftError, is_out_of_memory, short
    from qcft.terminal.streams import clean_streams

    clean_streams()
    try:
        os.getcwd()
    except FileNotFoundError:
        _fail("the current folder was deleted", "cd to an existing folder", 2)
    hear(stop_at_once)  # until work begins, which hears them itself
    try:
        _check_words(sys.argv[1:])
        ensure_home()
        code = app(standalone_mode=False)
    except QcftError as error:
        if debug:
            raise
        _fail(error.message, error.hint, error.exit_code)
    except Exception as error:  # the last line of defence between a user and a traceback
        if hasattr(error, "format_message"):  # a mistake on the command line; Typer's versions share no class for it
            _usage_error(error)
        if debug:
            raise
        from qcft.files import UNWRITABLE, is_disk_full

        if is_disk_full(error, Path.cwd()):
            _fail("the disk that is written to is full", "free some space, then give the same command", 1)
        if isinstance(error, OSError) and error.errno in UNWRITABLE and error.filename:
            _fail(f"{str(error.filename)!r}: {error.strerror}", "check its permissions, or name another folder", 2)
        if is_out_of_memory(error):
            _fail("memory ran out", "free memory, or use a smaller model; what was done is kept", 1)
        text = f"unexpected {type(error).__name__}: {short(error, 300)}"
        _fail(text, "what was done is kept; run again with --debug to see where it comes from", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _check_words(arguments: list[str]) -> None:
    """Refuse what names nothing, of every command: what a shell makes of a variable that is not set would mean the
    working folder to one flag, and all there is to another; and what is no text. Raises InputError."""
    from qcft.errors import InputError

    for before, argument in zip(["", *arguments], arguments, strict=False):
        if any("\ud800" <= one <= "\udfff" for one in argument):
            raise InputError(f"{argument!a} is no UTF-8 text", "give it in UTF-8; rename a file of such a name")
        flag, equals, value = argument.partition("=")
        if equals and flag.startswith("--") and not value.strip():
            before = flag
        elif argument.strip():
            continue
        what = f"{before}: the value given" if re.match("--?[a-z]", before) else "an argument"
        raise InputError(f"{what} is empty", "give one, or leave it out; a shell variable that is not set is empty")


def _usage_error(error: Any) -> NoReturn:
    """A mistake on the command line, told like any other."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
        sys.stdout.write(f"{error.format_message()}\n")
        sys.exit(0)
    named = [word for word in sys.argv[1:2] if not word.startswith("-")]  # an option without its value has no context
    command = context.command_path if context else " ".join(["qcft", *named])
    _fail(error.format_message(), f"see `{command} --help`", 2)


def _fail(message: str, hint: str, code: int) -> NoReturn:
    from qcft.terminal.tables import print_error

    print_error(message, hint)
    sys.exit(code)
