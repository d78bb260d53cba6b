"""`lora.peft`: the fields of PEFT's LoraConfig that qcft passes on, those it sets itself, those it refuses and why."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from qcft.recipe.parts import Count, Name, Number, Part, instead

# Fields that qcft sets itself, and the recipe key that stands for each.
OWNED = {
    "r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "use_rslora": "lora.rslora",
    "target_modules": "lora.targets",
    "exclude_modules": "lora.targets",
    "target_parameters": "lora.targets",
    "layers_to_transform": "freeze of each phase",
    "layers_pattern": "freeze of each phase",
    "base_model_name_or_path": "model.name",
    "revision": "model.revision",
    "runtime_config": "omit it: adapters stay where the weights are",
    "inference_mode": "omit it: a phase's adapter trains, those under it do not",
    "fan_in_fan_out": "omit it: qcft adapts linear modules",
    "task_type": "omit it: qcft trains causal language models",
    "peft_type": "omit it: qcft trains LoRA",
    "peft_version": "omit it: PEFT writes its own",
    "auto_mapping": "omit it: PEFT finds the model's class itself",
}

# Fields that qcft cannot use, and why.
REFUSED = {
    "bias": "trained biases stay in the model when the adapter is switched off",
    "modules_to_save": "qcft trains adapters, not whole modules",
    "trainable_token_indices": "qcft cannot merge trained tokens",
    "ensure_weight_tying": "qcft cannot merge adapters that are tied to one another",
    "layer_replication": "qcft cannot merge replicated layers",
    "alora_invocation_tokens": "activated LoRA cannot be merged",
    "arrow_config": "an adapter that routes between others cannot be merged",
    "use_bdlora": "qcft cannot merge block-diagonal LoRA",
    "use_qalora": "PEFT has QALoRA for weights quantised by GPTQ only",
    "qalora_group_size": "PEFT has QALoRA for weights quantised by GPTQ only",
    "velora_config": "PEFT does not train VeLoRA on 4-bit weights",
    "kasa_config": "KaSA changes the weights under the adapter",
    "monteclora_config": "qcft cannot merge the samples of MonteCLoRA",
    "megatron_config": "qcft trains models of transformers, not of Megatron",
    "megatron_core": "qcft trains models of transformers, not of Megatron",
    "loftq_config": "LoftQ changes the weights under the adapter, which are in 4 bits already",
    "eva_config": "EVA starts from activations that qcft does not collect",
    "corda_config": "CorDA changes the weights under the adapter",
    "lora_ga_config": "LoRA-GA changes the weights under the adapter",
}

CHANGES_WEIGHTS = "changes the weights under the adapter, which phases are merged onto and which are in 4 bits"
BEGINNINGS = {
    "pissa": CHANGES_WEIGHTS,
    "olora": CHANGES_WEIGHTS,
    "corda": CHANGES_WEIGHTS,
    "loftq": CHANGES_WEIGHTS,
    "lora_ga": CHANGES_WEIGHTS,
    "eva": "starts from activations that qcft does not collect",
    "orthogonal": "fails in PEFT on 4-bit weights",
    "mica": "leaves half of the adapter untrained, which qcft treats as an error",
}


def _beginning(value: Any) -> Any:
    hint = "omit it for PEFT's default (the adapter changes nothing at first), or use gaussian"
    if value is False:
        raise ValueError(f"false starts from a random change of the model | {hint}")
    if value is True or value == "gaussian":
        return value
    kind = str(value).lower().partition("_niter_")[0]
    raise ValueError(f"{value!r} {BEGINNINGS.get(kind, 'is not a known way to initialize an adapter')} | {hint}")


def _pattern(value: Any) -> Any:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"{value!r} is not a pattern: {error} | name modules, such as q_proj or layers.0.*"
            ) from None
    return value


Pattern = Annotated[Name, BeforeValidator(_pattern)]


class Peft(Part):
    """Fields of PEFT's LoraConfig, under their own names.

    `use_dora`: a trained magnitude for each output beside the two factors (arXiv 2402.09353). `lora_bias`: a bias
    beside factor B. `init_lora_weights`: how factor A is initialized (B is 0). `rank_pattern`, `alpha_pattern`: rank
    and alpha of the modules whose names end in a pattern.

    Other fields are refused: for a field that qcft does not know, it cannot check that a merge contains everything
    that was trained.
    """

    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: Annotated[Literal[True, "gaussian"], BeforeValidator(_beginning)] = True
    rank_pattern: dict[Pattern, Annotated[Count, Field(ge=1)]] = {}
    alpha_pattern: dict[Pattern, Annotated[Number, Field(gt=0)]] = {}

    @model_validator(mode="before")
    @classmethod
    def _not_owned(cls, value: Any) -> Any:
        for key in value if isinstance(value, dict) else ():
            if key in OWNED:
                raise ValueError(f"{key} is set by qcft itself | {instead(OWNED[key])}")
            if key in REFUSED:
                raise ValueError(f"{key}: {REFUSED[key]} | omit lora.peft.{key}")
        return value

    @field_validator("lora_bias")
    @classmethod
    def _one_kind(cls, value: bool, info: Any) -> bool:
        if value and info.data.get("use_dora"):
            raise ValueError("PEFT has no lora_bias for DoRA | omit one of them")
        return value

    @property
    def beyond_factors(self) -> str | None:
        """The field that makes a delta more than s B A, so that it cannot be scaled or stacked; None if not set."""
        return next((name for name in ("use_dora", "lora_bias") if getattr(self, name)), None)

    def given(self) -> dict[str, Any] | None:
        """The fields that differ from PEFT's defaults; None if there are none."""
        return self.model_dump(exclude_defaults=True) or None
