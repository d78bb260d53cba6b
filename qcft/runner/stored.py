"""What a finished run has stored: its planned steps, its model, the rows that it was measured on."""

from __future__ import annotations

from collections.abc import Sequence

from qcft.errors import InputError, QcftError
from qcft.events import Watch
from qcft.prepare.model import PreparedModel
from qcft.prepare.prepared import Prepared
from qcft.recipe import Phase, Recipe
from qcft.steps.step import Step
from qcft.store import NamedRun, Store
from qcft.store.opened import altered, first_altered, read_begun, run_again


def stored_steps(run: NamedRun, store: Store) -> list[Step]:
    """The done steps of a run, except those whose step.json or done.json was altered."""
    begun = {stage: (step, read_begun(store.folder(step))) for stage, step in run.stages.items() if store.record(step)}
    return [Step.stored(step, stage, found["inputs"]) for stage, (step, found) in begun.items() if found]


def not_done(run: NamedRun, stage: str) -> InputError:
    """The error for a stage that a command needs and the run lacks."""
    return InputError(f"{stage} of the run {run.name!r} is not done", f"run it first: {run_again(run.folder)}")


def model_of(run: NamedRun, steps: Sequence[Step], watch: Watch) -> PreparedModel:
    """The run's model. Raises InputError where it is missing, or is not the one the run's steps were made with."""
    prepared = PreparedModel(run.recipe().model, watch)
    _check_model(run, prepared, steps)
    return prepared


def rows_of(run: NamedRun, steps: Sequence[Step], watch: Watch) -> Prepared:
    """The run's recipe with its data read, to measure on its held-out rows, which no step stores.

    Raises InputError where they cannot be read, or are not those that the run was measured on.
    """
    try:
        prepared = Prepared(run.recipe(), watch)
    except QcftError as error:
        raise InputError(
            f"the held-out rows of the run {run.name!r} cannot be read: {error.message}",
            f"restore the data where {str(run.folder / 'recipe.yaml')!r} names it; steps do not store these rows",
        ) from None
    _check_model(run, prepared, steps)
    _check_held_out(run, prepared, steps)
    return prepared


def check_parents(todo: Sequence[Step], store: Store, watch: Watch) -> None:
    """Check that what the steps depend on is done and intact. Raises InputError."""
    own = {step.id for step in todo}
    for parent in dict.fromkeys(one for s in todo for one in (s.weights, s.adapter, *s.under, *s.parents) if one):
        if parent not in own:
            found = first_altered(store.folder(parent), store.opened(parent).record["files"], watch)
            if found is not None:
                raise altered(store.folder(parent), found)


def check_same_data(run: NamedRun, prepared: Prepared, phases: Sequence[str], store: Store) -> None:
    """Check that phases of a recipe that continues a run still have the rows that the run was trained on, so that no
    phase is trained again unexpectedly. Raises InputError."""
    before, now, steps = run.recipe(), prepared.recipe, stored_steps(run, store)
    if (before.heldout, before.probe) != (now.heldout, now.probe):  # other rows are requested
        return
    same = [
        phase
        for phase in before.phases
        if phase.name in phases and any(_same_rows(phase, other) for other in now.phases)
    ]
    if found := changed_phases(prepared, before.model_copy(update={"phases": same}), steps):
        raise data_changed(run, found)
    if len(same) == len(now.phases):
        _check_held_out(run, prepared, steps)


def changed_phases(prepared: Prepared, recipe: Recipe, steps: Sequence[Step]) -> list[Phase]:
    """The recipe's phases whose rows, or adapter, are not those that the run's steps were made of."""
    rows = {step.stage: step.settings["rows"] for step in steps if step.kind in {"train", "adapter"}}
    return [one for one in recipe.phases if one.name in rows and prepared.rows_digest(one) != rows[one.name]]


def _same_rows(one: Phase, other: Phase) -> bool:
    """Whether two phases name the same rows and read them in the same way."""
    keys = ("name", "data", "adapter", "system", "thinking")
    limits = [(phase.train.max_length, phase.train.long_rows) for phase in (one, other)]
    return limits[0] == limits[1] and all(getattr(one, key) == getattr(other, key) for key in keys)


def _check_model(run: NamedRun, prepared: PreparedModel, steps: Sequence[Step]) -> None:
    models = {step.settings["model"] for step in steps if step.kind in {"train", "adapter", "probe"}}
    if models and prepared.model.digest not in models:
        raise InputError(
            f"the model {prepared.asked.name!r} is not the one that the run {run.name!r} was made with: its "
            "files changed",
            "restore it, or run the recipe as a new run: qcft run RECIPE --as NAME",
        )


def _check_held_out(run: NamedRun, prepared: Prepared, steps: Sequence[Step]) -> None:
    wanted = {step.settings["held_out"] for step in steps if step.kind == "probe"}
    if wanted and prepared.held_out_digest() not in wanted:
        raise data_changed(run, changed_phases(prepared, run.recipe(), steps))


def data_changed(run: NamedRun, phases: Sequence[Phase]) -> InputError:
    """The error for phases whose data is not what the run was made with; held-out rows where none is named."""
    named = [f"{one.name} ({one.adapter or ', '.join(source.path for source in one.sources())})" for one in phases]
    what = f"the data of {' and '.join(named)} changed" if named else "its held-out rows changed"
    return InputError(
        f"{what} since the run {run.name!r} was made",
        "restore it; to train on the changed data: qcft run RECIPE --as NAME",
    )
