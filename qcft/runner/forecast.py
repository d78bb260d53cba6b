"""How a phase would be trained, estimated from shapes; reported in a line before a run starts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from qcft.data.encode import EncodedRow
from qcft.errors import InputError
from qcft.events import Watch
from qcft.files import disk_free
from qcft.prepare.prepared import Prepared
from qcft.recipe import Phase
from qcft.replay.amount import replay_amount, rounded
from qcft.replay.rows import check_replay
from qcft.replay.share import ReplayShare, share_made
from qcft.runner.planned import PlannedRecipe
from qcft.steps.step import Step
from qcft.store import Store
from qcft.store.metrics import ReplayMetrics

if TYPE_CHECKING:
    from qcft.training.batches import Batches
    from qcft.training.memory import Memory, Planned

GIB = 2**30
REPLAY = "replay"  # the source of rows that stand for replay
SMALL = 50_000_000  # parameters; for a smaller model nothing is reported, as it fits anywhere


@dataclass(frozen=True)
class Length:
    """How long a phase trains: optimizer steps, epochs, answer tokens of its own rows and of its `replay` (None where
    they are known only after generation), and replay's share, all as far as they are known before it trains."""

    steps: int
    epochs: float
    answer_tokens: int
    replay_answer_tokens: int | None
    replay: ReplayShare | None


def phase_length(prepared: PlannedRecipe, phase: Phase, store: Store) -> Length:
    """How long a phase will train."""
    share = replay_share(prepared, phase, store)
    rows, batches = _laid_out(prepared, phase, share.rows if share else None)
    fed = [row for item in batches.items for row in item]
    epochs, own = len(fed) / len(rows), sum(row.answer_tokens for row in fed if row.source != REPLAY)
    replayed = share.answer_tokens if share else 0
    return Length(batches.steps, epochs, own, None if replayed is None else round(epochs * replayed), share)


def replay_share(prepared: PlannedRecipe, phase: Phase, store: Store) -> ReplayShare | None:
    """Replay's share of a phase's mix: as it was made, else as far as it is known before. None without replay."""
    replay, new = phase.replay, prepared.encoded(phase)
    if replay is None or replay.ratio == 0:
        return None
    step = next(step for step in prepared.plan.steps if step.kind == "replay" and step.phase == phase.name)
    if record := store.record(step.id):
        return share_made(replay, new, cast("ReplayMetrics", record["metrics"]))
    return check_replay(phase, prepared.pools[phase.name], new, prepared.replay_encoder(phase))


def _laid_out(prepared: Prepared, phase: Phase, replay: int | None = None) -> tuple[list[EncodedRow], Batches]:
    """A phase's rows and their batches, with so many rows of `replay`, or those of its ratio; they are assumed to be
    like the phase's own."""
    from qcft.training.batches import make_batches

    new = [row for encoded in prepared.encoded(phase) for row in encoded.encoded]
    extra = rounded(replay_amount(phase.replay, len(new))) if replay is None else replay
    rows = [*new, *(replace(new[i % len(new)], source=REPLAY) for i in range(extra))]
    return rows, make_batches(rows, prepared.order(phase, extra), phase.train)


def plan_phase(prepared: Prepared, phase: Phase, where: str, free: int) -> tuple[Planned, Batches]:
    """How a phase would be trained on a device with so many free bytes, and its batches; from shapes alone."""
    from qcft.layers import adapted_in, lowest_adapted
    from qcft.training.attention import attend_by_rows
    from qcft.training.footprint import SecondPass, TrainingShape
    from qcft.training.memory import plan_training
    from qcft.training.prefix import cannot_split, worth_storing
    from qcft.training.reference import terms_of

    recipe, model = prepared.recipe, prepared.meta_model
    rows, batches = _laid_out(prepared, phase)
    modules = adapted_in(model, recipe, phase)
    below = lowest_adapted(model, modules)
    config: Any = model.config.get_text_config()
    states = sum(len(row.input_ids) for row in rows) * config.hidden_size * 2
    continues = phase.start == "continue" and phase != recipe.phases[0]
    split = below > 0 and not continues and cannot_split(model, phase.train) is None
    cut = split and worth_storing(phase.train, states, batches.rows > len(rows))
    second = SecondPass(split and not cut, continues) if terms_of(phase) else None
    by_rows = attend_by_rows(copy.deepcopy(model), max(len(row.input_ids) for row in rows))
    shape = TrainingShape(tuple(modules), recipe.lora, recipe.model.quantize, False, cut, where, second)
    under = _numbers_under(prepared, phase)
    planned = plan_training(model, shape, batches, phase.train, by_rows, free, under=under)
    return replace(planned, stored=states if cut else 0), batches


