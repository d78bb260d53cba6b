"""Running a recipe: every step that is not done, in order, and the table at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qcft.errors import ChangedInput, InputError, Interrupted, QcftError
from qcft.events import StepBegun, StepEnded, Watch
from qcft.measure.results import finished_run
from qcft.models.gpus import choose_gpu
from qcft.prepare.checks import check_prepared, check_tasks
from qcft.recipe import Recipe
from qcft.recipe.stages import ABILITIES
from qcft.runner.busy import warn_if_busy, warning_if_slow
from qcft.runner.forecast import forecast
from qcft.runner.libraries import exclude_from_gc, quiet, set_environment
from qcft.runner.planned import PlannedRecipe
from qcft.steps.kept import judge_merge
from qcft.steps.step import Step
from qcft.steps.unchanged import discard_changed
from qcft.store import Store
from qcft.store.opened import Record
from qcft.store.results import Run
from qcft.store.runs import NamedRun, held_run, link_stage, restore
from qcft.store.steps import writable
from qcft.training.distributed.ranks import broadcast_step, join, receive_step, world
from qcft.training.fused import use_triton_where_it_works
from qcft.words import counted

if TYPE_CHECKING:
    from qcft.steps.step import Bench


Check = Callable[[PlannedRecipe], None]


def plan_recipe(recipe: Recipe, runs: Path, watch: Watch) -> tuple[PlannedRecipe, dict[str, str]]:
    """The planned recipe and the state of each step (`done`, `partial`, `to do`); nothing is written.

    Raises InputError for what `run_recipe` would refuse before any work.
    """
    set_environment()
    prepared, store = PlannedRecipe(recipe, watch), Store(runs)
    states = {step.id: store.state(step.id) for step in prepared.plan.steps}
    _check([step for step in prepared.plan.steps if states[step.id] != "done"], prepared)
    return prepared, states


def _check(missing: Sequence[Step], prepared: PlannedRecipe) -> None:
    """Check what the steps that are to be done need. Raises InputError."""
    tasks = dict.fromkeys(step.settings["task"] for step in missing if step.kind == "suite")
    if tasks:
        check_tasks(prepared, tasks)
    if any(step.kind != "suite" for step in missing):
        quiet()
        check_prepared(prepared)  # warns too, where nothing is refused


def run_recipe(
    recipe: Recipe,
    runs: Path,
    watch: Watch,
    up_to: str | None = None,
    check: Check | None = None,
    undo: bool = False,
) -> Run:
    """Run a recipe to its end, or `up_to` a stage. Done steps are reused, partial ones resumed.

    `check` may refuse the recipe once its data is read. `undo`: where a step fails before anything that this call adds
    was trained, the run is restored.

    Of several processes that `accelerate launch` started, rank 0 calls this and the others `help_train`.
    Raises InputError before anything is written, QcftError when a step fails, Interrupted when a stop
    was requested.
    """
    set_environment()
    # A cheap check first: with a runs folder that cannot be written, reading the data would be wasted.
    writable(runs)
    if world() == 1:
        return run_prepared(_planned(recipe, watch, check), Store(runs), watch, up_to, undo)
    join()
    if recipe.forgetting is not None and recipe.forgetting.stop is not None:
        raise InputError(
            "forgetting.stop: several processes train without the live probe",
            "--set forgetting.stop=null, or run without accelerate",
        )
    try:
        done = run_prepared(_planned(recipe, watch, check), Store(runs), watch, up_to)
    except Interrupted:
        broadcast_step(None)
        raise
    broadcast_step(None)
    return done


def _planned(recipe: Recipe, watch: Watch, check: Check | None) -> PlannedRecipe:
    planned = PlannedRecipe(recipe, watch)
    if check is not None:
        check(planned)
    return planned


def help_train(recipe: Recipe, runs: Path, watch: Watch) -> None:
    """Train the steps that rank 0 sends, until there are no more. Writes only stored states of frozen layers."""
    set_environment()
    join()
    quiet()
    store = Store(runs)
    bench = PlannedRecipe(recipe, watch).bench(store, watch)
    while (step := receive_step()) is not None:
        bench.do(bench.steps[step], store.folder(step))


def run_prepared(
    prepared: PlannedRecipe, store: Store, watch: Watch, up_to: str | None = None, undo: bool = False
) -> Run:
    """`run_recipe` of a recipe whose data is read and whose steps are planned."""
    recipe, plan = prepared.recipe, prepared.plan
    steps = plan.up_to(up_to) if up_to else plan.steps
    records = {step.id: store.done(step.id, watch) for step in steps}
    estimated: dict[str, float] = {}
    finished = sum(record is not None for record in records.values())
    watch.note(
        f"{recipe.name}: {recipe.model.name}, {counted(len(steps), 'step')}" + f", {finished} reused" * bool(finished)
    )
    if finished < len(steps):
        quiet()
        if world() == 1 and (card := choose_gpu()):
            watch.note(f"running on {card}; to use another, set QCFT_DEVICE=cuda:N")
        missing = [step for step in steps if not records[step.id]]
        _check(missing, prepared)
        estimated = forecast(prepared, missing, store, watch)
        if any(step.kind == "train" for step in missing):
            use_triton_where_it_works(watch)
            warn_if_busy(watch)
    begun, before = len(store.claimed), {step for step, record in records.items() if record is not None}
    with held_run(store.runs, prepared.pinned_recipe(), plan.stages()) as run:
        try:
            done = _work(prepared, steps, records, estimated, run, store, watch)
        except Interrupted:
            raise
        except QcftError:
            if undo and not any(map(store.is_trained, set(plan.stages().values()) - before)):
                restore(run)
            raise
        if len(store.claimed) > begun:
            discard_changed(prepared.inputs, store, begun, thorough=True)
    return done


def _work(
    prepared: PlannedRecipe,
    steps: Sequence[Step],
    records: dict[str, Record | None],
    estimated: Mapping[str, float],
    run: NamedRun,
    store: Store,
    watch: Watch,
) -> Run:
    """Run the steps that are not done, and link all; `estimated`: the seconds of trainings by their steps."""
    recipe, plan = prepared.pinned_recipe(), prepared.plan
    if run.name != recipe.name:
        watch.note(
            f"Run {recipe.name!r} already holds results made with other settings, so this run is saved as {run.name!r}."
        )
    # Now the run names its steps, so nobody removes them; a step that was removed before that is run again.
    records = {step: record if store.state(step) == "done" else None for step, record in records.items()}
    bench, failed = prepared.bench(store, watch), dict[str, str]()
    for position, step in enumerate(steps, start=1):
        try:
            with warning_if_slow(watch, estimated.get(step.id)):
                record = records[step.id] or do_step(step, position, len(steps), bench)
        except QcftError as error:
            if step.kind != "suite" or isinstance(error, (Interrupted, ChangedInput)):
                raise
            watch.note(f"{step.title}: {error.message}", "warning")
            failed[step.stage] = error.message
            continue
        if records[step.id]:
            store.reuse(step.id, step.inputs(), watch)
            watch.emit(StepBegun(step.id, step.title, position, len(steps), "reused"))
        records[step.id] = record
        if run.stages[step.stage] == step.id:  # else the run holds more than this plan, and is not changed
            link_stage(run, step.stage, store.folder(step.id))
        if step.kind == "kept":
            judge_merge(step, record, recipe.merge, watch)
    earlier = {stage: step for stage, step in run.stages.items() if stage.startswith(ABILITIES)}
    stages = {**plan.stages(), **{stage: step for stage, step in earlier.items() if stage not in plan.stages()}}
    done = finished_run(run, recipe.model_copy(update={"name": run.name}), stages, store)
    return replace(done, failed=failed)


def raise_failed(done: Run) -> None:
    """Raise QcftError, naming them, where tasks that stages were to be evaluated on gave no score."""
    if done.failed:
        raise QcftError(
            f"{counted(len(done.failed), 'evaluation')} failed: "
            + ", ".join(stage.removeprefix(ABILITIES) for stage in done.failed),
            "the others are saved; run the same command again to retry these",
        )


def do_step(step: Step, position: int, total: int, bench: Bench) -> Record:
    """Run one step under its lock; another process may have finished it meanwhile."""
    store, watch = bench.store, bench.watch
    before = store.state(step.id)
    with store.claim(step.id, step.inputs(), watch) as folder:
        record = store.done(step.id)
        if record is not None:
            return record
        watch.emit(StepBegun(step.id, step.title, position, total, "resumed" if before == "partial" else "new"))
        if step.kind == "train" and world() > 1:
            broadcast_step(step.id)
        begun = time.monotonic()
        _reset_peak()
        exclude_from_gc()
        metrics = bench.do(step, folder)
        kind, peak = _peak()
        record = store.finish(step.id, {**metrics, f"peak_{kind}_bytes": peak}, time.monotonic() - begun)
    watch.emit(StepEnded(step.id, step.title, record["seconds"], step.work.summary(record["metrics"])))
    return record


def _reset_peak() -> None:
    import torch

    from qcft.models.load import device

    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak() -> tuple[str, int]:
    from qcft.models.load import peak_memory

    return peak_memory()
