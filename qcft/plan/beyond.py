"""Steps that are requested beyond a finished run's recipe, planned from the steps that the run has. Pure.

Nothing that the run has is planned again, so neither its data nor an imported adapter need to be unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qcft.plan.plan import PhaseModel
from qcft.plan.planner import Planner
from qcft.prepare.digests import Digests
from qcft.prepare.settings import ModelSettings
from qcft.recipe import Answers, Dial, Goal, Recipe
from qcft.recipe.stages import BASE, PROBES, amount, dial_stage, goal_stage, kept_stage
from qcft.steps.dial import DialPoints
from qcft.steps.kept import Kept
from qcft.steps.probe import Probe
from qcft.steps.step import Step, Work

MODEL = ("model", "attn_implementation", "chat_template", "template")  # settings that every step of a run shares


@dataclass(frozen=True)
class Beyond:
    """The requested stage, its steps in order, and all steps that those depend on, by id."""

    stage: str
    steps: tuple[Step, ...]
    known: dict[str, Step]


def plan_beyond(recipe: Recipe, stored: Sequence[Step], goal: Goal | Dial) -> Beyond:
    """The steps of a merge or a dial of a phase; those that the run has are not changed.

    Raises KeyError, with the stage, for a stage that the run lacks.
    """
    planner = _Planner(recipe, stored, goal.phase)
    steps = planner.dial(goal) if isinstance(goal, Dial) else planner.reach(goal)
    return Beyond(steps[0].stage, steps, {step.id: step for step in planner.steps})


class _Planner(Planner):
    """Adds steps to those of a run."""

    def __init__(self, recipe: Recipe, stored: Sequence[Step], phase: str) -> None:
        found = {step.stage: step for step in stored}
        trained, measured = found[phase], found[f"{PROBES}{phase}"]
        super().__init__(recipe, Digests(trained.settings["model"], {}, {}, measured.settings["held_out"]))
        found_model = {key: trained.settings[key] for key in MODEL if key in trained.settings}
        self.model = ModelSettings(**{**found_model, "template": tuple(found_model.get("template", ()))})
        self.steps = list(stored)
        as_stored = measured.settings
        self.measuring = Probe(
            self.model, as_stored["quantize"], as_stored["held_out"], Answers.model_construct(**as_stored["answers"])
        )
        self.of_phase = PhaseModel(
            recipe.phase(phase), _phases_until(recipe, phase), trained.weights, trained.id, trained.under, measured,
            self._bare(trained),
        )  # fmt: skip

    def reach(self, goal: Goal) -> tuple[Step, ...]:
        """The goal's merge, its measurement and what it kept; added where the run lacks them."""
        live = self.of_phase
        work = replace(self.merging(), dtype=goal.dtype or self.recipe.merge.dtype)
        stage, title, quantize = goal_stage(goal, self.first), f"{goal.phase} merged", self.quantize
        if goal.dequantised:
            work = replace(work, base="dequantised")
            quantize, title = "none", f"{title} onto the dequantised base"
        if way := goal.way():
            work = replace(work, **way, seed=self.recipe.seed if goal.method else 0)
            title = f"{title} at {goal.by.label if goal.by else amount(way)}"
        made = (live.weights, live.adapter, live.under, work.settings())
        existing = (s for s in self.steps if s.kind == "merge" and (s.weights, s.adapter, s.under, s.settings) == made)
        merged = next(existing, None)
        if merged is None:
            if any(step.stage == stage for step in self.steps):  # made with other settings, and others may depend on it
                stage = f"{stage}-{goal.dtype or 'alone'}"
            merged = self.add(work, stage, f"merge {title}", goal.phase, live.weights, live.adapter, under=live.under)
        merged = _with_work(merged, work, f"merge {title}", goal.phase)
        stages = {step.stage: step for step in self.steps}
        measured = stages.get(f"{PROBES}{merged.stage}")
        probe = replace(self.measuring, quantize=quantize)
        if measured is None or measured.weights != merged.id:
            measured = self.add(probe, f"{PROBES}{merged.stage}", f"measure {title}", None, merged.id)
        measured = _with_work(measured, probe, f"measure {title}", None)
        if way:
            return merged, measured
        kept = stages.get(kept_stage(merged.stage))
        if kept is None or measured.id not in kept.parents:
            kept = self.kept(merged.stage, live, merged, measured)
        said = f"check what merging {' and '.join(live.phases)} kept"
        return merged, measured, _with_work(kept, Kept(live.phases, quantize), said, goal.phase)

    def dial(self, dial: Dial) -> tuple[Step, ...]:
        """The measurement of a phase's delta at several scales, added."""
        live = self.of_phase
        measuring = self.measuring
        work = DialPoints(
            measuring.model, measuring.quantize, measuring.held_out, measuring.answers, self.recipe.seed,
            tuple(dial.scales), dial.method, dial.density if dial.method else None,
            tuple(map(str, dial.by)),
        )  # fmt: skip
        step = self.add(
            work, dial_stage(dial), f"dial {dial.phase}", dial.phase, live.weights, live.adapter, under=live.under
        )
        return (step,)

    def _bare(self, trained: Step) -> Step:
        """The measurement of the weights under a phase's adapters."""
        for step in self.steps:
            alone = step.kind == "probe" and (step.weights, step.adapter) == (trained.weights, None)
            if alone and step.settings["quantize"] == self.quantize:
                return step
        raise KeyError(f"{PROBES}{BASE}")


def _with_work(step: Step, work: Work[Any], title: str, phase: str | None) -> Step:
    """A step of the run with its work, in case it has to be rebuilt; unchanged where another version made it."""
    found = Step(work, step.stage, title, phase, step.weights, step.adapter, step.parents, step.under)
    return found if found.id == step.id else step


def _phases_until(recipe: Recipe, phase: str) -> tuple[str, ...]:
    """The phases up to a phase whose deltas are live on top of one another."""
    names: tuple[str, ...] = ()
    for number, one in enumerate(recipe.phases):
        names = (*names, one.name) if number and one.start in {"stacked", "continue"} else (one.name,)
        if one.name == phase:
            break
    return names
