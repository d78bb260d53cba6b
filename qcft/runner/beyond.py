"""Merges and dials of a finished run: made from what its steps stored, never by training again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from qcft.errors import InputError
from qcft.events import StepBegun, Watch
from qcft.measure.results import finished_run
from qcft.models.gpus import choose_gpu
from qcft.plan.beyond import Beyond, plan_beyond
from qcft.prepare.model import PreparedModel
from qcft.prepare.prepared import Prepared
from qcft.prepare.rows import Rows
from qcft.recipe import Dial, Goal, Recipe
from qcft.runner.dialling import check_layers
from qcft.runner.libraries import quiet, set_environment
from qcft.runner.recipe import do_step
from qcft.runner.stored import check_parents, model_of, not_done, rows_of, stored_steps
from qcft.steps.kept import judge_merge
from qcft.steps.step import Bench, Step
from qcft.store import NamedRun, Store
from qcft.store.holding import working
from qcft.store.opened import BEGUN, altered
from qcft.store.results import Run
from qcft.store.runs import add_stage, link_stage
from qcft.store.steps import writable
from qcft.training.determinism import prepare_cublas

MEASURE = {"probe", "kept", "dial"}  # kinds of step that need held-out rows


def reach(run: NamedRun, recipe: Recipe, goal: Goal | Dial, runs: Path, watch: Watch) -> Run:
    """Merge or dial a phase of a run, reusing its done steps; returns the run with the result in it.

    A merge whose held-out rows are missing is made but not measured, with a warning.
    Raises InputError, before anything is written, for what is missing or was altered.
    """
    set_environment()
    if recipe.deterministic:
        prepare_cublas()
    store = Store(runs)
    stored = stored_steps(run, store)
    plan = _plan(run, recipe, stored, goal, store)
    todo = [step for step in plan.steps if store.done(step.id, watch) is None]
    bench = None
    if todo:
        writable(runs)
        check_parents(todo, store, watch)
        prepared, todo = _prepare(run, stored, todo, isinstance(goal, Dial), watch)
        if prepared and goal.by:
            check_layers(goal.by if isinstance(goal, Dial) else [goal.by], prepared)
        bench = _bench(prepared, plan, store, watch) if prepared else None
    steps = [step for step in plan.steps if step in todo or store.state(step.id) == "done"]
    with working(runs, run.name) if todo else nullcontext():
        for step in steps:
            if run.stages.get(step.stage) != step.id:
                add_stage(run, step.stage, step.id)  # a step that a run names is never removed
        for position, step in enumerate(steps, start=1):
            if bench and step in todo:
                record = do_step(step, position, len(steps), bench)
            else:
                store.reuse(step.id, step.inputs(), watch)
                record = store.opened(step.id).record
                watch.emit(StepBegun(step.id, step.title, position, len(steps), "reused"))
            link_stage(run, step.stage, store.folder(step.id))
            if step.kind == "kept":
                judge_merge(step, record, recipe.merge, watch)
    stages = {**run.stages, **{step.stage: step.id for step in steps}}
    done = finished_run(replace(run, stages=stages), recipe.model_copy(update={"name": run.name}), stages, store)
    return replace(done, goal=plan.stage)


def _plan(run: NamedRun, recipe: Recipe, stored: Sequence[Step], goal: Goal | Dial, store: Store) -> Beyond:
    try:
        return plan_beyond(recipe, stored, goal)
    except KeyError as error:
        stage = str(error.args[0])
        if stage in run.stages and store.open(run.stages[stage]) is not None:
            raise altered(store.folder(run.stages[stage]), BEGUN) from None
        raise not_done(run, stage) from None


def _prepare(
    run: NamedRun, stored: Sequence[Step], todo: list[Step], must_measure: bool, watch: Watch
) -> tuple[PreparedModel | None, list[Step]]:
    """What the steps need to run, and the steps that can run: without held-out rows, those that need none."""
    if any(step.kind in MEASURE for step in todo):
        try:
            return rows_of(run, stored, watch), todo
        except InputError as error:
            if must_measure:
                raise
            watch.note(f"what the merge kept is not measured: {error.message}", "warning")
    todo = [step for step in todo if step.kind not in MEASURE]
    return model_of(run, stored, watch) if todo else None, todo  # merges need the model only


def _bench(prepared: PreparedModel, plan: Beyond, store: Store, watch: Watch) -> Bench:
    quiet()
    if card := choose_gpu():
        watch.note(f"running on {card}; to use another, set QCFT_DEVICE=cuda:N")
    rows = prepared.for_steps if isinstance(prepared, Prepared) else Rows(prepared)
    return Bench(rows.model, rows, prepared.inputs, plan.known, store, watch)