def _numbers_under(prepared: Prepared, phase: Phase) -> int:
    """Numbers in the adapters that lie live and frozen under a phase's own."""
    from qcft.layers import adapted_in, linear_modules
    from qcft.models.adapters import trained_numbers

    recipe, model = prepared.recipe, prepared.meta_model
    by_name = {module.name: module.shape for module in linear_modules(model)}
    place, total = recipe.phases.index(phase), 0
    while place > 0 and recipe.phases[place].start == "stacked":
        place -= 1
        if not recipe.phases[place].adapter:
            modules = adapted_in(model, recipe, recipe.phases[place])
            total += sum(trained_numbers(recipe.lora, name, by_name[name]) for name in modules)
    return total


def forecast(prepared: PlannedRecipe, steps: Sequence[Step], store: Store, watch: Watch) -> dict[str, float]:
    """Report the memory and time of the trainings among `steps`, and the disk of all; the seconds of each training.

    Trainings that cannot be estimated, or are very short, are not included. Raises InputError where a GPU cannot hold
    them at all.
    """
    from qcft.models.load import device, free_bytes
    from qcft.training.speed import measure_speed

    trainings = [step for step in steps if step.kind == "train" and step.phase]
    if not trainings or sum(p.numel() for p in prepared.meta_model.parameters()) < SMALL:
        return {}
    where, free, speed = device(), free_bytes(), measure_speed()
    name = "GPU memory" if where == "cuda" else "RAM"
    plans: dict[str, Planned] = {}
    seconds: dict[str, float] = {}
    for step in trainings:
        phase = prepared.recipe.phase(step.phase or "")
        planned, batches = plan_phase(prepared, phase, where, free)
        memory = planned.memory
        held = memory.total - memory.activations - memory.logits - memory.optimizer
        if where == "cuda" and held > free:
            raise InputError(
                f"{phase.name} does not fit on the GPU: its weights, adapters and gradients alone take "
                f"{held / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free",
                "free the GPU, freeze lower layers (freeze: first:N), lower lora.r, or use a smaller model",
            )
        if not planned.fits:
            watch.note(
                f"{phase.name} needs about {memory.total / GIB:.1f} GiB of {name}, and {free / GIB:.1f} GiB are free; "
                f"try --set {phase.name}.train.batch=auto",
                "warning",
            )
        plans[step.id] = planned
        if planned.unknown:
            watch.note(
                f"{phase.name}: the memory of activations and the training time cannot be estimated, as "
                f"{planned.unknown}",
                "warning",
            )
            continue
        tokens = batches.tokens_until(batches.steps)
        seconds[step.id] = speed.seconds(planned.cost) * tokens / planned.largest.tokens
    known = not any(planned.unknown for planned in plans.values())
    time = f"about {_about(sum(seconds.values()))}" if known else "an unknown time"
    most = max((planned.memory for planned in plans.values()), key=lambda one: one.total)
    bench = prepared.bench(store, watch)
    disk = sum(step.work.written(step, bench, plans.get(step.id)) for step in steps)
    room = disk_free(store.runs)
    watch.note(
        f"Training needs {'about' if known else 'at least'} {most.total / GIB:.1f} GiB of {name} ({_parts(most)}; "
        f"{free / GIB:.1f} GiB free) and {time}; the run writes about {disk / GIB:.1f} GiB to disk "
        f"({room / GIB:.1f} GiB free)."
    )
    if disk > room:
        watch.note(f"the disk that holds {str(store.runs)!r} has less space than the run needs: `qcft gc`", "warning")
    return seconds


def _parts(memory: Memory) -> str:
    weights = memory.weights + memory.constants + memory.halves + memory.file
    adapters = memory.adapters + memory.gradients + memory.optimizer
    parts = {"weights": weights, "adapters": adapters, "activations": memory.activations, "logits": memory.logits}
    if memory.kept:
        parts["allocator"] = memory.kept
    return ", ".join(f"{name} {count / GIB:.1f}" for name, count in parts.items())


def _about(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} hours"
    return f"{round(seconds / 60)} minutes" if seconds >= 90 else "1 minute"
