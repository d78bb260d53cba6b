"""What an ablation would run: its steps, which arms share them, and their time and disk by the steps done so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypedDict, cast

from qcft.ablation.arms import prepare_arms
from qcft.events import Watch
from qcft.recipe import ArmRun
from qcft.replay.amount import replay_amount
from qcft.replay.share import ShareShown
from qcft.runner.forecast import Length, phase_length, plan_phase
from qcft.runner.libraries import quiet
from qcft.runner.planned import PlannedRecipe
from qcft.steps.step import Bench, Step
from qcft.store import Store
from qcft.store.metrics import ProbeMetrics, ReplayMetrics, TrainMetrics
from qcft.store.opened import Record, read_begun

if TYPE_CHECKING:
    from qcft.training.speed import Speed

SIMILAR_BY = ("model", "quantize", "held_out", "answers", "freeze")  # settings that decide the cost of a row


@dataclass(frozen=True)
class StepCost:
    """A done step of the store: its kind and settings, seconds and bytes, and how many rows it worked on."""

    kind: str
    settings: Mapping[str, Any]
    seconds: float
    bytes: int
    rows: float


class Expected(TypedDict):
    """The cost of a step: seconds and bytes, None where it is not known."""

    seconds: float | None
    bytes: int | None


class PlannedStep(Expected):
    """A step, its state and the runs that need it."""

    id: str
    title: str
    state: str
    runs: list[str]


class Sums(TypedDict):
    """How many of several steps are done; the seconds and bytes of those to do, of which `unknown` have no estimate."""

    done: int
    seconds: float | None
    bytes: int
    unknown: int


class PlannedTraining(TypedDict):
    """How long all phases of an arm train, with the epochs of each; `answer_tokens` are those of its own rows,
    `replay_answer_tokens` of its replay (None where it is not generated yet), `replay` its shares by phase."""

    steps: int
    answer_tokens: int
    replay_answer_tokens: int | None
    epochs: list[float]
    replay: dict[str, ShareShown]


class PlannedRun(Sums):
    """A run of an arm: its steps, and those (`own`) that no run before it needs, whose sums these are. Where an arm
    lacks something nothing is known, and `training` is None."""

    run: str
    arm: str
    seed: int
    steps: int
    own: int
    training: PlannedTraining | None


class PlannedTotal(Sums):
    """All steps, and how many of them are shared."""

    steps: int
    shared: int


class AblationPlan(TypedDict):
    """What an ablation would run."""

    runs: list[PlannedRun]
    steps: list[PlannedStep]
    missing: dict[str, str]
    total: PlannedTotal


class ArmListed(TypedDict):
    """An arm of a recipe, its seeds, and what it sets."""

    arm: str
    seeds: list[int]
    set: dict[str, Any]
    mixed: bool


def arms_listed(arms: Sequence[ArmRun]) -> list[ArmListed]:
    """Each arm with its seeds and what it sets."""
    found: dict[str, ArmListed] = {}
    for one in arms:
        entry: ArmListed = {"arm": one.arm, "seeds": [], "set": dict(one.set), "mixed": one.as_long_as is not None}
        found.setdefault(one.arm, entry)["seeds"].append(one.seed)
    return list(found.values())


def ablation_plan(arms: Sequence[ArmRun], runs: Path, watch: Watch) -> AblationPlan:
    """The steps of all arms, each once, with its state, the arms that need it, and its measured or expected cost.

    `seconds` and `bytes` of a step that is not done come from done steps of the same kind and model, per row; where
    there are none, from shapes for trainings and merges, else they are null. `missing`: by run, what an arm needs that
    is not here; its steps are not known. Nothing is written.
    """
    store = Store(runs)
    known = _done_steps(store)
    steps: dict[str, PlannedStep] = {}
    missing: dict[str, str] = {}
    prepared = prepare_arms(arms, watch, missing)
    quiet()
    for number, one in enumerate(prepared):
        watch.progress("planning the arms", number, len(prepared), "arms")
        name = one.arm.recipe.name
        for step in one.prepared.plan.steps:
            if step.id not in steps:
                steps[step.id] = {
                    "id": step.id,
                    "title": step.title,
                    "state": store.state(step.id),
                    **_expected(step, one.prepared, store, known),
                    "runs": [],
                }
            steps[step.id]["runs"].append(name)
    rows = list(steps.values())
    known_arms = {one.arm.recipe.name: one.prepared for one in prepared}
    return {
        "runs": [_of_run(arm, known_arms.get(arm.recipe.name), rows, store) for arm in arms],
        "steps": rows,
        "missing": missing,
        "total": {**_sums(rows), "steps": len(rows), "shared": sum(len(row["runs"]) > 1 for row in rows)},
    }


def _of_run(arm: ArmRun, prepared: PlannedRecipe | None, steps: list[PlannedStep], store: Store) -> PlannedRun:
    """An arm's part: its steps, and those that no run before it needs; how long it trains."""
    name = arm.recipe.name
    own = [row for row in steps if row["runs"][0] == name]
    return {
        "run": name,
        "arm": arm.arm,
        "seed": arm.seed,
        "steps": sum(name in row["runs"] for row in steps),
        "own": len(own),
        **_sums(own),
        "training": _training(prepared, store) if prepared else None,
    }


