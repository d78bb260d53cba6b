"""The names of a model's weights: in memory and in the files they are loaded from.

Multimodal wrappers and some older families are stored under names that differ from those of their modules. The table
is the one that transformers uses for loading (`transformers.conversion_mapping`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.models.tensors import stored_weights
from qcft.private import of, private

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TIED = "transformers:PreTrainedModel.all_tied_weights_keys"


def stored_names(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """The stored name of every weight that is one tensor in the folder's files, by its name in the model.

    Weights that loading joins from several tensors, or splits from one, are not included.
    """
    rename_source_key = private("transformers.core_model_loading:rename_source_key")
    live: Any = model.state_dict()
    renamings, converters = _conversions(model)
    names: dict[str, str] = {}
    for stored in sorted(stored_weights(folder)):
        name, converter = rename_source_key(stored, renamings, converters, model.base_model_prefix, live)
        if converter is None:
            names[name] = stored
    return names


def missing_weights(model: PreTrainedModel, folder: Path) -> list[str]:
    """The parameters of a model that are not in a folder's files, which loading would initialise at random.

    Of tied weights one is enough. Not checked here: weights that are joined from several tensors, and those that the
    model's class declares optional.
    """
    found = set(stored_names(model, folder))
    tied = of(model, TIED) or {}
    found |= {name for pair in tied.items() if found & set(pair) for name in pair}
    optional = [re.compile(one) for one in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    converted = {target for converter in _conversions(model)[1] for target in converter.target_patterns}
    return [
        name
        for name, _ in model.named_parameters()
        if name not in found
        and not any(one.search(name) for one in optional)
        and not any(target in name for target in converted)
    ]


def _conversions(model: PreTrainedModel) -> tuple[list[Any], list[Any]]:
    """transformers' renamings of stored weights, and its conversions of several tensors into others."""
    renaming, converter = (
        private(f"transformers.core_model_loading:Weight{kind}") for kind in ("Renaming", "Converter")
    )
    table = private("transformers.conversion_mapping:get_model_conversion_mapping")(model)
    return [one for one in table if isinstance(one, renaming)], [one for one in table if isinstance(one, converter)]
