"""Attention row by row: rows that share a pass without padding attend only to themselves.

The library uses one dense mask over the whole pass, the square of its tokens. Row by row is less work, and the output
of a row does not depend on the rows it is packed with (bit for bit, in bf16 on a CPU).

On a card each row is a separate kernel call in every layer. PyTorch has one kernel for all rows; it is used only if
QCFT_VARLEN=1 is set, until runs on a card have shown that both give the same results (tests/gpu/RESULTS.md).
"""

from __future__ import annotations

import os
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from qcft.errors import QcftError
from qcft.private import private

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

NAME = "qcft_rows"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # decoders whose layers pass extra arguments to attention


def attend_by_rows(model: PreTrainedModel, longest: int) -> bool:
    """Make a model attend row by row; False, with the model unchanged, if it cannot.

    This needs a decoder of a known family that uses PyTorch's own attention (sdpa), and rows no longer than its
    sliding window. Batches then carry `row_lengths`, a tuple of ints, and no attention mask.
    """
    from transformers import AttentionInterface

    config: Any = model.config
    if config.model_type not in FAMILIES or config._attn_implementation != "sdpa":
        return False
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and longest > window:
        return False
    AttentionInterface.register(NAME, packed_attention)
    model.set_attn_implementation(NAME)
    return True


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row_lengths: tuple[int, ...] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each row to itself: (1, heads, tokens, head size) -> (1, tokens, heads, head size)."""
    import torch

    assert attention_mask is None, "rows attended one by one take no mask"
    if row_lengths is None:  # packed rows would see each other
        import transformers

        raise QcftError(
            f"transformers {transformers.__version__} does not pass row lengths to attention",
            "install a version that qcft was tested with, or --set model.attn_implementation=eager",
        )
    if len(row_lengths) > 1 and not options.get("dropout") and one_kernel(query.device):
        return by_one_kernel(query, key, value, tuple(row_lengths), options.get("scaling")), None
    attend = private("transformers.integrations.sdpa_attention:sdpa_attention_forward")
    split = (torch.split(part, list(row_lengths), dim=2) for part in (query, key, value))
    rows = [attend(module, *row, None, **options)[0] for row in zip(*split, strict=True)]
    return torch.cat(rows, dim=1), None


def one_kernel(device: torch.device) -> bool:
    """Whether one kernel serves all rows: requested, and supported by the card (compute capability 8.0 or later) and
    torch."""
    import torch

    if (
        os.environ.get("QCFT_VARLEN") != "1"
        or device.type != "cuda"
        or torch.cuda.get_device_capability(device) < (8, 0)
    ):
        return False
    from inspect import signature

    from torch.nn.attention import varlen

    return {"enable_gqa", "num_splits"} <= signature(varlen.varlen_attn).parameters.keys()


def by_one_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], scale: float | None
) -> torch.Tensor:
    """Causal attention of each row to itself: (1, heads, tokens, head size) -> (1, tokens, heads, head size)."""
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = _ends(lengths, query.device), max(lengths)
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    # One split: otherwise the sums of a row would depend on the longest row in the pass.
    out: Any = varlen_attn(
        q, k, v, ends, ends, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=True, num_splits=1
    )
    rows: torch.Tensor = out[None]
    return rows


@lru_cache(maxsize=8)
def _ends(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Where each row begins and the last ends, the same for all layers of a pass."""
    import torch

    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
