"""What a recipe would run: memory, disk, time, and rows as they are trained on. Nothing is trained or written."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.data.encode import IGNORED, EncodedRow, EncodedSet, Encoder
from qcft.events import Watch
from qcft.measure.score import BATCH_TOKENS
from qcft.pipeline.forecast import plan_phase
from qcft.pipeline.generation import LARGEST
from qcft.pipeline.libraries import quiet, set_environment
from qcft.pipeline.prepare import Prepared
from qcft.plan import Step
from qcft.recipe import Phase, Recipe, parse_freeze
from qcft.store import Store

if TYPE_CHECKING:
    from qcft.training.speed import Speed

CONTEXT = 1 << 29  # bytes that CUDA takes for itself, roughly: part of a card that is planned for but not here


def check_recipe(
    recipe: Recipe, runs: Path, watch: Watch, vram: int | None = None, measure: bool = False, rows: int = 2
) -> dict[str, Any]:
    """What `qcft check` shows. `vram`: bytes of a GPU that is not here; `measure`: take a few optimizer steps of each
    phase to know their pace, and throw them away; `rows`: of each phase to show. Raises InputError."""
    from qcft.models.load import device, free_bytes
    from qcft.training.speed import measure_speed

    set_environment()
    quiet()
    prepared, store = Prepared(recipe, watch), Store(runs)
    prepared.check(weights=False)
    where = "cuda" if vram else device()
    free = vram - CONTEXT if vram else free_bytes()
    speed = None if vram else measure_speed()
    phases: list[dict[str, Any]] = []
    for phase in recipe.phases:
        if not phase.adapter:
            watch.progress(f"planning {phase.name}", len(phases), len(recipe.phases), "phases")
            phases.append(_phase(prepared, phase, where, free, speed, rows))
            if measure:
                from qcft.pipeline.trial import seconds_a_step

                phases[-1]["seconds"] = seconds_a_step(recipe, phase, watch) * phases[-1]["steps"]
                phases[-1]["measured"] = True
    disk = _disk(prepared, store, phases)
    done = {step.id for step in prepared.plan.steps if store.state(step.id) == "done"}
    needed = sum(step["bytes"] for step in disk if step["id"] not in done)
    place = runs if runs.exists() else Path(".")
    return {
        "recipe": recipe.name,
        "model": recipe.model.name,
        "device": where,
        "here": vram is None,
        "free_bytes": free,
        "fits": all(phase["fits"] for phase in phases),
        "phases": phases,
        "steps": disk,
        "disk_bytes": needed,
        "disk_free_bytes": shutil.disk_usage(place).free,
    }


def _phase(prepared: Prepared, phase: Phase, where: str, free: int, speed: Speed | None, rows: int) -> dict[str, Any]:
    planned, batches = plan_phase(prepared, phase, where, free)
    encoder = prepared.encoder(phase)
    sets = prepared.encoded(phase)
    tokens = batches.tokens_until(batches.steps)
    seconds = speed.seconds(planned.cost) * tokens / planned.largest.tokens if speed else None
    read = sum(len(s.rows) + sum(s.left_out.values()) for s in sets)
    return {
        "phase": phase.name,
        "memory": {**asdict(planned.memory), "total": planned.memory.total},
        "fits": planned.fits,
        "pass_tokens": planned.largest.tokens,
        "pass_limit": planned.fit.limit,
        "gradient_checkpointing": planned.fit.recompute,
        "freeze_is_known": parse_freeze(phase.freeze).measure is None,
        "steps": batches.steps,
        "rows": batches.rows,
        "tokens": tokens,
        "seconds": seconds,
        "measured": False,
        "rows_read": read,
        "left_out": _summed([s.left_out for s in sets]),
        "truncated": sum(_is_cut(row, one, encoder) for s in sets for row, one in zip(s.rows, s.encoded, strict=True)),
        "samples": [_decoded(prepared, row) for row in _first(sets, rows)],
    }


def _first(sets: list[EncodedSet], rows: int) -> list[EncodedRow]:
    """The first rows, from every source in turn."""
    each = [list(one.encoded[:rows]) for one in sets]
    return [one[i] for i in range(rows) for one in each if i < len(one)][:rows]


def _decoded(prepared: Prepared, row: EncodedRow) -> list[dict[str, Any]]:
    """A row as text, in stretches that bear loss and stretches that do not."""
    stretches: list[tuple[bool, list[int]]] = []
    for token, label in zip(row.input_ids, row.labels, strict=True):
        trained = label != IGNORED
        if not stretches or stretches[-1][0] != trained:
            stretches.append((trained, []))
        stretches[-1][1].append(token)
    return [{"text": str(prepared.tokenizer.decode(ids)), "trained": trained} for trained, ids in stretches]


def _is_cut(row: Any, encoded: EncodedRow, encoder: Encoder) -> bool:
    """Whether a row lost its end to the limit on length: its answer's, or whole turns."""
    turns = sum(message.role == "assistant" for message in row.messages)
    begun = sum(
        label != IGNORED and (i == 0 or encoded.labels[i - 1] == IGNORED) for i, label in enumerate(encoded.labels)
    )
    return begun < turns or encoded.input_ids[-1] not in encoder.end_ids


def _disk(prepared: Prepared, store: Store, phases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each step with its state and the bytes it writes: merged weights, adapters with two checkpoints; else text."""
    parameters: int = sum(p.numel() for p in prepared.meta_model.parameters())
    trained: dict[str, dict[str, int]] = {phase["phase"]: phase["memory"] for phase in phases}
    seconds = {phase["phase"]: phase["seconds"] for phase in phases}

    def bytes_of(step: Step) -> int:
        if step.kind == "merge":
            return 2 * parameters
        if step.kind == "train" and step.phase in trained:
            memory: dict[str, int] = trained[step.phase]
            return 3 * memory["adapters"] + 2 * memory["optimizer"]
        return 0

    return [
        {
            "id": step.id,
            "title": step.title,
            "state": store.state(step.id),
            "bytes": bytes_of(step),
            "memory_bytes": trained[step.phase]["total"]
            if step.kind == "train" and step.phase in trained
            else _held(prepared, step),
            "seconds": seconds.get(step.phase or "") if step.kind == "train" else None,
        }
        for step in prepared.plan.steps
    ]


def _held(prepared: Prepared, step: Step) -> int | None:
    """Most bytes that a step which loads a model and does not train it holds at once; None for one that loads none."""
    from qcft.models.size import weight_bytes

    recipe, model = prepared.recipe, prepared.meta_model
    config: Any = model.config.get_text_config()
    weights = weight_bytes(model, step.settings.get("quantize") or recipe.model.quantize).total
    if step.kind in {"probe", "kept", "dial"}:
        return weights + int(BATCH_TOKENS * config.vocab_size * (2 + 4))  # logits in 16 bits, and in fp32 to be scored
    if step.kind != "replay" or not any(part["pool"] for part in step.settings["parts"]):
        return None
    phase = recipe.phase(step.phase or "")
    assert phase.replay is not None
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    cache = 2 * 2 * config.num_hidden_layers * size * (getattr(config, "num_key_value_heads", None) or heads)
    together = LARGEST if phase.replay.batch == "auto" else phase.replay.batch
    longest = phase.train.max_length + phase.replay.max_new_tokens
    return weights + int(cache * min(together, phase.replay.chunk) * longest)


def _summed(counts: list[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for reason, n in one.items():
            total[reason] = total.get(reason, 0) + n
    return total
