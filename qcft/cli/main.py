"""The `qcft` command: what it does with errors."""

from __future__ import annotations

import signal
import sys
from typing import Any, NoReturn

from qcft.cli.options import STOPPED, app, stop_at_once


def main() -> NoReturn:
    """The `qcft` command: errors as two lines, exit codes 0, 1, 2, 130 and 143."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    from qcft.errors import QcftError

    for number in STOPPED:  # until work begins, which hears them itself
        signal.signal(number, stop_at_once)
    try:
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
        text = f"{type(error).__name__}: {error}"
        _fail(f"unexpected {text[:300]}", "what was done is kept; run again with --debug to see where it comes from", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _usage_error(error: Any) -> NoReturn:
    """A mistake on the command line, told like any other."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":  # the help is printed already
        sys.exit(0)
    command = context.command_path if context else "qcft"
    _fail(error.format_message(), f"see `{command} --help`", 2)


def _fail(message: str, hint: str, code: int) -> NoReturn:
    from qcft.console import print_error
    from qcft.errors import without_tokens

    print_error(without_tokens(message), hint)
    sys.exit(code)
