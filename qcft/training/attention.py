"""Attention row by row: rows that share a pass without padding each attend to themselves alone.

The library's way is one dense mask over the whole pass, a square of its tokens. Row by row is less work, and
what a row comes to no longer depends, to the bit in bf16 on a CPU, on the rows it is packed with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

NAME = "qcft_rows"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # decoders whose layers hand what they are given on to attention


def attend_by_rows(model: PreTrainedModel, longest: int) -> bool:
    """Have a model attend row by row; False, and nothing changed, where it cannot.

    It can for decoders of known families that attend by PyTorch's own kernel, when no row is longer than their
    sliding window. Batches then carry `row_lengths`, a tuple of ints, and no attention mask.
    """
    from transformers import AttentionInterface

    config: Any = model.config
    if config.model_type not in FAMILIES or config._attn_implementation != "sdpa":
        return False
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and longest > window:
        return False
    AttentionInterface.register(NAME, _attention)
    model.set_attn_implementation(NAME)
    return True


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row_lengths: tuple[int, ...] = (),
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each row to itself: (1, heads, tokens, head size) -> (1, tokens, heads, head size)."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    assert attention_mask is None, "rows attended one by one take no mask"
    lengths = list(row_lengths) or [query.shape[2]]
    split = (torch.split(part, lengths, dim=2) for part in (query, key, value))
    rows = [sdpa_attention_forward(module, *row, None, **options)[0] for row in zip(*split, strict=True)]
    return torch.cat(rows, dim=1), None
