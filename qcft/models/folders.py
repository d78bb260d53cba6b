"""A model's folder: which of its files are loaded, and therefore are part of its digest."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from qcft.errors import InputError
from qcft.files import is_whole_safetensors, oddity
from qcft.models.tensors import INDEX, weight_files

WHAT = "a folder, a .gguf file, a hub id OWNER/NAME, or an embedded name"
# The files of a model folder beside its weights that decide what is loaded.
LOADED = (
    "config.json", "generation_config.json", "*.index.json", "adapter_config.json", "qcft_merge.json",
    "*token*.json", "*vocab*.json", "*vocab*.txt", "merges.txt", "tekken.json", "*.model", "*.jinja",
    "chat_template*.json",
)  # fmt: skip
# Other files of whole repositories. They are not read, but have always been part of the digest.
COUNTED = (
    "*processor_config.json", "configuration.json", "params.json", "*_results.json", "trainer_state.json",
    "LICENSE.txt",
)  # fmt: skip


def digested_files(folder: Path) -> list[Path]:
    """The weights, config and tokenizer of a model folder. Raises InputError."""
    if not (folder / "config.json").is_file():
        hint = f"give {WHAT}"
        if (folder / "adapter_config.json").is_file():
            hint = "it is an adapter: give its base as the model, and this folder as the first phase's adapter"
        raise InputError(f"model: the folder {str(folder)!r} holds no model: no config.json", hint)
    weights = _weight_files(folder)
    for file in weights:
        if not is_whole_safetensors(file):
            raise InputError(f"model: {str(file)!r} is truncated or altered", "fetch the model again")
    others = sorted(p for p in folder.iterdir() if any(fnmatchcase(p.name, one) for one in LOADED + COUNTED))
    for file in [*others, *folder.glob("additional_chat_templates/*.jinja")]:  # the tokenizer reads those too
        if not file.is_file():
            raise InputError(
                f"model: {str(file)!r} is {oddity(file) or 'not a file'}", "copy the model again, with regular files"
            )
    return [*weights, *others]


def _weight_files(folder: Path) -> list[Path]:
    """The files that a model folder's weights are loaded from. Raises InputError if one is missing."""
    every = sorted(folder.glob("*.safetensors"))
    if not every:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        raise InputError(
            f"model: the folder {str(folder)!r} holds no safetensors" + (", only pickled weights" if pickled else ""),
            "qcft reads safetensors or GGUF only, never pickle" if pickled else f"give {WHAT}",
        )
    try:
        weights = weight_files(folder)
    except (KeyError, AttributeError, TypeError):
        raise InputError(f"model: {str(folder / INDEX)!r} is not readable", "fetch the model again") from None
    if weights == every and not (folder / INDEX).is_file() and not (folder / "model.safetensors").is_file():
        raise InputError(
            f"model: the folder {str(folder)!r} holds {every[0].name}, but neither model.safetensors nor an index",
            f"fetch the model's {INDEX} too, or, if there is a single weight file, rename it to model.safetensors",
        )
    missing = [file.name for file in weights if not file.is_file()]
    if missing:
        raise InputError(f"model: {str(folder)!r} lacks {missing[0]}", "fetch the model again")
    return weights
