"""Finding the model that a name means, its digest, and the folder of its 16-bit weights."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from qcft.cache import cache_folder, cached_folder
from qcft.errors import ChangedInput, InputError, QcftError, nearest, short
from qcft.events import Watch
from qcft.files import (
    SEAL,
    SeenFile,
    exists,
    file_digest,
    is_whole_safetensors,
    known_digest,
    oddity,
    read_sealed,
    write_sealed,
    write_text,
)
from qcft.hub import OFFLINE, check_download, retried, unreachable
from qcft.models.embedded import EMBEDDED, fetch_embedded
from qcft.models.folders import WHAT, digested_files
from qcft.models.gguf_header import check_lengths
from qcft.recipe import Model

CONVERTED = 1  # raised when the conversion from GGUF changes
FETCHED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]
IGNORED = ["*/*", "consolidated*"]  # other layouts of the same weights, which some repositories have


@dataclass(frozen=True)
class ModelSource:
    """A model that was found. `digest` changes when its weights or tokenizer do; `files`: the files it was computed
    from, where others may change them: those of a folder, or the GGUF file."""

    name: str
    kind: Literal["embedded", "gguf", "folder", "hub"]
    location: str
    digest: str
    files: tuple[SeenFile, ...] = field(default=(), repr=False, compare=False)


def resolve(model: Model) -> ModelSource:
    """Find the model that a name means, without loading weights. Raises InputError."""
    name = model.name
    if name in EMBEDDED:
        return ModelSource(name, "embedded", name, f"gguf:{EMBEDDED[name].file_sha256}:{CONVERTED}")
    path = Path(os.path.expanduser(name))
    there = exists(path)
    if there and path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(f"model: {name!r} is a file but not a .gguf file", f"give {WHAT}")
        check_gguf(path)
        seen = SeenFile(path.resolve(), known_digest(path))
        return ModelSource(name, "gguf", str(seen.path), f"gguf:{seen.digest}:{CONVERTED}", (seen,))
    if there and path.is_dir():
        files = tuple(SeenFile(file, known_digest(file)) for file in digested_files(path.resolve()))
        return ModelSource(name, "folder", str(path.resolve()), _folder_digest(files), files)
    if (odd := oddity(path)) is not None:
        raise InputError(f"model: {name!r} is {odd}", f"give {WHAT}")
    if name.lower().endswith(".gguf") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"model: there is no file or folder {name!r}", f"give {WHAT}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return ModelSource(name, "hub", name, f"hub:{name}@{pin_hub(name, model.revision)}")
    raise InputError(
        f"model: {name!r} is not an embedded model, a file or a folder",
        nearest(name, list(EMBEDDED))
        + f"embedded: {', '.join(EMBEDDED)}; or give a folder, a .gguf file or OWNER/NAME",
    )


def weights_folder(source: ModelSource, watch: Watch) -> Path:
    """The folder with the model's safetensors, config and tokenizer; fetched or converted if necessary."""
    if source.kind == "folder":
        return Path(source.location)
    if source.kind == "hub":
        return _fetch_hub(source, watch)
    name = _converted(source).relative_to(cache_folder()).as_posix()
    return cached_folder(name, _from_gguf(source, watch, lambda file, folder: _convert(file, folder, watch)), watch)


def described_folder(source: ModelSource, watch: Watch) -> Path:
    """A folder with the model's config and tokenizer, possibly without weights: none are fetched or converted."""
    if source.kind == "hub":
        return _fetch_description(source, watch)
    if source.kind == "folder":
        return Path(source.location)
    converted = _converted(source)
    if (converted / SEAL).is_file():
        return converted
    return cached_folder(f"described/{converted.name}", _from_gguf(source, watch, _describe))


def _from_gguf(source: ModelSource, watch: Watch, make: Callable[[Path, Path], None]) -> Callable[[Path], None]:
    """The function that fills a cache folder by `make(GGUF file, folder)`. It raises ChangedInput if the file has
    changed since its digest was computed, as the cache is keyed by that digest."""
    file = fetch_embedded(source.location, watch) if source.kind == "embedded" else Path(source.location)

    def check() -> None:
        for seen in source.files:
            if file_digest(seen.path) != seen.digest:
                raise ChangedInput(
                    f"model: {str(seen.path)!r} changed while it was in use",
                    "run the same command again to start from the file as it is now",
                )

    def fill(folder: Path) -> None:
        check()
        make(file, folder)
        check()

    return fill


