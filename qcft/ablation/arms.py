"""Running an ablation: every arm is checked before any work, then each is run; if one fails, the others continue."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from qcft.data.encode import EncodedRow
from qcft.errors import InputError, Interrupted, QcftError, is_out_of_memory, short
from qcft.events import ArmChanged, Watch
from qcft.models.gpus import choose_gpu
from qcft.prepare.checks import check_prepared
from qcft.recipe import ArmRun, Phase, Recipe
from qcft.replay.amount import take_amount
from qcft.runner.libraries import quiet, set_environment
from qcft.runner.planned import PlannedRecipe
from qcft.runner.recipe import raise_failed, run_prepared
from qcft.steps.step import Step
from qcft.store import Store, open_run
from qcft.store.ablations import AblationIndex, Fault, open_ablation
from qcft.store.holding import working
from qcft.store.results import Run
from qcft.store.steps import writable
from qcft.training.batches import make_batches
from qcft.words import counted


@dataclass(frozen=True)
class PreparedArm:
    """An arm with its data read and its steps planned."""

    arm: ArmRun
    prepared: PlannedRecipe


def prepare_arms(arms: Sequence[ArmRun], watch: Watch, missing: dict[str, str] | None = None) -> list[PreparedArm]:
    """Read the data of all arms and plan their steps; what they share is read once.

    Raises InputError with the arm; with `missing`, records there by run what an arm lacks, and skips the arm.
    """
    set_environment()
    memo: dict[Any, Any] = {}
    found = []
    for number, arm in enumerate(arms):
        watch.progress("reading the arms", number, len(arms), "arms")
        try:
            with _naming(arm):
                recipe = _as_long(arm, watch, memo) if arm.as_long_as else arm.recipe
                found.append(PreparedArm(replace(arm, recipe=recipe), PlannedRecipe(recipe, watch, memo=memo)))
        except InputError as error:
            if missing is None:
                raise
            missing[arm.recipe.name] = error.message
    return found


def run_arms(
    plain: Recipe,
    arms: Sequence[ArmRun],
    runs: Path,
    watch: Watch,
    finished: Callable[[Run], Run],
    skip: Sequence[str] = (),
) -> AblationIndex:
    """Run all arms, reusing what is done; `finished` is called with each run, `skip` names runs that are not run.

    Raises InputError before anything is written; an arm that fails later is recorded, and the next one started.
    """
    ablation, prepared = begin_ablation(plain, arms, runs, watch)
    store = Store(runs)
    todo = [(name, one) for name, one in prepared if name not in skip]
    with working(runs, *(name for name, _ in todo)):
        _run_each(ablation, todo, store, watch, finished)
    return ablation


def _run_each(
    ablation: AblationIndex,
    todo: Sequence[tuple[str, PreparedArm]],
    store: Store,
    watch: Watch,
    finished: Callable[[Run], Run],
) -> None:
    """Run arms one after another; failures are recorded."""
    broken: dict[str, str] = {}  # step -> the run it failed in
    for (name, one), change in zip(todo, changes_of(todo), strict=True):
        watch.emit(change("running"))
        ablation.begin(name)
        try:
            _check_parents(one.prepared, store, broken)
            made = run_prepared(one.prepared, store, watch)
            done = finished(made)
            raise_failed(made)
        except Interrupted:
            ablation.end(name)
            raise
        except Exception as error:  # whatever ends one arm, from a full disk to a bug, must not end the others
            step = first_undone(one.prepared, store)
            what = fault_of(error, step)
            if step and step.kind != "suite":  # nothing depends on an evaluation
                broken.setdefault(step.id, name)
            ablation.end(name, what)
            watch.emit(change("failed", what["message"]))
            continue
        ablation.end(name)
        watch.emit(change("done", _in_words(done)))


def begin_ablation(
    plain: Recipe, arms: Sequence[ArmRun], runs: Path, watch: Watch
) -> tuple[AblationIndex, list[tuple[str, PreparedArm]]]:
    """Check all arms, then write the ablation's index and all named runs; returns the arms by their runs' names."""
    writable(runs)
    prepared = prepare_arms(arms, watch)
    store = Store(runs)
    quiet()
    todo = [one for one in prepared if first_undone(one.prepared, store)]
    if todo:
        choose_gpu()
    for one in todo:
        with _naming(one.arm):
            check_prepared(one.prepared)
    named = [(open_run(runs, one.prepared.pinned_recipe(), one.prepared.plan.stages()).name, one) for one in prepared]
    names = {(one.arm.arm, one.arm.seed): name for name, one in named}
    ablation = open_ablation(runs, plain, [one.arm for _, one in named], names)
    steps = {step.id for one in prepared for step in one.prepared.plan.steps}
    every = sum(len(one.prepared.plan.steps) for one in prepared)
    done = sum(store.state(step) == "done" for step in steps)
    for change in changes_of(named):
        watch.emit(change("to do"))
    watch.note(
        f"{ablation.name}: {counted(len(arms), 'run')}, {counted(every, 'step')}, {len(steps)} of them different, "
        f"{done} already done"
    )
    return ablation, named


def changes_of(named: Sequence[tuple[str, PreparedArm]]) -> list[Callable[..., ArmChanged]]:
    """For each arm a function that makes its event from a state and a text."""
    return [
        partial(ArmChanged, name, one.arm.arm, one.arm.seed, number, len(named))
        for number, (name, one) in enumerate(named, start=1)
    ]


def first_undone(prepared: PlannedRecipe, store: Store) -> Step | None:
    """The first step that is not done. Steps run in order, so if one failed it is this one."""
    return next((step for step in prepared.plan.steps if store.state(step.id) != "done"), None)


@contextmanager
def _naming(arm: ArmRun) -> Iterator[None]:
    """Name the arm in an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"arm {arm.arm!r}: {error.message}", error.hint) from None


