"""Running a recipe: every step that is not done, in order, and the table at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.errors import InputError, Interrupted, QcftError
from qcft.events import StepBegun, StepEnded, Watch
from qcft.measure.abilities import ABILITIES, abilities_table, continual_nll
from qcft.measure.forgetting import forgetting_table
from qcft.pipeline.forecast import forecast
from qcft.pipeline.libraries import quiet, set_environment, spare_the_collector
from qcft.pipeline.prepare import Prepared
from qcft.plan import Plan, Step
from qcft.recipe import Dial, Goal, Merge, Recipe
from qcft.store import NamedRun, Store, open_run
from qcft.store.runs import link_stage
from qcft.store.steps import writable
from qcft.training.ranks import hear, join, tell, world

if TYPE_CHECKING:
    from qcft.pipeline.work import Worker


@dataclass(frozen=True)
class Stage:
    """One stage of a run: its step, what it measured and where its files are."""

    name: str
    step: str
    metrics: Mapping[str, Any]
    seconds: float
    folder: Path


@dataclass(frozen=True)
class Run:
    """A finished run: its stages by name, and the table of stages and languages as plain data.

    `failed` says why a task that a stage was to be evaluated on gave no score.
    """

    name: str
    folder: Path
    stages: Mapping[str, Stage]
    table: Mapping[str, Any]
    goal: str | None = None  # the stage of a merge that was asked for beyond the recipe's
    failed: Mapping[str, str] = field(default_factory=dict)


def plan_recipe(recipe: Recipe, runs: Path, watch: Watch) -> tuple[Plan, dict[str, str]]:
    """The plan and the state of each step (`done`, `partial`, `to do`); nothing is written."""
    set_environment()
    prepared, store = Prepared(recipe, watch), Store(runs)
    return prepared.plan, {step.id: store.state(step.id) for step in prepared.plan.steps}


def run_recipe(
    recipe: Recipe, runs: Path, watch: Watch, goal: Goal | Dial | None = None, up_to: str | None = None
) -> Run:
    """Run a recipe to its end, or `up_to` a stage. Done steps are reused, partial ones gone on with.

    Of several processes that `accelerate launch` began, rank 0 calls this and the others `help_train`.
    Raises InputError before anything is written, QcftError when a step fails, Interrupted when a stop
    was asked for.
    """
    set_environment()
    # A cheap check first: a runs folder that can't be written would waste the reading of the data.
    writable(runs)
    if world() == 1:
        return run_prepared(Prepared(recipe, watch, goal), Store(runs), watch, up_to)
    join()
    if recipe.forgetting is not None and recipe.forgetting.stop is not None:
        raise InputError(
            "forgetting.stop: several processes train without the live probe",
            "--set forgetting.stop=null, or run without accelerate",
        )
    try:
        done = run_prepared(Prepared(recipe, watch, goal), Store(runs), watch, up_to)
    except Interrupted:
        tell(None)
        raise
    tell(None)
    return done


def help_train(recipe: Recipe, runs: Path, watch: Watch) -> None:
    """Train with rank 0 what it says, until it is done. Writes nothing but stored states of frozen layers."""
    from qcft.pipeline.work import Worker

    set_environment()
    join()
    quiet()
    prepared, store = Prepared(recipe, watch), Store(runs)
    steps = {step.id: step for step in prepared.plan.steps}
    while (step := hear()) is not None:
        Worker(prepared, store, watch).work(steps[step], store.folder(step))


def run_prepared(prepared: Prepared, store: Store, watch: Watch, up_to: str | None = None) -> Run:
    """`run_recipe` of a recipe whose data is read and whose steps are planned."""
    recipe, plan = prepared.recipe, prepared.plan
    steps = plan.up_to(up_to) if up_to else plan.steps
    records = {step.id: store.done(step.id, watch) for step in steps}
    finished = sum(record is not None for record in records.values())
    watch.note(f"{recipe.name}: {recipe.model.name}, {len(steps)} steps" + f", {finished} done before" * bool(finished))
    if finished < len(steps):
        quiet()
        missing = [step for step in steps if not records[step.id]]
        if any(step.kind != "suite" for step in missing):
            prepared.check()
        prepared.check_tasks(dict.fromkeys(s.settings["task"] for s in missing if s.kind == "suite"))
        forecast(prepared, missing, store, watch)
    recipe = prepared.pinned_recipe()
    run = open_run(store.runs, recipe, plan.stages())
    if run.name != recipe.name:
        watch.note(f"{recipe.name} has other results already; this is the run {run.name}")
    # Now that the run names its steps nobody removes them; what was removed since it was looked at is made again.
    records = {step: record if store.state(step) == "done" else None for step, record in records.items()}
    worker, failed = worker_for(prepared, store, watch), dict[str, str]()
    for position, step in enumerate(steps, start=1):
        try:
            record = records[step.id] or do_step(step, position, len(steps), worker, store, watch)
        except QcftError as error:
            if step.kind != "suite" or isinstance(error, Interrupted):
                raise
            watch.note(f"{step.title}: {error.message}", "warning")
            failed[step.stage] = error.message
            continue
        if records[step.id]:
            watch.tell(StepBegun(step.id, step.title, position, len(steps), "reused"))
        records[step.id] = record
        if run.stages[step.stage] == step.id:  # else the run holds more than this plan, and stays as it is
            link_stage(run, step.stage, store.folder(step.id))
        if step.kind == "kept":
            _judge_merge(step, record["metrics"], recipe.merge, watch)
    earlier = {stage: step for stage, step in run.stages.items() if stage.startswith(ABILITIES)}
    stages = {**plan.stages(), **{stage: step for stage, step in earlier.items() if stage not in plan.stages()}}
    done = finished_run(run, recipe.model_copy(update={"name": run.name}), stages, store)
    return replace(done, goal=plan.goal, failed=failed)


def raise_failed(done: Run) -> None:
    """Raise QcftError, naming them, where tasks that stages were to be evaluated on gave no score."""
    if done.failed:
        raise QcftError(
            f"{len(done.failed)} evaluation{'s' * (len(done.failed) > 1)} failed: "
            + ", ".join(stage.removeprefix("abilities/") for stage in done.failed),
            "the others are kept; the same command tries these again",
        )


def finished_run(run: NamedRun, recipe: Recipe, stages: Mapping[str, str], store: Store) -> Run:
    """A run's stages and table, from its done steps."""
    done = {}
    for stage, step in stages.items():
        record = store.record(step)
        if record is not None:
            done[stage] = Stage(stage, step, record["metrics"], record["seconds"], store.folder(step))
    folders = {name: stage.folder for name, stage in done.items()}
    table = forgetting_table(recipe, folders)
    names = {s["stage"].removeprefix("eval/"): (s["name"], s["precision"]) for s in table["stages"]}
    table |= {
        "continual": continual_nll(recipe, table),
        "abilities": abilities_table(recipe, folders, names),
    }
    return Run(run.name, run.folder, done, table)