def _converted(source: ModelSource) -> Path:
    """The cache folder of the converted GGUF file."""
    return cache_folder() / "converted" / f"{source.digest.split(':')[1][:20]}-v{CONVERTED}"


def check_gguf(path: Path) -> None:
    """Read a GGUF file's header and check that all tensors it lists are in the file. Raises InputError."""
    from gguf import GGUFReader

    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InputError(f"model: {str(path)!r} is not a GGUF file: it does not begin with GGUF", f"give {WHAT}")
    try:
        check_lengths(path)
        reader = GGUFReader(path)
        end = max(int(t.data_offset) + int(t.n_bytes) for t in reader.tensors)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, TypeError, struct.error, OSError) as error:
        raise InputError(
            f"model: {str(path)!r} is truncated or altered ({short(error, 80)})", "fetch it again"
        ) from None
    if end > path.stat().st_size:
        missing = end - path.stat().st_size
        raise InputError(f"model: {str(path)!r} is truncated: {missing} bytes are missing at the end", "fetch it again")


def _convert(file: Path, folder: Path, watch: Watch) -> None:
    """Dequantise a GGUF file to bf16 safetensors, with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    watch.note(f"converting {file.name} to 16 bit (only once)")
    check_gguf(file)
    if _scales_rotary(file):
        watch.note(
            f"{file.name}: transformers does not read how it scales its rotary embeddings, so the converted model "
            "differs from the original; use its safetensors folder",
            "warning",
        )
    place, name = str(file.parent), file.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(
            place, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    except Exception as error:
        raise _unreadable(file, "converted", error) from None
    for tensor_name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"model: {file.name!r} is altered: {tensor_name} is not finite", "fetch it again")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _scales_rotary(file: Path) -> bool:
    """Whether a GGUF file has rotary embeddings that are scaled: Llama 3's factors, linear scaling or YaRN."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    return any(one.name == "rope_freqs.weight" for one in reader.tensors) or any(
        key.endswith(".rope.scaling.type") and field.contents() != "none" for key, field in reader.fields.items()
    )


def _unreadable(file: Path, what: str, error: Exception) -> InputError:
    """The error for a file that a library cannot read: an odd header may fail anywhere in the libraries' code."""
    return InputError(
        f"model: {file.name!r} cannot be {what}: {short(error)}",
        "fetch it again, or use the model's safetensors folder",
    )


def _describe(file: Path, folder: Path) -> None:
    """Write the config and the tokenizer that are in a GGUF file's header."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        described = [one.from_pretrained(str(file.parent), gguf_file=file.name) for one in (AutoConfig, AutoTokenizer)]
    except Exception as error:
        raise _unreadable(file, "read", error) from None
    for one in described:
        one.save_pretrained(folder)


def _folder_digest(files: Sequence[SeenFile]) -> str:
    """A digest over the weights, config and tokenizer of a model folder."""
    import hashlib

    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.path.name} {file.digest}\n".encode())
    return f"folder:{total.hexdigest()}"


def pin_hub(name: str, revision: str | None, what: str = "model", offline: str = OFFLINE) -> str:
    """The commit of a hub id, from the hub or, when it cannot be reached, from the cache. Raises InputError."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    known = _hub_note(name, revision or "main")
    commit: str | None
    try:
        commit = HfApi().model_info(name, revision=revision, timeout=10).sha
        known.parent.mkdir(parents=True, exist_ok=True)
        write_text(known, f"{commit}\n")
    except Exception as error:  # whatever the hub's HTTP client raises; `unreachable` distinguishes them
        commit = known.read_text(encoding="utf-8").strip() if known.is_file() else revision
        config = try_to_load_from_cache(name, "config.json", revision=commit)
        if not isinstance(config, str):
            raise unreachable(what, name, error, offline) from None
        commit = Path(config).parent.name  # of a branch that was not fetched by qcft, for example by `hf download`
    return str(commit)


def hub_sizes(name: str, commit: str | None) -> dict[str, int | None]:
    """The bytes of each file of a hub model that qcft fetches."""
    from huggingface_hub import HfApi

    siblings = HfApi().model_info(name, revision=commit, timeout=10, files_metadata=True).siblings or []
    return {one.rfilename: one.size for one in siblings if _is_fetched(one.rfilename)}


