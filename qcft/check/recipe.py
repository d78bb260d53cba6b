"""What a recipe would run: memory, disk, time, and sample training rows. Nothing is trained or written."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from qcft.check.rows import Looks, look_at_rows
from qcft.data.encode import IGNORED, EncodedRow, EncodedSet
from qcft.errors import InputError
from qcft.events import Watch
from qcft.files import disk_free
from qcft.measure.similarity import PhasesCompared, compare_phases
from qcft.models.gpus import choose_gpu
from qcft.models.size import quantised_share, share_of_weights
from qcft.models.sources import has_weights
from qcft.prepare.checks import check_prepared
from qcft.recipe import Phase, Recipe
from qcft.replay.share import ShareShown
from qcft.runner.forecast import plan_phase, replay_share
from qcft.runner.libraries import quiet, set_environment
from qcft.runner.planned import PlannedRecipe
from qcft.store import Store

if TYPE_CHECKING:
    from qcft.training.batches import Batches
    from qcft.training.memory import Planned
    from qcft.training.speed import Speed

CONTEXT = 1 << 29  # bytes that CUDA itself needs, roughly: for a card that is planned for but not in this machine


class Stretch(TypedDict):
    """A part of a row as text, and whether it has loss."""

    text: str
    trained: bool


class TextChecked(TypedDict):
    """A phase's documents of raw text, and the training rows that they make."""

    documents: int
    rows: int


class PhaseChecked(TypedDict):
    """What training a phase needs; `memory` in bytes by part, `seconds` None where its speed is not known."""

    phase: str
    memory: dict[str, int]
    fits: bool
    unknown: str | None
    adapted_share: float
    pass_tokens: int
    pass_limit: int | None
    gradient_checkpointing: bool
    terms: str
    freeze_is_known: bool
    steps: int
    rows: int
    tokens: int
    seconds: float | None
    measured: bool
    rows_read: int
    left_out: dict[str, int]
    given: dict[str, int]
    looks: Looks
    raw_text: TextChecked | None
    replay: ShareShown | None
    truncated: int
    samples: list[list[Stretch]]


class StepChecked(TypedDict):
    """What a step needs at most."""

    id: str
    kind: str
    title: str
    phase: str | None
    quantize: str
    state: str
    bytes: int
    memory: dict[str, int] | None
    seconds: float | None


class Checked(TypedDict):
    """What `qcft check` shows."""

    recipe: str
    model: str
    quantize: str
    quantised_share: float
    device: str
    here: bool
    vram_bytes: int | None
    free_bytes: int
    fits: bool
    phases: list[PhaseChecked]
    steps: list[StepChecked]
    disk_bytes: int
    disk_free_bytes: int
    cache_bytes: int
    similarity: list[PhasesCompared]


def check_recipe(
    recipe: Recipe,
    runs: Path,
    watch: Watch,
    vram: int | None = None,
    measure: bool = False,
    rows: int = 2,
    encoder: str | None = None,
) -> Checked:
    """What `qcft check` shows. `vram`: bytes of a GPU that is not in this machine; `measure`: run a few optimizer steps
    of each phase, to time them; `rows`: rows of each phase to show; `encoder`: a sentence encoder to compare the
    phases' instructions (None: the paper's, if it is cached). Raises InputError."""
    from qcft.models.load import device, free_bytes
    from qcft.training.speed import measure_speed

    if vram and measure:
        raise InputError("--measure times steps on this machine, and --vram plans for another GPU", "omit one of them")
    set_environment()
    quiet()
    if not vram:
        choose_gpu()
    prepared, store = PlannedRecipe(recipe, watch), Store(runs)
    recipe = prepared.recipe
    check_prepared(prepared, weights=False)
    similarity = compare_phases(recipe, encoder, watch)
    where = "cuda" if vram else device()
    free = vram - CONTEXT if vram else free_bytes()
    speed = None if vram else measure_speed()
    phases: list[PhaseChecked] = []
    plans: dict[str, Planned] = {}
    for phase in recipe.phases:
        if not phase.adapter:
            watch.progress(f"planning {phase.name}", len(phases), len(recipe.phases), "phases")
            plans[phase.name], batches = plan_phase(prepared, phase, where, free)
            phases.append(_phase(prepared, phase, plans[phase.name], batches, speed, rows, store))
            if measure:
                from qcft.check.trial import seconds_a_step

                phases[-1]["seconds"] = seconds_a_step(recipe, phase, watch) * phases[-1]["steps"]
                phases[-1]["measured"] = True
    steps = _steps(prepared, store, phases, plans, free)
    parameters: int = sum(p.numel() for p in prepared.meta_model.parameters())
    return {
        "recipe": recipe.name,
        "model": recipe.model.name,
        "quantize": recipe.model.quantize,
        "quantised_share": quantised_share(prepared.meta_model) if recipe.model.quantize == "nf4" else 0.0,
        "device": where,
        "here": vram is None,
        "vram_bytes": vram,
        "free_bytes": free,
        "fits": all(phase["fits"] for phase in phases),
        "phases": phases,
        "steps": steps,
        "disk_bytes": sum(step["bytes"] for step in steps if step["state"] != "done"),
        "disk_free_bytes": disk_free(runs),
        "cache_bytes": 0 if has_weights(prepared.model) else 2 * parameters,
        "similarity": similarity,
    }