def _training(prepared: PlannedRecipe, store: Store) -> PlannedTraining:
    """How long an arm's phases train in all, and each phase's epochs and replay, as far as it is known before."""
    recipe = prepared.recipe
    lengths: dict[str, Length] = {}
    decided_by: tuple[str, ...] = ()  # what does not depend on freezing
    for phase in recipe.phases:
        decided_by += (prepared.rows_digest(phase), phase.model_dump_json(exclude={"freeze"}))
        if not phase.adapter:
            key = ("length", prepared.key, recipe.seed, decided_by)
            lengths[phase.name] = prepared.once(key, partial(phase_length, prepared, phase, store))
    for name, one in lengths.items():
        if one.replay and (warning := one.replay.warning(name)):
            prepared.once(("warned", warning), partial(prepared.watch.note, warning, "warning"))
    replayed = [one.replay_answer_tokens for one in lengths.values()]
    return {
        "steps": sum(one.steps for one in lengths.values()),
        "answer_tokens": sum(one.answer_tokens for one in lengths.values()),
        "replay_answer_tokens": None if None in replayed else sum(one or 0 for one in replayed),
        "epochs": [one.epochs for one in lengths.values()],
        "replay": {name: one.replay.shown() for name, one in lengths.items() if one.replay},
    }


def _sums(rows: list[PlannedStep]) -> Sums:
    """Done steps, and the seconds and bytes of those to do; `unknown` of them have no estimate.

    Seconds are null where no step to do has an estimate: 0 means a step that takes almost no time.
    """
    todo = [row for row in rows if row["state"] != "done"]
    known = [row["seconds"] for row in todo if row["seconds"] is not None]
    return {
        "done": len(rows) - len(todo),
        "seconds": sum(known) if known or not todo else None,
        "bytes": sum(row["bytes"] or 0 for row in todo),
        "unknown": sum(row["seconds"] is None for row in todo),
    }


def _done_steps(store: Store) -> list[StepCost]:
    found = []
    for folder in store.steps.glob("*-*"):
        begun, record = read_begun(folder), store.record(folder.name)
        if begun is None or record is None:
            continue
        size = sum((folder / name).stat().st_size for name in record["files"] if (folder / name).is_file())
        inputs = begun["inputs"]
        found.append(
            StepCost(inputs["kind"], inputs["settings"], record["seconds"], size, _worked_on(inputs["kind"], record))
        )
    return found


def _worked_on(kind: str, record: Record) -> float:
    if kind == "probe":
        return sum(group["rows"] for group in cast("ProbeMetrics", record["metrics"])["groups"].values())
    if kind in {"train", "replay"}:
        return cast("TrainMetrics | ReplayMetrics", record["metrics"])["rows"]
    return 1


def _expected(step: Step, prepared: PlannedRecipe, store: Store, known: Sequence[StepCost]) -> Expected:
    record = store.record(step.id)
    if record is not None:
        sizes = [store.folder(step.id) / name for name in record["files"]]
        return {"seconds": record["seconds"], "bytes": sum(p.stat().st_size for p in sizes if p.is_file())}
    similar = [d for d in known if d.kind == step.kind and d.settings.get("model") == step.settings.get("model")]
    for key in SIMILAR_BY:  # the most similar steps
        similar = [d for d in similar if d.settings.get(key) == step.settings.get(key)] or similar
    rows = _rows(step, prepared)
    if not similar or not rows:
        return _from_shapes(step, prepared, prepared.bench(store, prepared.watch))
    scaled = step.kind in {"replay", "probe"}
    return {
        "seconds": fmean(d.seconds / max(1, d.rows) for d in similar) * rows,
        "bytes": round(fmean(d.bytes / max(1, d.rows) * rows if scaled else d.bytes for d in similar)),
    }


def _from_shapes(step: Step, prepared: PlannedRecipe, bench: Bench) -> Expected:
    """The cost of a training, and the bytes of a merge, as `qcft check` estimates them."""
    from qcft.layers import adapted_in
    from qcft.models.load import device, free_bytes

    if step.kind == "merge":
        return {"seconds": None, "bytes": step.work.written(step, bench, None)}
    if step.kind != "train" or step.phase is None:
        return {"seconds": None, "bytes": None}
    phase = prepared.recipe.phase(step.phase)
    # Once for all seeds, which change the order of the rows and, in some freeze specs, the layers.
    seedless = prepared.recipe.model_copy(update={"seed": 0, "name": ""}).model_dump_json()
    key = ("planned", seedless, phase.name, tuple(adapted_in(prepared.meta_model, prepared.recipe, phase)))
    planned, batches = prepared.once(key, partial(plan_phase, prepared, phase, device(), free_bytes()))
    tokens = batches.tokens_until(batches.steps)
    known = planned.unknown is None
    return {
        "seconds": _speed().seconds(planned.cost) * tokens / planned.largest.tokens if known else None,
        "bytes": step.work.written(step, bench, planned),
    }


@cache
def _speed() -> Speed:
    from qcft.training.speed import measure_speed

    return measure_speed()


def _rows(step: Step, prepared: PlannedRecipe) -> float:
    """Rows that a step will work on; 1 for a step that works on none."""
    if step.kind == "probe":
        return sum(len(group.rows) for group in prepared.groups)
    if step.kind not in {"train", "replay"}:
        return 1
    assert step.phase is not None
    phase = prepared.recipe.phase(step.phase)
    new = sum(len(rows) for rows in prepared.rows[phase.name])
    replay = float(replay_amount(phase.replay, new))
    if step.kind == "replay":
        return replay
    return phase.train.steps * phase.train.batch if phase.train.steps else (new + replay) * phase.train.epochs