def is_cached(name: str, *files: str) -> bool:
    """Whether the hub's cache holds these files of a hub id, without asking the hub."""
    from huggingface_hub import try_to_load_from_cache

    known = _hub_note(name, "main")
    commit = known.read_text(encoding="utf-8").strip() if known.is_file() else None
    return all(isinstance(try_to_load_from_cache(name, file, revision=commit), str) for file in files)


def has_weights(source: ModelSource) -> bool:
    """Whether a model's 16-bit weights are on this disk already; their bytes are not checked."""
    if source.kind == "folder":
        return True
    if source.kind == "hub":
        return any(_snapshot(source.location, source.digest.rsplit("@", 1)[1]).glob("*.safetensors"))
    return (_converted(source) / SEAL).is_file()


def _fetch_hub(source: ModelSource, watch: Watch) -> Path:
    """The folder of a hub model in the hub's own cache, with all files complete.

    Their digests are stored once they are fetched, and checked before each use: the hub's library uses its cache
    unchecked, even an incomplete model when the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    name, commit = source.location, source.digest.rsplit("@", 1)[1]
    note = _hub_note(name, f"{commit}.files")
    folder = _snapshot(name, commit)
    known = read_sealed(note)
    if known is not None:
        altered = [f for f, one in known.items() if not (folder / f).is_file() or file_digest(folder / f) != one]
        if not altered:
            return folder
        watch.note(f"{name}: {altered[0]} in the hub's cache is missing or altered; it is fetched again", "warning")
        _forget(folder, altered)

    def fetch() -> list[str]:
        sizes = hub_sizes(name, commit)
        files = sorted(sizes)
        check_download("model", name, (size for file, size in sizes.items() if not (folder / file).is_file()), watch)
        snapshot_download(name, revision=commit, allow_patterns=FETCHED, ignore_patterns=IGNORED)
        if broken := [f for f in files if not (folder / f).is_file() or _is_cut(folder / f)]:
            _forget(folder, broken)
            raise ConnectionError(f"{broken[0]} was not downloaded completely")
        return files

    try:
        files = retried(fetch, "model", source.name, watch)
    except QcftError:
        if known is not None or not _is_model(folder):
            raise
        files = sorted(p.name for p in folder.iterdir() if _is_fetched(p.name))  # not fetched by qcft, but complete
    if not any(file.endswith(".safetensors") for file in files):
        raise InputError(
            f"model: {source.name!r} has no safetensors on the hub", "qcft reads safetensors or GGUF only, never pickle"
        )
    note.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(note, {file: file_digest(folder / file) for file in files})
    return folder


def _fetch_description(source: ModelSource, watch: Watch) -> Path:
    """The folder of a hub model in the hub's own cache, with or without its weights."""
    from huggingface_hub import snapshot_download

    name, commit = source.location, source.digest.rsplit("@", 1)[1]
    small = [pattern for pattern in FETCHED if pattern != "*.safetensors"]

    def fetch() -> str:
        if not (_snapshot(name, commit) / "config.json").is_file():
            sizes = hub_sizes(name, commit)
            wanted = (size for file, size in sizes.items() if not file.endswith(".safetensors"))
            check_download("model", name, wanted, watch)
        return str(snapshot_download(name, revision=commit, allow_patterns=small, ignore_patterns=IGNORED))

    return Path(retried(fetch, "model", name, watch))


def _hub_note(name: str, what: str) -> Path:
    """The cache file with what is known about a hub model."""
    return cache_folder() / "hub" / f"{name}@{what}".replace("/", "--")


def _snapshot(name: str, commit: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots" / commit


def _is_fetched(file: str) -> bool:
    return any(fnmatch(file, p) for p in FETCHED) and not any(fnmatch(file, p) for p in IGNORED)


def _is_model(folder: Path) -> bool:
    try:
        return bool(digested_files(folder))
    except InputError:
        return False


def _is_cut(file: Path) -> bool:
    return file.suffix == ".safetensors" and not is_whole_safetensors(file)


def _forget(folder: Path, files: list[str]) -> None:
    """Remove files from the hub's cache, with the blobs they link to."""
    for file in files:
        (folder / file).resolve().unlink(missing_ok=True)
        (folder / file).unlink(missing_ok=True)
