"""What commands list: recipes, steps, layers, replay rows, similarity of data sets. Prints nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

from qcft.cli.data_flags import sources_of
from qcft.cli.flags import second_phase
from qcft.errors import InputError, nearest
from qcft.events import Watch
from qcft.files import read_json_lines
from qcft.recipe import Recipe, Source, built_in_recipes, load_recipe, parse_assignments, recipe_from
from qcft.replay.share import ShareShown
from qcft.store import Store, list_runs, read_run
from qcft.store.metrics import ReplayMetrics
from qcft.store.results import Stage

if TYPE_CHECKING:
    from qcft.inspect.layers import LayersTable
    from qcft.measure.similarity import DataSide, SimilarityFound
    from qcft.replay.rows import ReplayShown


def layers_table(
    target: str, runs: Path, freeze: str | None, base: str | None, assignments: list[str], snr: bool, watch: Watch
) -> LayersTable:
    """What `qcft layers` shows, layer by layer: for a run, its last phase, or a phase 2 if it has only a phase 1; for a
    model, a phase that starts from it.

    Raises InputError.
    """
    from qcft.inspect.layers import describe_layers, weights_of

    run = read_run(runs, target) if any(found.name == target for found in list_runs(runs)) else None
    if run is not None:
        raw = run.recipe().model_dump(mode="json")
    else:
        raw = {"name": "layers", "model": {"name": target}, "phases": []}
    phase = raw["phases"][-1] if len(raw["phases"]) > 2 else second_phase(raw, run is None)
    if not phase.get("data") and not phase.get("adapter"):
        phase["data"] = ["qcft:instructions/en"]  # a placeholder for data that is not known yet
    if freeze is not None:
        phase["freeze"] = freeze
    if base is not None:
        raw["model"]["base"] = base
    try:
        recipe = recipe_from(raw, parse_assignments(assignments))
        weights = weights_of(recipe, run, Store(runs), watch)
    except InputError as error:
        names = [found.name for found in list_runs(runs)]
        if run is None and error.message.startswith("model:") and names:
            raise InputError(error.message, nearest(target, names) + f"or a run: {', '.join(names[:8])}") from None
        raise
    return describe_layers(recipe, weights, snr, watch)


class StepListed(TypedDict):
    """A step of a plan; `seconds` that it took, once it is done; `replay`: its share of the mix, for a replay step."""

    id: str
    stage: str
    title: str
    state: str
    seconds: float | None
    replay: ShareShown | None


def replay_shown(run: str, stages: Mapping[str, Stage], show: int, left_out: bool) -> ReplayShown:
    """A run's last replay: its metrics, and the first `show` of its rows, or with `left_out` of the dropped rows."""
    stage = [stage for stage in stages if stage == "replay" or stage.startswith("replay-")][-1]
    file = stages[stage].opened.file("left_out.jsonl" if left_out else "replay.jsonl")
    return {
        "run": run,
        "stage": stage,
        "file": str(file),
        **cast("ReplayMetrics", stages[stage].metrics),
        "samples": read_json_lines(file)[:show],
    }


def similarity_table(
    a: str, b: str | None, runs: Path, encoder: str | None, take: int | None, column: str | None, watch: Watch
) -> SimilarityFound:
    """What `qcft similarity` shows: DES of two data sets, or of a run's last two phases where only a run is named; for
    a run with one phase, DES between that phase and data that stands for its model's instruction tuning.

    For two phases of one run the result is also stored beside its report. Raises InputError.
    """
    from qcft.api import keep_similarity
    from qcft.measure.similarity import instruct_side, measure_similarity
    from qcft.models.encoders import LABSE

    run = a
    if b is None:
        recipe = read_run(runs, run).recipe()
        phases = [f"{run}:{phase.name}" for phase in recipe.phases[-2:]]
        sides = [_side(phase, runs, column) for phase in phases]
        if len(phases) == 1:
            sides = [instruct_side(recipe), *sides]
        kept = True
    else:
        sides = [_side(text, runs, column) for text in (a, b)]
        run = a.rpartition(":")[0]
        kept = run == b.rpartition(":")[0] and (runs / run / "run.json").is_file() and bool(_phase_sources(a, runs))
    if take:
        sides = [
            replace(side, sources=tuple(one.model_copy(update={"take": take}) for one in side.sources))
            for side in sides
        ]
    found = measure_similarity(sides[0], sides[1], LABSE if encoder is None else encoder, watch)
    if kept:
        keep_similarity(run, found, runs)
    return found


def _side(text: str, runs: Path, column: str | None) -> DataSide:
    """The data named by `RUN:PHASE` or by a list of data sets."""
    from qcft.measure.similarity import DataSide

    sources = _phase_sources(text, runs)
    if sources is None:
        sources = [one for raw in sources_of(text.split(",")) for one in Source(**raw).expanded()]
    return DataSide(text, tuple(sources), column)


def recipes_listed() -> list[dict[str, str]]:
    """Built-in recipes, each with the first sentence of its top comment."""
    listed = []
    for name, path in built_in_recipes().items():
        comment = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
        about = " ".join(line.lstrip("# ").strip() for line in comment)
        listed.append({"name": name, "about": re.split(r"(?<=[.])\s", about, maxsplit=1)[0]})
    return listed


def recipe_text(name: str) -> str:
    """The text of a built-in recipe. Raises InputError."""
    known = built_in_recipes()
    if name not in known:
        raise InputError(
            f"there is no built-in recipe {name!r}", nearest(name, list(known)) + f"available: {', '.join(known)}"
        )
    return known[name].read_text(encoding="utf-8")


def plan_listed(recipe: Recipe, runs: Path, watch: Watch) -> list[StepListed]:
    """The steps of a recipe's plan, with the state of each; for replay its share of the mix, as far as it is known."""
    from qcft.runner.forecast import replay_share
    from qcft.runner.recipe import plan_recipe

    store = Store(runs)
    prepared, states = plan_recipe(recipe, runs, watch)
    shares: dict[str, ShareShown] = {}
    for step in prepared.plan.steps:
        if step.kind == "replay" and (share := replay_share(prepared, prepared.recipe.phase(step.phase or ""), store)):
            shares[step.id] = share.shown()
            if warning := share.warning(step.phase or ""):
                watch.note(warning, "warning")
    return [
        {
            "id": step.id,
            "stage": step.stage,
            "title": step.title,
            "state": states[step.id],
            "seconds": record["seconds"] if (record := store.record(step.id)) else None,
            "replay": shares.get(step.id),
        }
        for step in prepared.plan.steps
    ]


def _phase_sources(text: str, runs: Path) -> list[Source] | None:
    """The sources of `RUN:PHASE` or `RECIPE:PHASE`; None if the text names neither."""
    name, colon, phase_name = text.rpartition(":")
    if not colon or text.startswith(SHIPPED) or Path(text).exists():
        return None
    if (runs / name / "run.json").is_file():
        recipe = read_run(runs, name).recipe()
    elif Path(name).is_file() or name in built_in_recipes():
        recipe = load_recipe(name)
    else:
        raise InputError(
            f"{name!r} is neither a run in {str(runs)!r} nor a recipe", "write RUN:PHASE, or the path of data"
        )
    names = [phase.name for phase in recipe.phases]
    if phase_name not in names:
        raise InputError(
            f"{name} has no phase {phase_name!r}", nearest(phase_name, names) + f"it has {', '.join(names)}"
        )
    phase = recipe.phase(phase_name)
    if phase.adapter:
        raise InputError(f"{text} is an adapter made elsewhere, whose data is not known", "name its data set instead")
    return phase.sources()


SHIPPED = "qcft:"
