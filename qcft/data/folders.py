"""Assigns the files of a folder to splits, by the rules of `datasets.load_dataset(FOLDER)`.

The rules: `configs:` in a README.md; else `data/{split}-00000-of-00001.*`; else folders, then files, named train, test,
validation ...; else every file belongs to the split train. Hidden files and folders are ignored.

Names of `datasets` that it does not document: `datasets.data_files` (`get_data_patterns`, `resolve_pattern`,
`sanitize_patterns`) and `datasets.utils.metadata.MetadataConfigs`; without them folders could not be read.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcft.data.files import FORMS, SUFFIXES, kind_of, no_split
from qcft.errors import InputError, nearest, short

ABOUT = re.compile(r"(readme|licen[cs]e|notice)\b.*\.txt$", re.IGNORECASE)  # files about the data


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split, sorted, and the folder's data files that belong to no split."""

    files: tuple[Path, ...]
    ignored: tuple[Path, ...]


def split_of(folder: Path, subset: str | None, split: str) -> SplitFiles:
    """The files of a split. `subset` names a config of the folder's README.md, else a folder in it.

    Raises InputError if there is no such subset, no such split or no data file, or if a file of the split exists in two
    formats.
    """
    base, patterns = _patterns(folder, subset)
    every = _resolved(["**"], base)
    splits = {name: files for name, wanted in patterns.items() if (files := _resolved(wanted, base))}
    if not splits:
        raise InputError(f"data: the folder {str(base)!r} holds no data files", f"give {FORMS}")
    if split not in splits:
        raise no_split(str(base), split, list(splits))
    by_stem: dict[tuple[Path, bool], Path] = {}
    for file in splits[split]:
        stem = file.parent / Path(file.name.removesuffix(".gz")).stem
        other = by_stem.setdefault((stem, kind_of(file) == "text"), file)
        if other != file:
            raise InputError(
                f"data: {str(base)!r} holds both {other.name} and {file.name}, which look like the same rows twice",
                "give the path of one of them, or remove the other",
            )
    placed = {file for files in splits.values() for file in files}
    return SplitFiles(tuple(splits[split]), tuple(file for file in every if file not in placed))


def _patterns(folder: Path, subset: str | None) -> tuple[Path, Mapping[str, list[str]]]:
    """The folder that holds the data files, and for each split the patterns of its files."""
    from datasets.data_files import get_data_patterns, sanitize_patterns

    configs = _configs(folder)
    config: dict[str, Any] = {}
    if configs:
        name = subset or configs.get_default_config_name()
        if name not in configs:
            what = f"no subset {name!r}" if name else "several subsets"
            raise InputError(
                f"data: {str(folder)!r} has {what}",
                nearest(name or "", list(configs)) + f"it has {', '.join(configs)}: name one with subset:",
            )
        config = configs[name]
        folder = folder / str(config.get("data_dir") or "")
    elif subset is not None:
        folder = _subfolder(folder, subset)
    if config.get("data_files"):
        return folder, sanitize_patterns(config["data_files"])
    try:
        return folder, {str(split): one for split, one in get_data_patterns(glob.escape(str(folder))).items()}
    except FileNotFoundError:  # raised for an empty folder
        return folder, {}


def _configs(folder: Path) -> Any:
    """The subsets that a README.md lists in its header, as a `MetadataConfigs`, or an empty mapping."""
    card = folder / "README.md"
    if not card.is_file() or not card.read_bytes().startswith(b"---"):
        return {}
    import yaml
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(card).data)
        return configs if any({"data_files", "data_dir"} & one.keys() for one in configs.values()) else {}
    except (
        ValueError,
        TypeError,
        AttributeError,
        yaml.YAMLError,
    ) as error:  # invalid YAML, or not the expected structure
        raise InputError(f"data: the header of {str(card)!r} cannot be read: {short(error)}", "correct it") from None


def _subfolder(folder: Path, subset: str) -> Path:
    inside = folder / subset
    if inside.is_dir() and inside.resolve() != folder.resolve():
        return inside
    known = sorted(one.name for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
    raise InputError(
        f"data: {str(folder)!r} has no subset {subset!r}: neither a folder of that name nor one that README.md lists",
        nearest(subset, known) + (f"it has {', '.join(known)}" if known else "omit subset:"),
    )


def _resolved(patterns: Iterable[str], base: Path) -> list[Path]:
    """The data files that match, each once, sorted. Raises InputError for a plain name that does not exist."""
    from datasets.data_files import resolve_pattern

    found: set[Path] = set()
    for pattern in patterns:
        try:
            found |= {Path(file) for file in resolve_pattern(pattern, glob.escape(str(base)))}
        except FileNotFoundError:
            if not glob.has_magic(pattern):
                raise InputError(
                    f"data: {str(base)!r} lacks {pattern!r}, which its README.md names", "correct README.md"
                ) from None
    return sorted(file for file in found if file.name.lower().endswith(SUFFIXES) and not ABOUT.match(file.name))
