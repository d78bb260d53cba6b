"""A model's modules without their weights: enough to see its layers and shapes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qcft.errors import InputError
from qcft.recipe import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        with torch.device("meta"):
            attention = model.attn_implementation
            options = {"attn_implementation": attention} if attention else {}
            built: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise InputError(
            f"model: {model.name!r} cannot be built: {' '.join(str(error).split())[:160]}",
            "give a decoder-only language model; look at model.attn_implementation and model.trust_remote_code",
        ) from None
    return built
