"""Checks the input of `qcft init` before anything is written: the model, the data, the file. Prints nothing."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.cli.data_flags import CODES, sources_of
from qcft.errors import InputError
from qcft.files import exists, oddity

if TYPE_CHECKING:
    from qcft.events import Watch

NONE = "none"


def check_free(to: Path, force: bool) -> None:
    """Check that a recipe can be written to a file. Raises InputError."""
    hint = "give --to the name of a file, such as recipe.yaml"
    if (odd := oddity(to)) is not None:
        raise InputError(f"--to {str(to)!r} is {odd}", hint)
    if exists(to) and to.is_dir():
        raise InputError(f"--to {str(to)!r} is a folder", hint)
    if not to.parent.is_dir():
        raise InputError(f"--to {str(to)!r}: there is no folder {str(to.parent)!r}", "create it first, or name another")
    if exists(to) and not force:
        raise InputError(f"--to {str(to)!r} already exists", "name another file, or replace it with --force")


def known_model(name: str) -> str:
    """A model's name, a path made absolute; a hub id is not looked up. Raises InputError."""
    from qcft.data.sources import HUB_ID
    from qcft.models.sources import resolve
    from qcft.recipe import Model

    path = Path(os.path.expanduser(name))
    if exists(path) or not HUB_ID.fullmatch(name):
        resolve(Model(name=name))
    return str(path.absolute()) if exists(path) else name


def readable(given: list[str], lang: str | None, watch: Watch) -> list[dict[str, Any]]:
    """The raw sources of `[LANG=]PATH` (`lang` where one names none), after reading those that are not on the hub.

    Raises InputError for a source that cannot be read or trained on, or has no language.
    """
    from qcft.data.files import SUFFIXES
    from qcft.data.load import load_source
    from qcft.data.sources import HUB_ID
    from qcft.recipe import HeldOut, Source

    found = sources_of(given, lang=lang)
    for text, source in zip(given, found, strict=True):
        if source["lang"] is None:
            raise InputError(f"data: {text!r} names no language", f"write LANG=PATH, for example es={text}; {CODES}")
        path = source["path"]
        if exists(Path(path)) or not HUB_ID.fullmatch(path) or path.lower().endswith(SUFFIXES):
            load_source(Source(**source), HeldOut(), watch)
    return found


def typed(text: str) -> list[str]:
    """The data sets in an answer, separated by spaces; paths with spaces are in quotes. Raises InputError."""
    try:
        found = shlex.split(text)
    except ValueError:
        raise InputError(f"data: {text!r}: a quote is not closed", "close it, or remove it") from None
    if not found:
        raise InputError("data: no data set is named", "give a file, a folder or a hub id")
    return found


def beside(path: str, to: Path) -> str:
    """A path as a recipe at `to` names it: relative to the recipe's folder if it is inside it."""
    folder = to.absolute().parent
    return Path(path).relative_to(folder).as_posix() if Path(path).is_relative_to(folder) else path
