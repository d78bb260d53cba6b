"""LoRA adapters: put onto named modules, loaded beside a model, checked when brought from elsewhere."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.errors import InputError, QcftError
from qcft.recipe import Lora

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def add_lora(model: PreTrainedModel, modules: list[str], lora: Lora) -> PeftModel:
    """Put fresh adapters on exactly `modules` (full names) and freeze the rest."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=modules,
        use_rslora=lora.rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    found = {name for name, _ in _lora_layers(adapted)}
    if found != set(modules):
        raise QcftError(f"adapters went onto {len(found)} modules instead of {len(modules)}", "please report this")
    return adapted


def keep_adapters_in_fp32(model: PeftModel) -> None:
    """Hold trained adapters in fp32: in bf16, small optimizer updates round away and never move them."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """A model with a saved adapter live on it, not trainable."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder), is_trainable=False, use_safetensors=True)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The config of an adapter made elsewhere, after checking that qcft can use it. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"adapter: there is no folder {str(folder)!r}", "give the folder of a PEFT adapter")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(
                f"adapter: the folder {str(folder)!r} has no {name}",
                "save it with PEFT's save_pretrained (safetensors; pickled .bin files are not read)",
            )
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with (folder / WEIGHTS).open("rb") as stream:
            size = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(min(size, 1 << 26)))
        end = 8 + size + max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
        whole = end == (folder / WEIGHTS).stat().st_size
    except (ValueError, KeyError, TypeError, struct.error):
        whole = False
    if not whole:
        raise InputError(f"adapter: {str(folder)!r} is truncated or altered", "copy it again")
    check_mergeable(config, str(folder))
    return config


def check_mergeable(config: dict[str, Any], where: str) -> None:
    """Refuse by name what an adapter may hold beyond LoRA on linear layers. Raises InputError."""
    if config.get("peft_type") != "LORA":
        raise InputError(f"adapter: {where!r} is {config.get('peft_type')}, not LORA", "give a LoRA adapter")
    held = {
        "DoRA (use_dora)": config.get("use_dora"),
        "trained biases (bias)": config.get("bias", "none") != "none" or config.get("lora_bias"),
        "whole modules (modules_to_save)": config.get("modules_to_save"),
        "patterns of ranks (rank_pattern)": config.get("rank_pattern"),
        "patterns of alphas (alpha_pattern)": config.get("alpha_pattern"),
        "trained tokens (trainable_token_indices)": config.get("trainable_token_indices"),
        "layer replication (layer_replication)": config.get("layer_replication"),
        "transposed weights (fan_in_fan_out)": config.get("fan_in_fan_out"),
        "adapted parameters (target_parameters)": config.get("target_parameters"),
    }
    for what, present in held.items():
        if present:
            raise InputError(f"adapter: {where!r} holds {what}, which qcft cannot merge", "merge it with PEFT first")


def _lora_layers(model: PeftModel) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    prefix = "base_model.model."
    return [
        (name.removeprefix(prefix), module) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    ]
