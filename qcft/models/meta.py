"""A model's modules without weights, for its layers and shapes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.errors import InputError, short
from qcft.private import private
from qcft.recipe import Model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# More than any model has: even without weights, qcft loops over layers and tokens and creates adapters.
MOST = {"num_hidden_layers": 1000, "vocab_size": 10_000_000, "hidden_size": 1_000_000, "intermediate_size": 10_000_000}


def read_config(folder: Path, model: Model) -> PreTrainedConfig:
    """A model folder's config, without a padding token that its embedding has no row for: some checkpoints have -1 or
    a number beyond the vocabulary. The tokenizer decides on padding."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    for part in (config, config.get_text_config()):
        pad = getattr(part, "pad_token_id", None)
        if pad is not None and not (isinstance(pad, int) and 0 <= pad < getattr(part, "vocab_size", pad + 1)):
            part.pad_token_id = None
    return config


def auto_class(config: PreTrainedConfig) -> Any:
    """The class that builds and loads a model: AutoModelForCausalLM or, for wrappers that it does not support,
    AutoModelForImageTextToText, whose text part is a language model."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    known = type(config) in private("transformers:AutoModelForCausalLM._model_mapping") or "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    )
    if not known and type(config) in private("transformers:AutoModelForImageTextToText._model_mapping"):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def model_without_weights(folder: Path, model: Model) -> PreTrainedModel:
    """The model of a folder on the meta device. Raises InputError if it cannot be built, or is quantised already."""
    import torch

    trust = model.trust_remote_code
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"model: {model.name!r} holds an adapter beside its weights (adapter_config.json), which would be loaded "
            "with the model without notice",
            "move the adapter's two files to a folder of their own; to use it, name that folder as the first phase's "
            "adapter",
        )
    try:
        config = read_config(folder, model)
        if getattr(config, "quantization_config", None):
            raise InputError(
                f"model: {model.name!r} is quantised already",
                "give its 16-bit weights: phase 1 is merged onto them, and qcft does the quantisation",
            )
        check_sizes(config, model.name)
        with torch.device("meta"):
            attention = model.attn_implementation
            options = {"attn_implementation": attention} if attention else {}
            built: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=trust, **options)
    except InputError:
        raise
    except Exception as error:  # a bad config may fail anywhere in the model's code
        raise InputError(
            f"model: {model.name!r} cannot be built: {short(error)}",
            "give a decoder-only language model; check its config.json, model.attn_implementation and "
            "model.trust_remote_code",
        ) from None
    return built


def check_sizes(config: PreTrainedConfig, name: str) -> None:
    """Raise InputError if a config has a size that no model has."""
    for key, most in MOST.items():
        size = getattr(config.get_text_config(), key, 0)
        if isinstance(size, int) and size > most:
            raise InputError(f"model: {name!r} has a {key} of {size:,} in its config", f"qcft accepts at most {most:,}")
