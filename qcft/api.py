"""qcft from Python: what the command line does, without printing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.ablation.arms import run_arms
from qcft.ablation.on_ray import run_on_ray
from qcft.errors import InputError, QcftError
from qcft.events import Listener, Watch
from qcft.files import reporting_full_disk, reporting_unwritable, write_sealed
from qcft.measure.results import finished_run
from qcft.measure.similarity import SimilarityFound
from qcft.recipe import ArmRun, Recipe, chosen_arms, load_ablation, load_recipe, recipe_from
from qcft.report.ablation import Outcome, outcome
from qcft.report.arms import Evidence, arms_of
from qcft.report.build import build_report
from qcft.report.cost import RunCost, costs_of, in_all
from qcft.report.drift_section import drift_name
from qcft.report.shown import DriftShown, ReportWritten
from qcft.report.write import write_report
from qcft.runner.recipe import Check, run_recipe
from qcft.runner.stored import check_same_data
from qcft.store import Store, read_run
from qcft.store.ablations import AblationIndex, list_ablations
from qcft.store.holding import working
from qcft.store.metrics import LossTerms
from qcft.store.results import Run
from qcft.store.steps import FREE

if TYPE_CHECKING:
    from qcft.ablation.dry_run import AblationPlan


def run(
    recipe: str | Path | Recipe,
    *,
    set: Mapping[str, Any] | None = None,
    runs: str | Path = "runs",
    listener: Listener | None = None,
) -> Run:
    """Run a recipe (a file, a built-in name, or one already loaded) to its end; returns its stages and table.

    `set` changes recipe keys: `{"phase2.replay.ratio": 0.1}`. `listener` is called with every event.
    Raises qcft.QcftError. A task that a stage was to be evaluated on and that failed is in the run's `failed`.
    """
    return run_watched(loaded_recipe(recipe, set), Path(runs), Watch(listener))


def loaded_recipe(recipe: str | Path | Recipe, set: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe (a file, a built-in name, or one already loaded) with the keys in `set` changed. Raises InputError."""
    if isinstance(recipe, Recipe):
        return recipe_from(recipe.model_dump(mode="json"), set)
    return load_recipe(recipe, set)


def run_watched(
    recipe: Recipe, runs: Path, watch: Watch, of: str | None = None, phases: Sequence[str] | None = None
) -> Run:
    """Run a recipe and write its report. `of`: a run that it continues, whose `phases` (all by default) must not be
    trained again because their data changed."""
    done = run_recipe(recipe, runs, watch, check=_same_data(of, phases, runs), undo=of is not None)
    reported(done, runs)
    return done


def ablate(
    recipe: str | Path,
    *,
    set: Mapping[str, Any] | None = None,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    runs: str | Path = "runs",
    listener: Listener | None = None,
) -> AblationIndex:
    """Run a recipe's arms x seeds in this process (all, or those named), reusing what is done.

    An arm that fails is recorded and the next one started: see `states()` of the result. Its page is in report/.
    `set` and `listener` as for `run`. Raises qcft.InputError before anything is written.
    """
    plain, every = load_ablation(recipe, set)
    done = ablate_watched(plain, chosen_arms(every, arms, seeds), Path(runs), Watch(listener))
    report([done.name], Path(runs), Watch())
    return done


def ablate_watched(
    plain: Recipe, arms: Sequence[ArmRun], runs: Path, watch: Watch, skip: Sequence[str] = (), on: str | None = None
) -> AblationIndex:
    """Run arms, each run's report written as it ends; `skip` names runs that are not run.

    `on`: `ray` for a Ray cluster on this machine, `ray:ADDRESS` for another. Raises InputError.
    """
    engine, colon, address = (on or "").partition(":")
    if engine == "ray" and bool(address.strip()) == bool(colon):
        return run_on_ray(plain, arms, runs, watch, lambda done: reported(done, runs), address or None)
    if on is not None:
        raise InputError(f"--on {on!r} is neither ray nor ray:ADDRESS", "use --on ray for a cluster on this machine")
    return run_arms(plain, arms, runs, watch, lambda done: reported(done, runs), skip)


def plan_ablation(arms: Sequence[ArmRun], runs: Path, watch: Watch) -> AblationPlan:
    """What running these arms would do, and the time and disk it needs; nothing is written."""
    from qcft.ablation.dry_run import ablation_plan

    return ablation_plan(arms, runs, watch)


def ablation_outcome(ablation: AblationIndex) -> Outcome:
    """The results of an ablation's arms so far, side by side."""
    runs = ablation.runs
    return outcome(ablation, {state.run: read(state.run, runs) for state in ablation.states() if state.state == "done"})


def reported(done: Run, runs: Path) -> Run:
    """Write a run's report; returns the run as it is now, which may hold more than was requested."""
    with working(runs, done.name), reporting_full_disk(runs, FREE):
        whole = evidence(done.name, runs)
        write_report(done.folder / "report", build_report(arms_of([whole])))
    return whole.run


