"""A model's modules without their weights: enough to see its layers and shapes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qcft.errors import InputError, short
from qcft.recipe import Model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# More than any model has. Without weights, too, layers and tokens are gone through and adapters are made.
MOST = {"num_hidden_layers": 1000, "vocab_size": 10_000_000, "hidden_size": 1_000_000, "intermediate_size": 10_000_000}


def model_without_weights(folder: Path, model: Model) -> PreTrainedModel:
    """The model of a folder on the meta device. Raises InputError when it cannot be built, or is quantised already."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = model.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        if getattr(config, "quantization_config", None):
            raise InputError(
                f"model: {model.name!r} is quantised already",
                "give its 16-bit weights: phase 1 is merged onto them, and qcft quantises them itself",
            )
        check_sizes(config, model.name)
        with torch.device("meta"):
            attention = model.attn_implementation
            options = {"attn_implementation": attention} if attention else {}
            built: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust, **options)
    except InputError:
        raise
    except Exception as error:  # a config with anything in it fails anywhere in the model's code
        raise InputError(
            f"model: {model.name!r} cannot be built: {short(error)}",
            "give a decoder-only language model; look at its config.json, model.attn_implementation and "
            "model.trust_remote_code",
        ) from None
    return built


def check_sizes(config: PreTrainedConfig, name: str) -> None:
    """Raise InputError where a config announces a size that no model has."""
    for key, most in MOST.items():
        size = getattr(config.get_text_config(), key, 0)
        if isinstance(size, int) and size > most:
            raise InputError(f"model: {name!r} has a {key} of {size:,} in its config", f"at most {most:,} can be")