def _as_long(arm: ArmRun, watch: Watch, memo: dict[Any, Any]) -> Recipe:
    """A mixed arm's recipe, its only phase as long as all phases of `as_long_as` together: in optimizer steps, or in
    answer tokens to the nearest row."""
    assert arm.as_long_as is not None
    apart = PlannedRecipe(arm.as_long_as, watch, memo=memo)
    laid_out = [
        make_batches(_rows_of(apart, phase), apart.order(phase, 0), phase.train) for phase in apart.recipe.phases
    ]
    (only,) = arm.recipe.phases
    length: dict[str, Any] = {"steps": sum(batches.steps for batches in laid_out)}
    if arm.match == "tokens":
        mixed = PlannedRecipe(arm.recipe, watch, memo=memo)
        rows, order = _rows_of(mixed, only), mixed.order(only, 0)
        fed = (rows[i] for epoch in itertools.count() for i in order(epoch))
        tokens = Fraction(sum(batches.answer_tokens for batches in laid_out))
        taken, _ = take_amount(fed, tokens, lambda row: row.answer_tokens)
        length = {"steps": None, "epochs": max(1, len(taken)) / len(rows)}
    train = only.train.model_copy(update=length)
    return arm.recipe.model_copy(update={"phases": [only.model_copy(update={"train": train})]})


def _rows_of(prepared: PlannedRecipe, phase: Phase) -> list[EncodedRow]:
    return [row for encoded in prepared.encoded(phase) for row in encoded.encoded]


def _check_parents(prepared: PlannedRecipe, store: Store, broken: Mapping[str, str]) -> None:
    """Raise QcftError where a step that is still to do has failed for another arm."""
    for step in prepared.plan.steps:
        if step.id in broken and store.state(step.id) != "done":
            raise QcftError(
                f"it depends on {step.id} ({step.title}), which failed in {broken[step.id]}", "see that run"
            )


def fault_of(error: Exception, step: Step | None) -> Fault:
    """What went wrong at a step, for the index; of an unexpected error also the traceback."""
    where, title = (step.id, step.title) if step else (None, None)
    if isinstance(error, QcftError):
        return {"message": error.message, "hint": error.hint, "step": where, "title": title}
    if is_out_of_memory(error):
        hint = "try a smaller train.max_length or train.micro_batch, or more frozen layers"
        return {"message": "memory ran out", "hint": hint, "step": where, "title": title}
    return {
        "message": f"unexpected {type(error).__name__}: {short(error, 300)}",
        "hint": "the index holds the traceback; run the same command again to retry",
        "step": where,
        "title": title,
        "traceback": traceback.format_exc(),
    }


def _in_words(done: Run) -> str:
    """The length of all trainings in steps and tokens, and the change of English since the base."""
    trained = done.trainings()
    length = (
        f"{counted(sum(m['steps'] for m in trained), 'step')}, {counted(sum(m['tokens'] for m in trained), 'token')}"
    )
    since_base = next((c for c in done.table["changes"] if c["from"] == "eval/base"), None)
    english = next((g["name"] for g in done.table["groups"] if g["english"]), None)
    if since_base is None or english is None:
        return length
    return f"{length}, English {since_base['groups'][english]['value']:+.3f} nats since the base"