def report(names: Sequence[str | None], runs: Path, watch: Watch, to: Path | None = None) -> ReportWritten:
    """Write the report of a run (None: the latest), or of several compared as arms.

    An ablation's name stands for its runs. It goes to `to`, by default the run's or the ablation's own report/, or
    report/ here for several runs. Raises QcftError.
    """
    made = _ablation(names, runs)
    wanted: list[str | None] = [*made] if made else list(dict.fromkeys(names or [None]))
    found = []
    for done, name in enumerate(wanted):
        watch.progress("reading the runs", done, len(wanted), "runs")
        watch.check_stop()
        found.append(evidence(name, runs))
    document = build_report(arms_of(found, made), names[0] if made else None)
    own = runs / str(names[0]) if made else found[0].run.folder if len(found) == 1 else Path()
    place = to or own / "report"
    elsewhere = "write it to another folder with --to, or print its tables with `qcft show`"
    with reporting_full_disk(to or own, FREE), reporting_unwritable(place, "the report's folder", elsewhere):
        page = write_report(place, document)
    return {
        "page": str(page),
        "runs": [one.run.name for one in found],
        "question": document.question,
        "answer": document.answer,
        "tables": {table.name: [dict(record) for record in table.records] for table in document.tables()},
    }


def _ablation(names: Sequence[str | None], runs: Path) -> dict[str, str] | None:
    """The arm of each run of an ablation that was started, where only the ablation's name is given."""
    if len(names) != 1 or names[0] not in list_ablations(runs):
        return None
    index = AblationIndex(runs, names[0]).document
    begun = {entry["run"]: entry["arm"] for entry in index["runs"] if (runs / entry["run"] / "run.json").is_file()}
    if not begun:
        raise InputError(f"no run of the ablation {names[0]!r} was started", "run it first: qcft ablate RECIPE")
    return begun


def cost(run: Run) -> RunCost:
    """What a run's finished steps needed: time, tokens, memory, disk."""
    costs = costs_of(run)
    whole = in_all(costs)
    return {
        "steps": len(costs),
        "seconds": whole.seconds,
        "tokens": whole.tokens,
        "peak_bytes": whole.peak_bytes,
        "disk_bytes": whole.disk_bytes,
    }


def terms(run: Run) -> dict[str, LossTerms]:
    """The values of the terms of each phase's loss, for phases that have some."""
    trained = {name: stage.training for name, stage in run.stages.items()}
    return {name: terms for name, one in trained.items() if one and (terms := one.get("terms"))}


def evidence(name: str | None, runs: Path) -> Evidence:
    """A run as it is now, with what its adapters changed."""
    from qcft.layers.change import summed_changes
    from qcft.models.load import quiet_libraries

    quiet_libraries()
    named = read_run(runs, name)
    recipe = named.recipe()
    run = finished_run(named, recipe, named.stages, Store(runs))
    changes = {}
    for phase in recipe.phases:
        if phase.name in run.stages:
            adapter = run.stages[phase.name].opened.part("adapter")
            try:
                changes[phase.name] = summed_changes([adapter])
            except QcftError:
                continue  # an adapter made elsewhere, of more than plain LoRA
    return Evidence(recipe, run, changes)


def drift(
    name: str | None,
    runs: Path,
    watch: Watch,
    *,
    since: str | None = None,
    to: str | None = None,
    against: str | None = None,
    rows: int = 16,
    texts: Mapping[str, Path] | None = None,
    apart: bool = False,
) -> DriftShown:
    """Measure how far a phase (the last by default) moved a run's model, layer by layer, and draw it.

    `apart` compares as the paper does: phase 1, and the same base trained on the last phase's data alone. Raises
    QcftError.
    """
    from qcft.inspect.drift import DriftRequest, measure_drift

    named, stage, found = measure_drift(DriftRequest(name, since, to, against, rows, texts, apart), runs, watch)
    reported(read(named.name, runs), runs)
    drawing = named.folder / "report" / "plots" / f"{drift_name(stage)}.svg"
    return {"run": named.name, **found, "drawing": str(drawing)}


def keep_similarity(name: str, found: SimilarityFound, runs: Path) -> None:
    """Store how similar a run's phases are beside its report, and in it."""
    place = runs / name / "report"
    with working(runs, name):
        place.mkdir(exist_ok=True)
        write_sealed(place / "similarity.json", dict(found))
    reported(read(name, runs), runs)


def replay_watched(recipe: Recipe, runs: Path, watch: Watch, of: str | None = None) -> Run:
    """Run a recipe up to its last phase's replay rows, and no further; `of`: a run with this recipe, or with the
    recipe it was made from.

    Rows that the run has are returned unchanged. Raises InputError where the recipe has no replay.
    """
    replayed = [phase.name for phase in recipe.phases if phase.replay and phase.replay.ratio]
    if not replayed:
        raise InputError(
            f"the recipe {recipe.name!r} has no replay",
            f"set a ratio, for example --set {recipe.phases[-1].name}.replay=0.2",
        )
    stage = "replay" if len(replayed) == 1 else f"replay-{replayed[-1]}"
    named, store = read_run(runs, of) if of else None, Store(runs)
    if named and stage in named.stages and recipe == named.recipe() and store.done(named.stages[stage], watch):
        return finished_run(named, recipe, {stage: named.stages[stage]}, store)
    return run_recipe(recipe, runs, watch, stage, _same_data(of, None, runs))


def _same_data(of: str | None, phases: Sequence[str] | None, runs: Path) -> Check | None:
    if of is None:
        return None
    run = read_run(runs, of)
    names = [phase.name for phase in run.recipe().phases] if phases is None else phases
    return lambda prepared: check_same_data(run, prepared, names, Store(runs))


def read(name: str | None, runs: str | Path = "runs") -> Run:
    """A run as it is now, by name or the latest: its done stages and their table. Raises QcftError."""
    named = read_run(Path(runs), name)
    return finished_run(named, named.recipe(), named.stages, Store(Path(runs)))
