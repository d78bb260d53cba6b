"""Reads the flags that name data sets: `--data LANG=PATH`, `--test LANG=PATH`, `--columns A=B`. Prints nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qcft.errors import InputError

LANG = re.compile(r"[a-z]{2,3}(?:-[A-Za-z0-9]{2,8})?")
LANG_PATH = re.compile(rf"({LANG.pattern})=(.+)")
ON_HUB = re.compile(r"([\w.-]+/[\w.-]+?)(?:/(\w+))?(?:@([\w./-]+))?")
CODES = "a language code is two or three lower-case letters of ISO 639, with a region if needed: es, vi, pt-BR"


def source_keys(take: int | None, columns: str | None) -> dict[str, Any]:
    """The keys that flags set for every source: `--take` and `--columns`. Raises InputError."""
    keys: dict[str, Any] = {} if take is None else {"take": take}
    if columns is None:
        return keys
    named = {}
    for pair in columns.split(","):
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not equals or not ours or not theirs:
            raise InputError(f"--columns {columns!r}: {pair!r} is not NAME=COLUMN", "for example instruction=question")
        named[ours] = theirs
    return {**keys, "columns": named}


def sources_of(data: list[str], keys: dict[str, Any] | None = None, lang: str | None = None) -> list[dict[str, Any]]:
    """The raw sources of `[LANG=]PATH` flags; `lang` is the language where a flag names none. Raises InputError."""
    sources = []
    for given in data:
        match = LANG_PATH.fullmatch(given)
        code, equals, rest = given.partition("=")
        if not match and equals and not Path(given).exists() and re.fullmatch(r"[\w-]*", code):
            meant = f"did you mean {code.lower()}={rest}? " if rest and LANG.fullmatch(code.lower()) else ""
            what = f"{code!r} is not a language code" if rest else "the path is missing"
            raise InputError(f"data: {given!r}: {what}", f"{meant}{CODES}")
        own, path = (match[1], match[2]) if match else (lang, given)
        if not path.strip():  # it would mean every file in the current folder
            raise InputError(f"data: {given!r}: the path is missing", "give a file, a folder or a hub id")
        sources.append({**_place(path), "lang": own, **(keys or {})})
    return sources


def tests_of(given: list[str], keys: dict[str, Any]) -> list[dict[str, Any]]:
    """The raw sources of `--test LANG=PATH` flags; all of their rows are measured. Raises InputError."""
    for text in given:
        if not LANG_PATH.fullmatch(text):
            raise InputError(f"--test {text!r} is not LANG=PATH", f"for example --test es=test_es.jsonl; {CODES}")
    return sources_of(given, {key: value for key, value in keys.items() if key != "take"})


def _place(path: str) -> dict[str, Any]:
    """A path as it is, or the data set, split and revision of FOLDER/SPLIT or OWNER/NAME[/SPLIT][@REVISION]."""
    if Path(path).exists():
        # Absolute, so that the run can be resumed from another folder.
        return {"path": str(Path(path).absolute())}
    folder, slash, name = path.rpartition("/")
    if slash and re.fullmatch(r"\w+", name) and Path(folder).is_dir():
        return {"path": str(Path(folder).absolute()), "split": name}
    match = ON_HUB.fullmatch(path)
    if not match or Path(path.split("/")[0]).exists() or not (match[2] or match[3]):
        return {"path": path}
    keys = {"split": match[2], "revision": match[3]}
    return {"path": match[1], **{key: value for key, value in keys.items() if value}}
