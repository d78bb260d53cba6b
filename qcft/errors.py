"""What can go wrong, and the exit code it ends with.

QcftError              1   something failed while working
├── InputError         2   what the user gave cannot be used; nothing was written
└── Interrupted  130/143   Ctrl-C or SIGTERM; what was done stays usable
"""

from __future__ import annotations


class QcftError(Exception):
    """One line that says what is wrong, and one hint that says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(QcftError):
    """A value that was given cannot be used."""

    exit_code = 2


class Interrupted(QcftError):
    """The user (130) or the system (143) asked to stop."""

    def __init__(self, message: str, hint: str = "", exit_code: int = 130) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


def nearest(word: str, known: list[str]) -> str:
    """`did you mean 'x'? ` when a known word is close to `word`, else an empty string."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}? " if close else ""
