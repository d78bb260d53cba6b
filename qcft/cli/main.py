"""The `qcft` command: how errors are printed."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from qcft.cli.options import app, set_handler, stop_at_once


def main() -> NoReturn:
    """The `qcft` command: errors as two lines, exit codes 0, 1, 2, 129, 130 and 143."""
    debug = "--debug" in sys.argv
    if "--cpu" in sys.argv:
        os.environ["QCFT_DEVICE"] = "cpu"
    sys.argv = [argument for argument in sys.argv if argument not in {"--debug", "--cpu"}]
    if os.environ.get("QCFT_DEVICE") == "cpu":  # libraries look for a GPU themselves, too
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["PYTHONSAFEPATH"] = "1"  # processes that libraries start load no modules from the current folder
    from qcft.errors import QcftError, is_out_of_memory, short
    from qcft.runner.libraries import set_environment
    from qcft.terminal.streams import clean_streams

    clean_streams()
    try:
        os.getcwd()
    except FileNotFoundError:
        _fail("the current folder was deleted", "cd to an existing folder", 2)
    set_handler(stop_at_once)  # until work begins, which sets its own
    try:
        _check_words(sys.argv[1:])
        set_environment()  # whichever module first loads a library
        code = app(standalone_mode=False)
    except QcftError as error:
        if debug:
            raise
        _fail(error.message, error.hint, error.exit_code)
    except Exception as error:  # any other error: print no traceback
        if hasattr(error, "format_message"):  # a usage error; Typer's versions have no common class for it
            _usage_error(error)
        if debug:
            raise
        from qcft.files import UNWRITABLE, is_disk_full

        if is_disk_full(error, Path.cwd()):
            _fail("the disk that is written to is full", "free some space, then run the same command again", 1)
        if isinstance(error, OSError) and error.errno in UNWRITABLE and error.filename:
            _fail(f"{str(error.filename)!r}: {error.strerror}", "check its permissions, or name another folder", 2)
        if is_out_of_memory(error):
            _fail("memory ran out", "free memory, or use a smaller model; finished steps are kept", 1)
        text = f"unexpected {type(error).__name__}: {short(error, 300)}"
        _fail(text, "finished steps are kept; run again with --debug to see the traceback", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _check_words(arguments: list[str]) -> None:
    """Refuse empty values, in every command, and values that are not UTF-8 text.

    A shell variable that is not set gives an empty value. Some flags would read it as the current folder, others as
    everything. Raises InputError.
    """
    from qcft.errors import InputError

    for before, argument in zip(["", *arguments], arguments, strict=False):
        if any("\ud800" <= one <= "\udfff" for one in argument):
            raise InputError(f"{argument!a} is not UTF-8 text", "give it in UTF-8; rename a file with such a name")
        flag, equals, value = argument.partition("=")
        if equals and flag.startswith("--") and not value.strip():
            before = flag
        elif argument.strip():
            continue
        what = f"{before}: the value given" if re.match("--?[a-z]", before) else "an argument"
        raise InputError(f"{what} is empty", "give one, or omit it; a shell variable that is not set is empty")


def _usage_error(error: Any) -> NoReturn:
    """Print a mistake on the command line like any other error."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
        sys.stdout.write(f"{error.format_message()}\n")
        sys.exit(0)
    named = [word for word in sys.argv[1:2] if not word.startswith("-")]  # an option without its value has no context
    command = context.command_path if context else " ".join(["qcft", *named])
    _fail(_plain(error), f"see `{command} --help`", 2)


NOT_PARSED = {"int_parsing": "a whole number", "float_parsing": "a number"}  # pydantic's names of these mistakes


def _plain(error: Any) -> str:
    """The message of a mistake; for text in place of a number, with the text, which Typer's message lacks."""
    mistakes: list[dict[str, Any]] = getattr(error.__cause__, "errors", list)()
    wanted = NOT_PARSED.get(mistakes[0]["type"]) if mistakes else None
    if wanted:
        return f"{error.param.opts[-1]} {mistakes[0]['input']!r} is not {wanted}"
    return str(error.format_message()).replace("Value error, ", "")


def _fail(message: str, hint: str, code: int) -> NoReturn:
    from qcft.terminal.tables import print_error

    print_error(message, hint)
    sys.exit(code)
