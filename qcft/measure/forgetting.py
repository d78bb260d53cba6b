"""The table of stages and languages, and what changed since phase 1: from the artefacts of the probes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import cast

from qcft.measure.score import read_scores
from qcft.measure.stats import difference
from qcft.recipe import TESTS, Recipe
from qcft.recipe.stages import BASE, BASE_16BIT, KEPT, MERGED, PROBES, is_kept
from qcft.store.metrics import KeptMetrics, ProbeMetrics
from qcft.store.opened import DoneStep
from qcft.store.table import GroupChange, GroupOf, StageChange, StageScores, StagesTable

ENGLISH = "en"


def forgetting_table(recipe: Recipe, steps: Mapping[str, DoneStep]) -> StagesTable:
    """Stages x held-out groups, as plain data; `steps` maps stages to their done steps.

    `changes` compares the last stage with phase 1 (with a single phase: the unmodified model) and with the base as it
    is loaded, then each phase with the one before it, on the same rows and in the same precision: NLL differences in
    nats per answer token, with a paired 95% interval, and relative to the first of the two. A group is `trained` where
    this run or another arm trains on rows like it; the user's own test sets and the rows of `probe` are not.
    """
    stages = [_stage(stage, step, recipe) for stage, step in steps.items() if stage.startswith(PROBES)]
    apart = {"probe", *([TESTS] if recipe.heldout.data else [])}
    groups: list[GroupOf] = [
        {
            "name": name,
            "phase": g["phase"],
            "lang": g["lang"],
            "english": g["lang"] == ENGLISH,
            "trained": g["phase"] not in apart,
        }
        for name, g in (stages[0]["groups"].items() if stages else ())
    ]
    names = [s["stage"] for s in stages]
    reference = f"eval/{recipe.phases[0].name}" if len(recipe.phases) > 1 else "eval/base"
    last = f"eval/{recipe.phases[-1].name}"
    measured = [f"eval/{phase.name}" for phase in recipe.phases]
    pairs = [(start, last) for start in (reference, "eval/base")]
    pairs += pairwise(measured)
    changes = [
        _change(stages[names.index(start)], stages[names.index(end)], steps)
        for start, end in dict.fromkeys(pairs)
        if start in names and end in names and start != end
    ]
    kept = {
        stage.removeprefix(f"{KEPT}-"): cast("KeptMetrics", step.metrics)
        for stage, step in steps.items()
        if is_kept(stage)
    }
    return {
        "run": recipe.name,
        "model": recipe.model.name,
        "unit": "NLL in nats per answer token, share of answer tokens predicted right; lower NLL is better",
        "groups": groups,
        "stages": stages,
        "changes": changes,
        "kept": kept,
    }


def _stage(stage: str, step: DoneStep, recipe: Recipe) -> StageScores:
    metrics = cast("ProbeMetrics", step.metrics)
    sixteen = step.inputs["settings"]["quantize"] == "none"
    word = stage.removeprefix(PROBES)
    phases = [p.name for p in recipe.phases]
    if word in {BASE_16BIT, BASE}:
        name = BASE
    elif word in phases:
        name = word
    else:
        name = f"{word.removeprefix(f'{MERGED}-')} merged" if word != MERGED else f"{phases[0]} merged"
        name = name.replace("-dequantised merged", " merged onto the dequantised base")
    return {
        "stage": stage,
        "name": name,
        "precision": "16 bit" if sixteen else "NF4",
        "groups": metrics["groups"],
        "answers": metrics["answers"],
    }


def _change(start: StageScores, end: StageScores, steps: Mapping[str, DoneStep]) -> StageChange:
    before, after = (read_scores(steps[s["stage"]]) for s in (start, end))
    groups: dict[str, GroupChange] = {}
    for name in start["groups"]:
        change = difference(before[name], after[name])
        groups[name] = {**change.as_dict(), "relative": change.value / start["groups"][name]["nll"]}
    return {
        "from": start["stage"],
        "from_name": start["name"],
        "to": end["stage"],
        "to_name": end["name"],
        "groups": groups,
    }
