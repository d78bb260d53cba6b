"""What a step needs: memory where it loads a model and does not train it, and room on the disk."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.measure.score import BATCH_TOKENS
from qcft.prepare.prepared import Prepared
from qcft.recipe import Phase
from qcft.replay.amount import replay_amount, rounded
from qcft.replay.generation import LARGEST
from qcft.steps.step import Step
from qcft.store.upkeep import size_of

if TYPE_CHECKING:
    from qcft.training.memory import Planned

TOGETHER = 16  # prompts that a measured model answers at once
LOOKED_AT = 64  # prompts of a pool whose lengths stand for all
TEXT, RECORD = 6, 300  # bytes of a token as text and of a row's record around it, roughly
ROOM = 0.9  # share of the free memory to fill
SCORES = 1 << 20  # bytes of scores and answers: of the suites that ship, seldom more


def memory_held(prepared: Prepared, step: Step, free: int) -> dict[str, int] | None:
    """Bytes by part that a step which loads a model holds at most; None for a training, or one that loads none.

    `cache`: keys and values of the answers that are made at once, as many as fit into `free` bytes where replay's
    `batch` is auto.
    """
    from qcft.models.size import weight_bytes

    generates = step.kind == "replay" and any(part["pool"] for part in step.settings["parts"])
    if not generates and step.kind not in {"probe", "kept", "dial"}:
        return None
    recipe, model = prepared.recipe, prepared.meta_model
    weights = weight_bytes(model, step.settings.get("quantize") or recipe.model.quantize)
    parts = {
        "weights": weights.packed,
        "constants": weights.constants,
        "halves": weights.linear + weights.embeddings + weights.other,
    }
    if not generates:
        config: Any = model.config.get_text_config()
        prompts = prepared.english_prompts() if step.kind != "kept" else []
        longest = max((len(prepared.group_encoder(group).prompt_ids(row)) for group, row in prompts), default=0)
        answers = min(TOGETHER, len(prompts)) * (longest + recipe.answers.max_new_tokens)
        logits = BATCH_TOKENS * config.vocab_size * (2 + 4)  # in 16 bits, and in fp32 to be scored
        return {**parts, "logits": int(logits), "cache": _cache(model) * answers}
    together, each = answered_at_once(prepared, recipe.phase(step.phase or ""), free)
    return {**parts, "cache": together * each}


def answered_at_once(prepared: Prepared, phase: Phase, free: int) -> tuple[int, int]:
    """How many prompts of a phase's replay are answered at once, by what fits into `free` bytes beside the model where
    `batch` is auto; and the bytes that one of them holds."""
    from qcft.models.size import weight_bytes

    replay, model = phase.replay, prepared.meta_model
    assert replay is not None
    encoder = prepared.replay_encoder(phase)
    rows = islice((row for pool in prepared.pools[phase.name] for row in pool.rows), LOOKED_AT)
    lengths = [len(prompt) for prompt in map(encoder.prompt, rows) if not isinstance(prompt, str)]  # else refused
    each = _cache(model) * (max(lengths, default=0) + replay.max_new_tokens)
    together = min(LARGEST if replay.batch == "auto" else replay.batch, replay.chunk)
    weights = weight_bytes(model, prepared.recipe.model.quantize).total
    while replay.batch == "auto" and together > 1 and weights + together * each > ROOM * free:
        together //= 2  # as generation does when memory runs out
    return together, each


def bytes_written(prepared: Prepared, step: Step, planned: Planned | None) -> int:
    """Bytes that a step writes at most: merged weights, an adapter with two checkpoints and stored states, texts.

    `planned`: how a training would run.
    """
    if step.kind == "merge":
        parameters: int = sum(p.numel() for p in prepared.meta_model.parameters())
        return 2 * parameters
    if step.kind == "train":
        assert planned is not None
        return 3 * planned.memory.adapters + 2 * planned.memory.optimizer + planned.stored
    phase = prepared.recipe.phase(step.phase) if step.phase else None
    if step.kind == "adapter" and phase and phase.adapter:
        return size_of(Path(os.path.expanduser(phase.adapter)))
    if step.kind == "replay" and phase and phase.replay:
        rows = rounded(replay_amount(phase.replay, sum(map(len, prepared.rows[phase.name]))))
        return 2 * rows * (RECORD + TEXT * (phase.train.max_length // 2 + phase.replay.max_new_tokens))
    return SCORES * len(step.settings["scales"] if step.kind == "dial" else (1,))


def _cache(model: Any) -> int:
    """Bytes of one token's keys and values in all layers, in 16 bits."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * 2 * config.num_hidden_layers * size * (getattr(config, "num_key_value_heads", None) or heads))
