"""The memory of steps that answer prompts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from qcft.data.encode import Encoder
from qcft.data.rows import Row
from qcft.measure.score import BATCH_TOKENS
from qcft.prepare.groups import Group
from qcft.prepare.model import PreparedModel
from qcft.replay.generation import LARGEST, Answering
from qcft.steps.step import Bench

TOGETHER = 16  # prompts that a measured model answers at once
LOOKED_AT = 64  # prompts of a pool that represent the lengths of all
ROOM = 0.9  # share of the free memory to fill


def answers_held(
    bench: Bench, quantize: str, prompts: Sequence[tuple[Group, Row]], max_new_tokens: int
) -> dict[str, int]:
    """Bytes by part while a model is measured: the model, the logits of a batch, the KV cache of the answers."""
    model = bench.model.meta_model
    config: Any = model.config.get_text_config()
    longest = max((len(bench.rows.group_encoder(group).prompt_ids(row)) for group, row in prompts), default=0)
    answers = min(TOGETHER, len(prompts)) * (longest + max_new_tokens)
    logits = BATCH_TOKENS * config.vocab_size * (2 + 4)  # in 16 bits, and in fp32 to be scored
    return {**model_held(bench.model, quantize), "logits": int(logits), "cache": _cache(model) * answers}


def model_held(model: PreparedModel, quantize: str) -> dict[str, int]:
    """Bytes of a loaded model by part."""
    from qcft.models.size import weight_bytes

    weights = weight_bytes(model.meta_model, quantize)
    return {
        "weights": weights.packed,
        "constants": weights.constants,
        "halves": weights.linear + weights.embeddings + weights.other,
    }


def answered_at_once(
    model: PreparedModel, quantize: str, encoder: Encoder, rows: Sequence[Row], how: Answering, free: int
) -> tuple[int, int]:
    """How many prompts are answered at once, if `batch` is auto as many as fit into `free` bytes beside the model; and
    the bytes that each needs."""
    first = islice(rows, LOOKED_AT)
    lengths = [len(prompt) for prompt in map(encoder.prompt, first) if not isinstance(prompt, str)]  # else refused
    each = _cache(model.meta_model) * (max(lengths, default=0) + how.max_new_tokens)
    together = min(LARGEST if how.batch == "auto" else how.batch, how.chunk)
    weights = sum(model_held(model, quantize).values())
    while how.batch == "auto" and together > 1 and weights + together * each > ROOM * free:
        together //= 2  # like generation when memory runs out
    return together, each


def _cache(model: Any) -> int:
    """Bytes of one token in the KV cache of all layers, in 16 bits."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * 2 * config.num_hidden_layers * size * (getattr(config, "num_key_value_heads", None) or heads))
