"""The steps that evaluate: one for each stage and task, those that load the same weights one after another. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from qcft.errors import InputError, nearest
from qcft.plan.plan import PhaseModel
from qcft.prepare.digests import Digests
from qcft.recipe import ALPACA_EVAL, FIDELITY, Evaluate, Recipe
from qcft.recipe.stages import ABILITIES, BASE, PROBES
from qcft.steps.probe import Probe
from qcft.steps.step import Step
from qcft.steps.suite import Suite


def ability_steps(
    recipe: Recipe, digests: Digests, steps: Sequence[Step], live: Mapping[str, PhaseModel]
) -> list[Step]:
    """A step for each stage and task of `digests.tasks`. Raises InputError for an unknown stage."""
    if not digests.tasks:
        return []
    probes = {step.stage.removeprefix(PROBES): step for step in steps if step.kind == "probe"}
    chosen = recipe.evaluate.stages if recipe.evaluate.stages is not None else _usual(recipe, live)
    for name in chosen:
        if name not in probes:
            raise InputError(
                f"evaluate.stages: there is no stage {name!r}",
                nearest(name, list(probes)) + f"stages: {', '.join(probes)}",
            )
    loads: dict[tuple[str | None, str], list[Step]] = {}
    for name in dict.fromkeys(chosen):
        probe = probes[name]
        loads.setdefault((probe.weights, probe.settings["quantize"]), []).append(probe)
    return [
        _step(probe, task, digest, recipe.evaluate, digests)
        for probes_of_load in loads.values()
        for probe in probes_of_load
        for task, digest in digests.tasks.items()
    ]


def _usual(recipe: Recipe, live: Mapping[str, PhaseModel]) -> list[str]:
    """The base, and each phase once: merged where the next phase starts from the merge, else as it was trained."""
    stages = [BASE]
    for phase, after in zip(recipe.phases, [*recipe.phases[1:], None], strict=True):
        merged = after is not None and after.start == "merged"
        step = live[after.name].bare if after is not None and merged else live[phase.name].measured
        stages.append(step.stage.removeprefix(PROBES))
    return stages


def _step(probe: Step, task: str, digest: str, evaluate: Evaluate, digests: Digests) -> Step:
    asked: dict[str, Any]
    if task == FIDELITY:
        most = min(evaluate.fidelity.max_new_tokens, evaluate.max_new_tokens or evaluate.fidelity.max_new_tokens)
        asked = {**evaluate.fidelity.model_dump(), "max_new_tokens": most}
    else:
        asked = {"limit": evaluate.limit, "max_new_tokens": evaluate.max_new_tokens, "batch": evaluate.batch}
        if task != ALPACA_EVAL:
            asked |= {"shots": evaluate.shots, "lm_eval": digests.lm_eval}
    measured = cast("Probe", probe.work)
    work = Suite(measured.model, measured.quantize, task, digest, asked)
    name = probe.stage.removeprefix(PROBES)
    title = f"evaluate {probe.title.removeprefix('measure ')} on {task}"
    stage = f"{ABILITIES}{name}/{task}"
    return Step(work, stage, title, None, probe.weights, probe.adapter, (), probe.under)
