"""Reads the records of a source: files, folders, data that ships with qcft, and the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qcft.data.columns import mixes_text
from qcft.data.files import FORMS, SUFFIXES, BadLine, kind_of, no_split, read_file
from qcft.data.folders import split_of
from qcft.data.saved import is_saved, read_saved
from qcft.errors import InputError, QcftError, nearest
from qcft.events import Watch
from qcft.files import exists, oddity
from qcft.recipe import Source
from qcft.recipe.load import recipes_folder

SHIPPED = "qcft:"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_records(source: Source, watch: Watch | None = None) -> Iterator[dict[str, Any] | BadLine]:
    """The records of the source's split in order, read lazily; `watch` gets a warning about files of a folder that
    belong to no split. Raises InputError."""
    assert not isinstance(source.lang, list)
    if source.path.startswith(SHIPPED):
        path = _shipped(source.path.removeprefix(SHIPPED))
    else:
        path = Path(os.path.expanduser(source.path))
    there = exists(path)
    if there and path.is_file():
        if source.subset is not None:
            raise InputError(f"data: {source.path!r} is a file and has no subset {source.subset!r}", "omit subset:")
        yield from read_file(path, source.split, source.sample_by)
    elif there and path.is_dir():
        yield from _read_folder(path, source, watch)
    elif (odd := oddity(path)) is not None:
        raise InputError(f"data: {source.path!r} is {odd}", f"give {FORMS}")
    elif HUB_ID.fullmatch(source.path) and not source.path.lower().endswith(SUFFIXES):
        yield from _read_hub(source, watch)
    else:
        raise InputError(f"data: there is no file {source.path!r}", f"give {FORMS}")


def _shipped(name: str) -> Path:
    folder = recipes_folder() / "data"
    known = [str(p.relative_to(folder).with_suffix("").as_posix()) for p in sorted(folder.rglob("*.jsonl"))]
    if name not in known:
        raise InputError(
            f"data: no data named {SHIPPED + name!r} ships with qcft",
            nearest(name, known) + f"available: {', '.join(SHIPPED + k for k in known)}",
        )
    return folder / f"{name}.jsonl"


def _read_folder(folder: Path, source: Source, watch: Watch | None) -> Iterator[dict[str, Any] | BadLine]:
    if is_saved(folder) and source.subset is not None:
        raise InputError(
            f"data: {source.path!r} was written by save_to_disk and has no subset {source.subset!r}",
            "omit subset:",
        )
    saved = folder / (source.subset or "")
    if is_saved(saved):
        yield from read_saved(saved, source.split)
        return
    found = split_of(folder, source.subset, source.split)
    if found.ignored and watch is not None:
        names = ", ".join(str(file.relative_to(folder)) for file in found.ignored[:5])
        more = f" and {len(found.ignored) - 5} more" * (len(found.ignored) > 5)
        watch.note(
            f"{source.path}: split {source.split} is {len(found.files)} file{'s' * (len(found.files) > 1)}; "
            f"not read, as they belong to no split by their names: {names}{more}",
            "warning",
        )
    for file in _readable(found.files, source):
        yield from read_file(file, sample_by=source.sample_by)


def _readable(files: Sequence[Path], source: Source) -> Sequence[Path]:
    """The text files or the other files, as the format says. Raises InputError if it does not say which."""
    texts = [file for file in files if kind_of(file) == "text"]
    if not texts or len(texts) == len(files) or source.format == "text":
        return files
    others = [file for file in files if file not in texts]
    if source.format == "auto":
        raise mixes_text(source, "data", f"raw text ({texts[0].name}) beside other files ({others[0].name})")
    return others


def _read_hub(source: Source, watch: Watch | None) -> Iterator[dict[str, Any]]:
    """A hub data set; streamed if only some rows are used, so that the rest is not downloaded."""
    import datasets
    from huggingface_hub import HfApi, constants

    from qcft.hub import check_download, unreachable

    offline = "give a file or a folder, or qcft:instructions/en; if the set is cached, set HF_HUB_OFFLINE=1"
    try:
        if not constants.HF_HUB_OFFLINE:
            # Checked first: `datasets` retries an unreachable hub for half a minute.
            info = HfApi().dataset_info(source.path, revision=source.revision, timeout=10, files_metadata=True)
            if source.take is None:
                sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
                check_download("data", source.path, map(sizes.get, _files_of(source)), watch)
        yield from datasets.load_dataset(
            source.path,
            source.subset,
            split=source.split,
            revision=source.revision,
            streaming=source.take is not None,
            **({"sample_by": source.sample_by} if source.sample_by else {}),
        )
    except QcftError:
        raise
    except Exception as error:  # whatever the hub's HTTP client raises; `unreachable` finds out which
        raise (isinstance(error, ValueError) and _misnamed(source)) or unreachable(
            "data", source.path, error, offline
        ) from None


def _files_of(source: Source) -> set[str]:
    """The files of a hub data set that its subset is read from; none if `datasets` has them in its cache."""
    import datasets

    builder = datasets.load_dataset_builder(source.path, source.subset, revision=source.revision)
    listed = [] if Path(builder.cache_dir).is_dir() else (builder.config.data_files or {}).values()
    return {str(file).rpartition("@")[2].partition("/")[2] for files in listed for file in files}


def _misnamed(source: Source) -> InputError | None:
    """The error for a subset or split that a hub data set does not have; None if it has both."""
    import datasets

    try:
        subsets = datasets.get_dataset_config_names(source.path, revision=source.revision)
        chosen = source.subset or datasets.get_dataset_default_config_name(source.path, revision=source.revision)
        if chosen not in subsets:
            what = f"no subset {chosen!r}" if chosen else "several subsets"
            return InputError(
                f"data: {source.path!r} has {what}", f"it has {', '.join(subsets)}: name one with subset:"
            )
        splits = datasets.get_dataset_split_names(source.path, chosen, revision=source.revision)
    except Exception:  # the hub again; the first error is more useful
        return None
    known = [str(name) for name in splits]
    return None if source.split in known else no_split(source.path, source.split, known)