def worker_for(prepared: Prepared, store: Store, watch: Watch) -> Callable[[], Worker]:
    """The one who does the steps, made for the first that is to be done, as that takes heavy libraries."""

    @cache
    def worker() -> Worker:
        from qcft.pipeline.work import Worker

        spare_the_collector()
        return Worker(prepared, store, watch)

    return worker


def do_step(
    step: Step, position: int, total: int, worker: Callable[[], Worker], store: Store, watch: Watch
) -> dict[str, Any]:
    """Do one step under its lock; another process may have done it meanwhile."""
    before = store.state(step.id)
    with store.claim(step.id, step.inputs(), watch) as folder:
        record = store.done(step.id)
        if record is not None:
            return record
        watch.tell(StepBegun(step.id, step.title, position, total, "resumed" if before == "partial" else "new"))
        if step.kind == "train" and world() > 1:
            tell(step.id)
        begun = time.monotonic()
        _reset_peak()
        metrics = worker().work(step, folder)
        kind, peak = _peak()
        record = store.finish(step.id, {**metrics, f"peak_{kind}_bytes": peak}, time.monotonic() - begun)
    watch.tell(StepEnded(step.id, step.title, record["seconds"], summarise(step, record["metrics"])))
    return record


def summarise(step: Step, metrics: Mapping[str, Any]) -> str:
    """What a step came to, in a few words."""
    if step.kind == "probe":
        return ", ".join(f"{name} {g['nll']:.3f}" for name, g in metrics["groups"].items()) + " (NLL)"
    if step.kind == "train":
        trained = f"{metrics['steps']} steps, {metrics['tokens']:,} tokens, loss {metrics['loss']:.3f}"
        return trained + _replayed(metrics) + _probed(metrics)
    if step.kind == "replay":
        left_out = ", ".join(f"{n} {reason}" for reason, n in metrics["left_out"].items())
        share = f"{metrics['share_of_rows']:.1%} of rows, {metrics['share_of_answer_tokens']:.1%} of answer tokens"
        return f"{metrics['rows']} rows: {share}" + (f"; left out {left_out}" if left_out else "")
    if step.kind == "merge":
        return f"{metrics['merged_weights']} weights changed"
    if step.kind == "dial":
        return f"{len(metrics['points'])} scales"
    if step.kind == "suite":
        return _evaluated(metrics)
    if step.kind == "layers":
        return f"{metrics['modules']} modules"
    if step.kind == "kept":
        share = metrics["share"]
        rows = metrics["gain"]["rows"]
        far = f"KL {metrics['kl']:.3f} nats, greedy agreement {metrics['agreement']:.0%}"
        if share is None:
            return f"not measurable: a gain of {metrics['gain']['value']:.3f} nats on {rows} rows is too small; {far}"
        return f"{share:.0%} of a gain of {metrics['gain']['value']:.3f} nats, on {rows} rows; {far}"
    return ""