def _phase(
    prepared: PlannedRecipe,
    phase: Phase,
    planned: Planned,
    batches: Batches,
    speed: Speed | None,
    rows: int,
    store: Store,
) -> PhaseChecked:
    from qcft.training.reference import terms_of

    sets = prepared.encoded(phase)
    tokens = batches.tokens_until(batches.steps)
    seconds = None
    if speed and planned.unknown is None:
        seconds = speed.seconds(planned.cost) * tokens / planned.largest.tokens
    sources = prepared.sources[phase.name]
    left_out: Counter[str] = Counter()
    for counts in (*(s.left_out for s in sources), *(s.left_out for s in sets)):
        left_out.update(counts)
    return {
        "phase": phase.name,
        "memory": {**asdict(planned.memory), "total": planned.memory.total},
        "fits": planned.fits,
        "unknown": planned.unknown,
        "adapted_share": _adapted_share(prepared, phase),
        "pass_tokens": planned.largest.tokens,
        "pass_limit": planned.fit.limit,
        "gradient_checkpointing": planned.fit.recompute,
        "terms": str(terms_of(phase)),
        "freeze_is_known": phase.freeze.measure is None,
        "steps": batches.steps,
        "rows": batches.rows,
        "tokens": tokens,
        "seconds": seconds,
        "measured": False,
        "rows_read": sum(map(len, prepared.rows[phase.name])) + sum(sum(s.left_out.values()) for s in sources),
        "left_out": dict(left_out),
        "given": _given(prepared, phase, sets),
        "looks": look_at_rows(prepared, phase, sets),
        "raw_text": _raw_text(sets),
        "replay": share.shown() if (share := replay_share(prepared, phase, store)) else None,
        "truncated": sum(row.cut for s in sets for row in s.encoded),
        "samples": [_decoded(prepared, row) for row in _first(sets, rows)],
    }


def _given(prepared: PlannedRecipe, phase: Phase, sets: list[EncodedSet]) -> dict[str, int]:
    """The rows of each language in an epoch."""
    given: Counter[str] = Counter()
    for source, one in zip(prepared.sources[phase.name], sets, strict=True):
        given[source.lang] += len(one.rows)
    return dict(given)


def _raw_text(sets: list[EncodedSet]) -> TextChecked | None:
    rows = [row for one in sets for row in one.rows if row.text is not None]
    return {"documents": len({row.key for row in rows}), "rows": len(rows)} if rows else None


def _adapted_share(prepared: PlannedRecipe, phase: Phase) -> float:
    """The share of the model's weights with adapters; as many where a freeze spec depends on what is not known yet."""
    from qcft.layers import adapted_in

    return share_of_weights(prepared.meta_model, adapted_in(prepared.meta_model, prepared.recipe, phase))


def _first(sets: list[EncodedSet], rows: int) -> list[EncodedRow]:
    """The first rows, from every source in turn."""
    each = [list(one.encoded[:rows]) for one in sets]
    return [one[i] for i in range(max(map(len, each))) for one in each if i < len(one)][:rows]


def _decoded(prepared: PlannedRecipe, row: EncodedRow) -> list[Stretch]:
    """A row as text, in parts with loss and parts without."""
    stretches: list[tuple[bool, list[int]]] = []
    for token, label in zip(row.input_ids, row.labels, strict=True):
        trained = label != IGNORED
        if not stretches or stretches[-1][0] != trained:
            stretches.append((trained, []))
        stretches[-1][1].append(token)
    return [{"text": str(prepared.tokenizer.decode(ids)), "trained": trained} for trained, ids in stretches]


def _steps(
    prepared: PlannedRecipe, store: Store, phases: list[PhaseChecked], plans: dict[str, Planned], free: int
) -> list[StepChecked]:
    """Each step with its state, the memory it holds at most, the bytes it writes, and for trainings the time."""
    trained = {phase["phase"]: phase for phase in phases}
    steps: list[StepChecked] = []
    bench = prepared.bench(store, prepared.watch)
    for step in prepared.plan.steps:
        training = trained.get(step.phase or "") if step.kind == "train" else None
        memory = training["memory"] if training else step.work.memory(step, bench, free)
        if memory is not None and training is None:
            memory = {**memory, "total": sum(memory.values())}
        steps.append(
            {
                "id": step.id,
                "kind": step.kind,
                "title": step.title,
                "phase": step.phase,
                "quantize": step.settings.get("quantize") or prepared.recipe.model.quantize,
                "state": store.state(step.id),
                "bytes": step.work.written(step, bench, plans.get(step.phase or "")),
                "memory": memory,
                "seconds": training["seconds"] if training else None,
            }
        )
    return steps
