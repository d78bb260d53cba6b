"""Reads folders written by `datasets`' save_to_disk, which list their files in state.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qcft.data.files import FORMS, no_split
from qcft.errors import InputError, QcftError, short

STATE, SPLITS = "state.json", "dataset_dict.json"


def is_saved(folder: Path) -> bool:
    """Whether `datasets`' save_to_disk wrote the folder."""
    return (folder / STATE).is_file() or (folder / SPLITS).is_file()


def read_saved(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """The records of a split. Raises InputError."""
    from datasets import Dataset

    try:
        own = folder
        if (folder / SPLITS).is_file():
            known = [_plain(name) for name in json.loads((folder / SPLITS).read_text(encoding="utf-8"))["splits"]]
            if split not in known:
                raise no_split(str(folder), split, known)
            own = folder / split
        state = json.loads((own / STATE).read_text(encoding="utf-8"))
        for entry in state["_data_files"]:
            if not (own / _plain(entry["filename"])).is_file():
                raise ValueError(f"it lacks {entry['filename']}")
        data = Dataset.load_from_disk(str(own))
        if own is folder and split != str(data.split or "train"):
            raise no_split(str(folder), split, [str(data.split or "train")])
        yield from data
    except QcftError:
        raise
    except Exception as error:  # its JSON may contain anything
        raise InputError(
            f"data: {str(folder)!r} was not written by save_to_disk, or was altered: {_reason(error)}",
            f"save it again, or give {FORMS}",
        ) from None


def _plain(name: Any) -> str:
    """A name, checked to be directly in the folder. Raises ValueError."""
    if not isinstance(name, str) or name in {"", ".", ".."} or Path(name).name != name:
        raise ValueError(f"it names {str(name)[:80]!r}, which is not in the folder")
    return name


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else short(error)
