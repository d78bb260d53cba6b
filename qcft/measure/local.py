"""Local copies of a task's data: files with the columns of the dataset on the hub, used instead of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from qcft.data.files import BadLine
from qcft.data.sources import read_records
from qcft.errors import InputError
from qcft.files import file_digest, oddity
from qcft.private import private
from qcft.recipe import Source

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def check_local(task: str, path: str) -> Path:
    """The file or folder to use for a task's data. Raises InputError."""
    place = Path(os.path.expanduser(path))
    if (odd := oddity(place)) is not None:
        raise InputError(f"evaluate.local: {task}: {path!r} is {odd}", "give a file, or a folder of splits")
    if not place.exists():
        raise InputError(f"evaluate.local: {task}: there is no file {path!r}", "give a file, or a folder of splits")
    if place.is_dir() and not _files(place):
        raise InputError(
            f"evaluate.local: {task}: the folder {path!r} holds no data",
            f"give it one file for each split, such as test.jsonl ({', '.join(SUFFIXES)}, also .gz)",
        )
    return place


def local_digest(path: Path) -> str:
    """A digest of a file, or of a folder's files."""
    files = [path] if path.is_file() else list(_files(path).values())
    return hashlib.sha256(" ".join(f"{file.name}:{file_digest(file)}" for file in files).encode()).hexdigest()


def read_local(path: Path) -> list[dict[str, Any]]:
    """A file's records. Raises InputError."""
    records = list(read_records(Source(path=str(path))))
    bad = sum(isinstance(record, BadLine) for record in records)
    if bad or not records:
        what = f"{bad} of its {len(records)} lines are not JSON" if bad else "it is empty"
        raise InputError(f"evaluate.local: {str(path)!r} cannot be used: {what}", "give one record per line")
    return [record for record in records if not isinstance(record, BadLine)]


def local_dataset(task: str, path: Path, shots: int | None) -> Callable[..., Mapping[str, Any]]:
    """The function that lm-eval calls instead of loading from the hub; it returns splits by name.

    A folder has a file for each split (`test.jsonl`, `dev.jsonl.gz`); a single file is the split that is evaluated.
    Where rows have a `subject` and a group has a task for each subject (mmlu), each task gets the rows of its subject.
    """
    read = cache(read_local)

    def load(config_source: str = "", **_: Any) -> Mapping[str, Any]:
        load_yaml = private("lm_eval.tasks._yaml_loader:load_yaml")
        config = load_yaml(config_source, resolve_func=False) if config_source else {}
        return _Splits(task, path, config, shots, read)

    return load


class _Splits(dict[str, Any]):
    """Splits, each read when it is first used."""

    def __init__(
        self,
        task: str,
        path: Path,
        config: Mapping[str, Any],
        shots: int | None,
        read: Callable[[Path], list[dict[str, Any]]],
    ) -> None:
        super().__init__()
        self.task, self.path, self.read = task, path, read
        part = str(config.get("dataset_name") or "")  # on the hub: subjects in mmlu, languages in global_mmlu
        self.subject = part if len(part) > len("en") else None
        self.evaluated = config.get("test_split") or config.get("validation_split")
        self.shots = shots if shots is not None else config.get("num_fewshot", 0)

    def __missing__(self, split: str) -> Any:
        from datasets import Dataset

        rows = self.read(self._file(split))
        if self.subject and "subject" in rows[0]:
            rows = [row for row in rows if row.get("subject") == self.subject]
            if not rows:
                raise self._error(f"has no row of the subject {self.subject!r}", "give a file with all subjects")
        self[split] = Dataset.from_list(rows)
        return self[split]

    def _file(self, split: str) -> Path:
        files = _files(self.path) if self.path.is_dir() else {str(self.evaluated): self.path}
        if split in files:
            return files[split]
        if split != self.evaluated and not self.shots:  # requested, but no example of it is used
            return next(iter(files.values()))
        hint = f"give a folder that holds {split}.jsonl; it has {', '.join(files)}"
        raise self._error(f"has no split {split!r}", hint)

    def _error(self, what: str, hint: str) -> InputError:
        return InputError(f"evaluate.local: {self.task}: {str(self.path)!r} {what}", hint)


def _files(folder: Path) -> dict[str, Path]:
    """A folder's data files by the split they are named after."""
    found = {}
    for file in sorted(folder.iterdir()):
        name = file.name.removesuffix(".gz")
        if file.is_file() and name.endswith(SUFFIXES):
            found[name.rsplit(".", 1)[0].split("-00")[0]] = file
    return found
