"""Several LoRA adapters as one, with their factors concatenated, so that the sum of their deltas is exact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qcft.errors import InputError
from qcft.files import read_json, write_json
from qcft.models.adapter_config import CONFIG, PREFIX, WEIGHTS
from qcft.models.adapters import lora_factors
from qcft.models.deltas import Scale, check_stack, read_adapter


def write_adapter(stack: Sequence[Path], to: Path, base: str, scale: Scale = 1.0) -> None:
    """Write a stack of adapters as one PEFT adapter for the model `base`, `scale` times the delta of the top one.

    One adapter is copied unmodified, unless it is scaled. Several are joined: A = [A1; A2], B = [s1 B1, s2 B2], so that
    B A is the sum of the deltas; the ranks add up for each module. Raises InputError for what cannot be stacked.
    """
    if len(stack) == 1 and scale == 1:
        config = {**read_json(stack[0] / CONFIG), "base_model_name_or_path": base}
        write_json(to / CONFIG, config)
        (to / WEIGHTS).write_bytes((stack[0] / WEIGHTS).read_bytes())
        return
    import torch
    from safetensors.torch import save_file

    hint = "export the whole model: omit --adapter-only"
    check_stack([read_adapter(folder) for folder in stack], hint)
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for folder in stack:
        for weight, a, b, factor in lora_factors(folder, scale if folder == stack[-1] else 1.0, hint):
            parts.setdefault(weight.removesuffix(".weight"), []).append((a.float(), factor * b.float()))
    if not parts:
        raise InputError("adapter: the stack is empty", "export the whole model")
    tensors = {}
    for module, factors in parts.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.cat([a for a, _ in factors]).contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.cat([b for _, b in factors], dim=1).contiguous()
    ranks = {module: sum(len(a) for a, _ in factors) for module, factors in parts.items()}
    usual = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    save_file(tensors, to / WEIGHTS, metadata={"format": "pt"})
    write_json(
        to / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": usual,
            "lora_alpha": usual,  # the scales are in the factors
            "rank_pattern": others,
            "alpha_pattern": others,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(parts),
        },
    )
