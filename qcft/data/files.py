"""Where records come from: files, folders, data that ships with qcft, and the hub."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qcft.errors import InputError, nearest
from qcft.files import exists
from qcft.recipe import Source
from qcft.recipe.load import recipes_folder

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".gz", ".parquet", ".csv", ".csv.gz")
SHIPPED = "qcft:"
FORMS = "a .json, .jsonl, .csv or .parquet file (also .gz), a folder of them, or a hub id OWNER/NAME"
# What reading JSON may raise: no JSON, no UTF-8, a number of thousands of digits; nesting thousands deep.
UNREADABLE = (ValueError, RecursionError)


class BadLine:
    """A line that is no JSON object; counted, not fatal."""


def read_records(source: Source) -> Iterator[dict[str, Any] | BadLine]:
    """The source's records in order, read as they are asked for. Raises InputError."""
    assert not isinstance(source.lang, list)
    if source.path.startswith(SHIPPED):
        yield from _read_file(_shipped(source.path.removeprefix(SHIPPED)))
        return
    path = Path(os.path.expanduser(source.path))
    there = exists(path)
    if there and path.is_file():
        yield from _read_file(path)
    elif there and path.is_dir():
        yield from _read_folder(path, source)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source.path) and not source.path.lower().endswith(SUFFIXES):
        yield from _read_hub(source)
    else:
        raise InputError(f"data: there is no file {source.path!r}", f"give {FORMS}")


def _shipped(name: str) -> Path:
    folder = recipes_folder() / "data"
    known = [str(p.relative_to(folder).with_suffix("").as_posix()) for p in sorted(folder.rglob("*.jsonl"))]
    if name not in known:
        raise InputError(
            f"data: no data named {SHIPPED + name!r} ships with qcft",
            nearest(name, known) + f"there is {', '.join(SHIPPED + k for k in known)}",
        )
    return folder / f"{name}.jsonl"


def _read_file(path: Path) -> Iterator[dict[str, Any] | BadLine]:
    names = [s.lower() for s in path.suffixes]
    kind = names[-1] if names else ""
    if kind == ".gz":
        kind = names[-2] if len(names) > 1 and names[-2] in {".json", ".jsonl", ".csv"} else ".jsonl"
    if kind == ".parquet":
        yield from _read_parquet(path)
    elif kind == ".csv":
        yield from _read_csv(path)
    elif kind in {".json", ".jsonl"}:
        yield from _read_json(path)
    else:
        raise InputError(f"data: {str(path)!r} is of no known file type", f"give {FORMS}")


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """The file's bytes, unpacked where they are gzipped (by content, not by name)."""
    try:
        with path.open("rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as stream:
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"data: {str(path)!r} cannot be read: {reason}", "check that the file is whole") from None


def _read_json(path: Path) -> Iterator[dict[str, Any] | BadLine]:
    """JSON lines, or one JSON array (or an object holding one array of records)."""
    with _open(path) as stream:
        start = stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        stream.seek(0)
        if start[:1] == b"[" or (start[:1] == b"{" and path.name.lower().endswith((".json", ".json.gz"))):
            text = stream.read()
            try:
                yield from _records_of(json.loads(text.decode("utf-8-sig")), path)
                return
            except UNREADABLE as error:
                if start[:1] == b"[":
                    raise InputError(f"data: {str(path)!r} is not readable as JSON: {error}", f"give {FORMS}") from None
            lines: Any = iter(text.splitlines())  # JSON lines under the name .json
        else:
            lines = stream
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 0 else "utf-8"))
            except UNREADABLE:
                yield BadLine()
                continue
            yield record if isinstance(record, dict) else BadLine()


def _records_of(document: Any, path: Path) -> Iterator[dict[str, Any] | BadLine]:
    if isinstance(document, dict):
        lists = [v for v in document.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        named = [document[k] for k in ("data", "rows", "train") if isinstance(document.get(k), list)]
        if {"messages", "conversations", "instruction", "prompt"} & document.keys():
            document = [document]
        elif named or len(lists) == 1:
            document = (named or lists)[0]
        else:
            raise InputError(f"data: {str(path)!r} holds an object, not a list of records", f"give {FORMS}")
    if not isinstance(document, list):
        raise InputError(f"data: {str(path)!r} holds no list of records", f"give {FORMS}")
    for record in document:
        yield record if isinstance(record, dict) else BadLine()


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    import csv
    import io
    import sys

    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _open(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        try:
            for record in csv.DictReader(text):
                yield {k: v for k, v in record.items() if k is not None}
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"data: {str(path)!r} is not readable as CSV: {error}", "save it as UTF-8 CSV") from None


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"data: {str(path)!r} is not readable as parquet: {error}", f"give {FORMS}") from None


def _read_folder(folder: Path, source: Source) -> Iterator[dict[str, Any] | BadLine]:
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        yield from _read_saved(folder, source)
        return
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name.lower().endswith(SUFFIXES))
    if not files:
        raise InputError(f"data: the folder {str(folder)!r} holds no data files", f"give {FORMS}")
    for file in files:
        yield from _read_file(file)


def _read_saved(folder: Path, source: Source) -> Iterator[dict[str, Any]]:
    """A folder written by `datasets`' save_to_disk."""
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise InputError(f"data: {str(folder)!r} cannot be read: {error}", f"give {FORMS}") from None
    if isinstance(data, DatasetDict):
        if source.split not in data:
            raise InputError(f"data: {str(folder)!r} has no split {source.split!r}", f"it has {', '.join(data)}")
        data = data[source.split]
    yield from data


def _read_hub(source: Source) -> Iterator[dict[str, Any]]:
    """A hub data set; streamed when only some rows are taken, so that the rest is not downloaded."""
    import datasets
    from huggingface_hub import HfApi, constants

    from qcft.hub import unreachable

    offline = "give a file or a folder, or qcft:instructions/en; if the set is cached, set HF_HUB_OFFLINE=1"
    try:
        if not constants.HF_HUB_OFFLINE:
            # Asked first: `datasets` retries an unreachable hub for half a minute.
            HfApi().dataset_info(source.path, revision=source.revision, timeout=10)
        yield from datasets.load_dataset(
            source.path, source.subset, split=source.split, revision=source.revision, streaming=source.take is not None
        )
    except Exception as error:  # whatever the hub's HTTP client raises; `unreachable` tells them apart
        raise unreachable("data", source.path, error, offline) from None
