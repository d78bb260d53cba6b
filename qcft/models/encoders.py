"""Sentence encoders: finding the one that a name means, its digest, and encoding texts as vectors."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qcft.errors import InputError, QcftError
from qcft.files import file_digest
from qcft.hub import check_download, unreachable
from qcft.models.load import device
from qcft.models.sources import hub_sizes, is_cached, pin_hub
from qcft.models.tensors import stored_weights

if TYPE_CHECKING:
    import numpy as np

LABSE = "sentence-transformers/LaBSE"  # the paper's
OFFLINE = "offline, give --encoder a folder: a sentence-transformers model, or a static encoder in model2vec's format"
PACKAGES = {"sentence_transformers": "sentence-transformers", "model2vec": "model2vec"}

Encode = Callable[[Sequence[str]], "np.ndarray"]  # texts -> float32 of shape (texts, width)


@dataclass(frozen=True)
class EncoderSource:
    """An encoder that was found. `digest` changes when its files do."""

    name: str
    package: Literal["sentence_transformers", "model2vec"]
    location: str
    revision: str | None
    digest: str


def find_encoder(name: str = LABSE) -> EncoderSource:
    """Find the encoder that a name means, a folder or a hub id, without loading it. Raises InputError."""
    path = Path(os.path.expanduser(name))
    if name and path.is_dir():
        return _in_folder(path)
    if name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(
            f"encoder: {name!r} is neither a folder nor a hub id", f"give a folder, or OWNER/NAME such as {LABSE}"
        )
    _installed("sentence_transformers")
    commit = pin_hub(name, None, "encoder", OFFLINE)
    return EncoderSource(name, "sentence_transformers", name, commit, f"hub:{name}@{commit}")


def is_here(name: str) -> bool:
    """Whether an encoder from the hub can be loaded without fetching anything."""
    return find_spec("sentence_transformers") is not None and is_cached(name, "modules.json", "model.safetensors")


def load_encoder(source: EncoderSource) -> Encode:
    """Load an encoder. Its library truncates texts that are too long for it."""
    if source.package == "model2vec":
        from model2vec import StaticModel

        static: Any = StaticModel.from_pretrained(source.location)
        return lambda texts: static.encode(list(texts), use_multiprocessing=False)
    from sentence_transformers import SentenceTransformer

    try:
        if source.revision is not None and not is_cached(source.location, "modules.json"):
            check_download("encoder", source.name, hub_sizes(source.location, source.revision).values())
        model = SentenceTransformer(
            source.location, revision=source.revision, device=device(), model_kwargs={"use_safetensors": True}
        )
    except QcftError:
        raise
    except Exception as error:  # whatever the hub's HTTP client raises; `unreachable` distinguishes them
        raise unreachable("encoder", source.name, error, OFFLINE) from None
    return lambda texts: model.encode(list(texts), batch_size=64, show_progress_bar=False, convert_to_numpy=True)


def _in_folder(path: Path) -> EncoderSource:
    files = sorted(
        p
        for p in path.rglob("*")
        if p.is_file() and (p.suffix in {".json", ".safetensors", ".model"} or p.name in {"vocab.txt", "merges.txt"})
    )
    package: Literal["sentence_transformers", "model2vec"]
    if (path / "modules.json").is_file():
        package = "sentence_transformers"
    elif (path / "tokenizer.json").is_file() and "embeddings" in stored_weights(path):
        package = "model2vec"
    else:
        raise InputError(
            f"encoder: the folder {str(path)!r} holds neither a sentence-transformers model (modules.json) nor a "
            "static encoder (tokenizer.json, model.safetensors with its embeddings)",
            f"give another folder, or OWNER/NAME such as {LABSE}",
        )
    _installed(package)
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(path).as_posix()} {file_digest(file)}\n".encode())
    return EncoderSource(path.name, package, str(path.resolve()), None, f"folder:{total.hexdigest()}")


def _installed(package: str) -> None:
    if find_spec(package) is None:
        raise InputError(f"encoder: {PACKAGES[package]} is not installed", 'pip install "qcft[similarity]"')
