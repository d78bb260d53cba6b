"""An adapter's files and its config: the keys that qcft merges, ignores and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qcft.errors import InputError
from qcft.files import exists, is_whole_safetensors, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's prefix for the names of the model it wraps


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The config of an external adapter, after checking that qcft can use it. Raises InputError."""
    if not exists(folder) or not folder.is_dir():
        raise InputError(f"adapter: there is no folder {str(folder)!r}", "give the folder of a PEFT adapter")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(
                f"adapter: the folder {str(folder)!r} has no {name}",
                "save it with PEFT's save_pretrained (safetensors; pickled .bin files are not read)",
            )
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not is_whole_safetensors(folder / WEIGHTS):
        raise InputError(f"adapter: {str(folder)!r} is truncated or altered", "copy it again")
    check_mergeable(config, str(folder))
    return config


# Keys of PEFT's LoraConfig that qcft merges correctly, or that have no effect in a finished adapter. Any other key that
# is set is refused by name: a key of a later PEFT must not be ignored silently.
MERGED = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias", "lora_bias",
    "modules_to_save", "use_dora",
}  # fmt: skip


WITHOUT_EFFECT = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "init_lora_weights",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core",
    "runtime_config", "qalora_group_size",
}  # fmt: skip


REFUSED = {
    "trainable_token_indices": "trained tokens",
    "layer_replication": "layer replication",
    "target_parameters": "adapted parameters",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "megatron_config": "layers of Megatron",  # PEFT imports the module that megatron_core names
    "ensure_weight_tying": "adapters tied to one another",
}


def check_mergeable(config: dict[str, Any], where: str) -> None:
    """Refuse, by name, parts of an adapter that qcft does not merge correctly. Raises InputError."""
    if config.get("peft_type") != "LORA":
        raise InputError(f"adapter: {where!r} is {config.get('peft_type')}, not LORA", "give a LoRA adapter")
    if config.get("init_lora_weights", True) not in (True, False, None, "gaussian", "orthogonal", "eva"):
        raise InputError(
            f"adapter: {where!r} was initialised with {config['init_lora_weights']}, which changes the base weights",
            "convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) first",
        )
    for key, value in config.items():
        if value and key not in MERGED and key not in WITHOUT_EFFECT:
            what = f"{REFUSED[key]} ({key})" if key in REFUSED else key if key.isidentifier() else repr(key)
            raise InputError(f"adapter: {where!r} holds {what}, which qcft cannot merge", "merge it with PEFT first")