def _evaluated(metrics: Mapping[str, Any]) -> str:
    if "score" in metrics:
        return f"{metrics['metric']} {metrics['score']:.4f}, {metrics['items']:,} items"
    if "languages" in metrics:
        shares = {lang: entry["right"] for lang, entry in metrics["languages"].items()}
        told = ", ".join(f"{lang} {share:.0%}" for lang, share in shares.items() if share is not None)
        return f"answers in the prompt's language: {told or 'none can be told'}"
    return f"{metrics['rows']} answers of {metrics['mean_tokens']:.0f} tokens"


def _replayed(metrics: Mapping[str, Any]) -> str:
    """Replay's share of what a training was fed."""
    fed = metrics["exposure"]
    replay = [entry for entry in fed if entry["source"].startswith("replay (")]
    if not replay:
        return ""
    rows, tokens = (sum(e[k] for e in replay) / sum(e[k] for e in fed) for k in ("rows", "answer_tokens"))
    return f"; of it replay {rows:.1%} of rows, {tokens:.1%} of answer tokens"


def _probed(metrics: Mapping[str, Any]) -> str:
    """What the live probe found, and what it cost."""
    found = metrics.get("forgetting")
    if not found:
        return ""
    last = next(probe for probe in reversed(found["probes"]) if probe["step"] <= metrics["steps"])
    return (
        f"; English NLL {last['change']:+.1%} ({len(found['probes'])} probes of {found['rows']} rows, "
        f"{found['share_of_time']:.1%} of the time)"
    )


def _judge_merge(step: Step, metrics: Mapping[str, Any], limits: Merge, watch: Watch) -> None:
    """Warn or refuse when merging lost what the phase learned."""
    far = None
    if limits.max_kl is not None and metrics["kl"] > limits.max_kl:
        far = f"KL {metrics['kl']:.3g} nats per answer token from the live adapter, over {limits.max_kl:g}"
    if limits.min_agreement is not None and metrics["agreement"] < limits.min_agreement:
        far = f"greedy agreement {metrics['agreement']:.1%} with the live adapter, under {limits.min_agreement:.1%}"
    if far:
        raise QcftError(f"merging {step.phase}: {far}", "start the next phase stacked, which is exact")
    share = metrics["share"]
    if share is None:
        if metrics["worse"]:
            loss = metrics["loss"]["value"]
            watch.note(f"merging {step.phase} made its held-out rows {loss:.3f} nats worse", "warning")
    elif limits.refuse_below is not None and share < limits.refuse_below:
        raise QcftError(
            f"merging {step.phase} kept only {share:.0%} of what it learned, under {limits.refuse_below:.0%}",
            "keep the adapter live under the next phase instead (start: stacked), which is exact; or train it longer "
            "or with a higher lr; --set merge.refuse_below=null goes on all the same. For use in 16 bits only: "
            "qcft merge --base dequantised",
        )
    elif share < limits.warn_below:
        watch.note(f"merging {step.phase} kept only {share:.0%} of what it learned", "warning")


def _reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak() -> tuple[str, int]:
    from qcft.models.load import peak_memory

    return peak_memory()
