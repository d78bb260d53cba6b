"""Check that a model's folder is unchanged since a run began: results are stored under the digest it had then."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qcft.errors import ChangedInput, InputError
from qcft.files import file_digest, known_digest
from qcft.models.folders import digested_files
from qcft.models.sources import ModelSource


class Inputs:
    """The files of models, with the digests they had when the run began."""

    def __init__(self, sources: Iterable[ModelSource | None]) -> None:
        # A GGUF file is not read again once it is converted.
        folders = (source for source in sources if source is not None and source.kind == "folder")
        self._files = {file.path: file.digest for source in folders for file in source.files}

    def check(self, thorough: bool = False) -> None:
        """Compare the files with their earlier state: by size and times, and by digest where those differ or if
        `thorough`. Raises ChangedInput."""
        digest = file_digest if thorough else known_digest
        for path, before in self._files.items():
            try:
                same = digest(path) == before
            except OSError:
                same = False
            if not same:
                raise _changed(path)
        for folder in dict.fromkeys(path.parent for path in self._files):
            known = {path for path in self._files if path.parent == folder}
            try:
                new = set(digested_files(folder)) - known
            except InputError:
                new = {folder}
            if new:
                raise _changed(min(new))


def _changed(path: Path) -> ChangedInput:
    return ChangedInput(
        f"model: {str(path)!r} changed while it was in use",
        "unfinished results are discarded; run the same command again to start from the model as it is now",
    )
