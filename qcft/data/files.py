"""Reads the records of one data file of any kind, lazily.

JSON is read with Python's own reader: pyarrow's stops at the first broken line and needs one type per column.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qcft.data.csv_file import read_csv
from qcft.data.streams import lines_of, open_file
from qcft.data.tables import read_arrow, read_parquet
from qcft.data.text_file import read_text_file
from qcft.errors import InputError, short

KINDS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow", ".txt": "text",
}  # fmt: skip
SUFFIXES = (*KINDS, ".gz")
FORMS = "a .json, .jsonl, .csv, .tsv, .parquet or .txt file (also .gz), a folder of them, or a hub id OWNER/NAME"
# What reading JSON may raise: invalid JSON or UTF-8, a number of thousands of digits; nesting thousands deep.
UNREADABLE = (ValueError, RecursionError)
# Names of lists in a JSON file that are not to be trained on.
OTHER_SPLITS = {"test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}


@dataclass(frozen=True)
class BadLine:
    """A line or entry that is not a JSON object: `where` (`line 5`, or `entry 5` of a list), and why; only counted."""

    where: str
    why: str


def kind_of(path: Path) -> str | None:
    """`json`, `csv`, `parquet`, `arrow` or `text` by the file's name; other gzipped files are JSON lines."""
    names = [suffix.lower() for suffix in path.suffixes]
    if names[-1:] == [".gz"]:
        return KINDS.get(names[-2] if len(names) > 1 else "", "json")
    return KINDS.get(names[-1]) if names else None


def read_file(path: Path, split: str = "train", sample_by: str | None = None) -> Iterator[dict[str, Any] | BadLine]:
    """The file's records in order, read lazily. Only a JSON file may hold more splits than `train`; `sample_by`: which
    part of a text file is a document (None: all of it).

    Raises InputError.
    """
    kind = kind_of(path)
    if split != "train" and kind != "json":
        raise no_split(str(path), split, ["train"])
    if sample_by is not None and kind != "text":
        raise InputError(f"data: {str(path)!r} is not a .txt file, which sample_by: is for", "omit sample_by:")
    if kind == "parquet":
        yield from read_parquet(path)
    elif kind == "arrow":
        yield from read_arrow(path)
    elif kind == "text":
        with open_file(path) as stream:
            yield from read_text_file(stream, path, sample_by or "document")
    elif kind == "csv":
        with open_file(path) as stream:
            yield from read_csv(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), path)
    elif kind == "json":
        yield from _read_json(path, split)
    else:
        raise InputError(f"data: {str(path)!r} has an unsupported file type", f"give {FORMS}")


def no_split(path: str, split: str, known: list[str]) -> InputError:
    """The error for a missing split; it names the splits that exist."""
    return InputError(f"data: {path!r} has no split {split!r}", f"it has {', '.join(known)}: name one with split:")


def _read_json(path: Path, split: str) -> Iterator[dict[str, Any] | BadLine]:
    """JSON lines, or one JSON document: a list of records, or an object with one list, or with one for each split."""
    with open_file(path) as stream:
        if _is_document(stream, path):
            text = stream.read()
            try:
                document = json.loads(text.decode("utf-8-sig"))
            except UNREADABLE as error:
                if text.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
                    raise InputError(f"data: {str(path)!r} is not readable as JSON: {error}", f"give {FORMS}") from None
                stream.seek(0)  # JSON lines with a broken first line
            else:
                del text
                yield from _records_of(document, path, split)
                return
        if split != "train":
            raise no_split(str(path), split, ["train"])
        for number, line in enumerate(lines_of(stream, path), start=1):
            if line.strip():
                yield _record(line, number)


def _is_document(stream: IO[bytes], path: Path) -> bool:
    """Whether the file is one JSON document; the stream stays at its start."""
    start = stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    stream.seek(0)
    if start != b"{" or not path.name.lower().removesuffix(".gz").endswith(".json"):
        return start == b"["
    lines = (line for line in lines_of(stream, path) if line.strip())
    first = next(lines, b"")
    several = isinstance(_record(first, 1), dict) and next(lines, None) is not None
    stream.seek(0)
    return not several


def _record(line: bytes, number: int) -> dict[str, Any] | BadLine:
    try:
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except json.JSONDecodeError as error:
        return BadLine(f"line {number}", f"{error.msg}, column {error.colno}")
    except UNREADABLE as error:
        return BadLine(f"line {number}", short(error))
    return record if isinstance(record, dict) else BadLine(f"line {number}", "not a JSON object")


def _records_of(document: Any, path: Path, split: str) -> Iterator[dict[str, Any] | BadLine]:
    if isinstance(document, dict):
        document = _list_in(document, path, split)
    elif split != "train":
        raise no_split(str(path), split, ["train"])
    if not isinstance(document, list):
        raise InputError(f"data: {str(path)!r} holds no list of records", f"give {FORMS}")
    for number, record in enumerate(document, start=1):
        yield record if isinstance(record, dict) else BadLine(f"entry {number}", "not a JSON object")


def _list_in(document: dict[str, Any], path: Path, split: str) -> list[Any]:
    """The split's list in an object; an object that is one record counts as a list of one. Raises InputError."""
    lists = {key: v for key, v in document.items() if isinstance(v, list) and (not v or isinstance(v[0], dict))}
    if {"messages", "conversations", "instruction", "prompt"} & document.keys():
        lists = {"train": [document]}
    elif "train" not in lists:
        unnamed = [key for key in lists if key.lower() not in OTHER_SPLITS]
        named = [key for key in ("data", "rows") if key in lists]
        if named or len(unnamed) == 1:
            lists["train"] = lists[(named or unnamed)[0]]
        elif not lists and any(isinstance(value, str) for value in document.values()):
            lists["train"] = [document]
    if split in lists:
        return lists[split]
    if not lists:
        raise InputError(f"data: {str(path)!r} holds an object, not a list of records", f"give {FORMS}")
    raise no_split(str(path), split, list(lists))
