"""From a recipe and the digests of what it names to the ordered steps that make it up. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcft.plan.plan import PhaseModel, Plan
from qcft.plan.suite_steps import ability_steps
from qcft.prepare.digests import Digests
from qcft.prepare.settings import ModelSettings, limits_of
from qcft.recipe import Phase, Recipe
from qcft.recipe.stages import BASE, BASE_16BIT, PROBES, kept_stage, merged_stage
from qcft.steps.adapter import Adapter
from qcft.steps.kept import Kept
from qcft.steps.layers import Layers
from qcft.steps.merge import Merge
from qcft.steps.probe import Probe
from qcft.steps.replay import AnswerPool, DrawnFrom, ReplayRows
from qcft.steps.step import Step, Work
from qcft.steps.train import Training


def make_plan(recipe: Recipe, digests: Digests) -> Plan:
    """Lay out the steps: measure the base; train, measure, merge and check each phase in turn; then what the stages
    are evaluated on."""
    return Planner(recipe, digests).plan()


@dataclass(frozen=True)
class _Start:
    """What a phase starts from: weights, the adapter it continues, the adapters frozen under the one it trains."""

    weights: str | None
    continued: str | None
    under: tuple[str, ...]

    @property
    def stack(self) -> tuple[str, ...]:
        """The adapters of the model that the phase starts from."""
        return (*self.under, self.continued) if self.continued else self.under


class Planner:
    """Lays out the steps of a recipe, each after those it depends on."""

    def __init__(self, recipe: Recipe, digests: Digests) -> None:
        self.recipe = recipe
        self.first = recipe.phases[0].name
        self.digests = digests
        self.steps: list[Step] = []
        self.pools: dict[str, Step] = {}
        model = recipe.model
        self.model = ModelSettings(
            digests.model, model.attn_implementation, model.chat_template, tuple(digests.template)
        )
        self.quantize = model.quantize
        self.chain: str | None = None  # the merge step that holds every earlier delta, as far as merged
        self.unmerged: list[PhaseModel] = []
        self.live: dict[str, PhaseModel] = {}

    def plan(self) -> Plan:
        """All steps of the recipe."""
        if self.quantize != "none":
            self.probe(BASE_16BIT, "base, 16 bit", None, None, quantize="none")
        bare = self.probe(BASE, f"base, {self.precision()}", None, None)
        for number, phase in enumerate(self.recipe.phases):
            weights: str | None = None
            continued: str | None = None
            under: tuple[str, ...] = ()
            phases: tuple[str, ...] = ()
            if number and phase.start == "merged":
                weights, bare = self.merge_all()
            elif number and phase.start in {"stacked", "continue"}:
                below = self.unmerged.pop()  # this phase's model holds what that one held
                weights, bare, phases, under = below.weights, below.bare, below.phases, below.stack
                if phase.start == "continue":
                    continued, under = below.adapter, below.under
            else:
                bare = self.step_of(PROBES + BASE)
            start = _Start(weights, continued, under)
            replay = self.replay(phase, start) if phase.replay and phase.replay.ratio > 0 else None
            layers = self.layers(phase, weights)
            trained = self.adapter(phase) if phase.adapter else self.train(phase, start, replay, layers)
            measured = self.probe(phase.name, phase.name, weights, trained.id, under=under)
            live = PhaseModel(phase, (*phases, phase.name), weights, trained.id, under, measured, bare)
            self.unmerged.append(live)
            self.live[phase.name] = live
        self.steps += ability_steps(self.recipe, self.digests, self.steps, self.live)
        return Plan(tuple(self.steps), self.live, self.pools)

    def merge_all(self) -> tuple[str | None, Step]:
        """Merge every delta that is not merged yet onto the chain; returns its weights and their measurement."""
        measured = self.step_of(PROBES + BASE)
        for live in self.unmerged:
            name = live.phase.name
            stage, onto = merged_stage(name, self.first), self.chain
            title = f"merge {' and '.join(live.phases)}"
            merged = self.add(self.merging(), stage, title, name, onto, live.adapter, under=live.under)
            measured = self.probe(stage, f"{name} merged, {self.precision()}", merged.id, None)
            if live.weights == onto:  # else the adapter meets other weights than it was trained on
                self.kept(stage, live, merged, measured)
            self.chain = merged.id
        self.unmerged.clear()
        return self.chain, measured

    def merging(self) -> Merge:
        """The merge that the recipe sets."""
        return Merge(self.model, self.recipe.merge.dtype)

    def kept(self, stage: str, live: PhaseModel, merged: Step, measured: Step) -> Step:
        """The comparison of a merge with the live model."""
        title = f"check what merging {' and '.join(live.phases)} kept"
        work = Kept(live.phases, measured.settings["quantize"])
        parents = (live.bare.id, live.measured.id, measured.id)
        return self.add(work, kept_stage(stage), title, live.phase.name, parents=parents)

    def probe(
        self,
        stage: str,
        title: str,
        weights: str | None,
        adapter: str | None,
        quantize: str | None = None,
        under: tuple[str, ...] = (),
    ) -> Step:
        """A measurement of one stage on all held-out rows."""
        work = Probe(self.model, quantize or self.quantize, self.digests.held_out, self.recipe.answers)
        return self.add(work, f"{PROBES}{stage}", f"measure {title}", None, weights, adapter, under=under)

    def replay(self, phase: Phase, start: _Start) -> Step:
        """The rows of replay a phase mixes in, drawn from pools that do not depend on how many there are."""
        asked = phase.replay
        assert asked is not None
        parts = []
        for part, digest in zip(asked.parts(), self.digests.replay[phase.name], strict=True):
            pool = self.pool(phase, start, digest).id if part.kind == "generative" else None
            parts.append(DrawnFrom(part.kind, part.weight, pool, digest, part.phase))
        generative = any(part.pool for part in parts)
        work = ReplayRows(
            self.model,
            tuple(parts),
            asked.ratio,
            asked.unit,
            asked.on_shortfall,
            asked.filters if generative else None,
            self.digests.phases[phase.name],
            limits_of(phase),
            self.recipe.phases[0].system,
            self.digests.balance.get(phase.name),
            2 if generative and asked.filters.refusals else 1,
        )
        stage = self.stage_name("replay", phase.name)
        title = f"{'generate' if generative else 'choose'} replay for {phase.name}"
        weights, stack = (start.weights, start.stack) if generative else (None, ())
        adapter = stack[-1] if stack else None
        return self.add(work, stage, title, phase.name, weights, adapter, under=stack[:-1])

    def pool(self, phase: Phase, start: _Start, prompts: str) -> Step:
        """The answers of the model the phase starts from to prompts in their order; as many as were needed so far."""
        asked, system, stack = phase.replay, self.recipe.phases[0].system, start.stack
        assert asked is not None
        how = (asked.max_new_tokens, asked.temperature, asked.top_p, asked.chunk, asked.batch)
        seed, most = self.recipe.seed, phase.train.max_length
        work = AnswerPool(self.model, self.quantize, prompts, seed, system, most, *how)
        title, adapter = f"answers for the replay of {phase.name}", stack[-1] if stack else None
        pool = Step(work, "pool", title, phase.name, start.weights, adapter, (), stack[:-1])
        return self.pools.setdefault(pool.id, pool)

    def layers(self, phase: Phase, weights: str | None) -> Step | None:
        """What a freeze spec depends on: how much earlier phases changed each module, or its signal-to-noise ratio."""
        measure = phase.freeze.measure
        if measure is None:
            return None
        stage = self.stage_name("layers", phase.name)
        if measure == "snr":
            title = f"measure signal to noise for {phase.name}"
            return self.add(Layers(self.digests.model, measure), stage, title, phase.name, weights)
        names = [p.name for p in self.recipe.phases]
        number = names.index(phase.name)
        # An adapter that a later phase continued is part of that phase's.
        earlier = [
            name
            for name, later in zip(names[:number], self.recipe.phases[1:], strict=False)
            if later.name == phase.name or later.start != "continue"
        ]
        work = Layers(self.digests.model, measure, None if earlier else self.digests.base)
        title = f"measure what {' and '.join(earlier) or 'tuning the base'} changed"
        parents = tuple(self.step_of(name).id for name in earlier)
        return self.add(work, stage, title, phase.name, parents=parents)

    def train(self, phase: Phase, start: _Start, replay: Step | None, layers: Step | None) -> Step:
        """The training of a phase's adapter."""
        recipe = self.recipe
        work = Training(
            self.model,
            self.quantize,
            recipe.seed,
            recipe.lora,
            phase.freeze,
            self.digests.phases[phase.name],
            limits_of(phase),
            recipe.phases[0].system if replay else None,
            phase.train,
            self.digests.balance.get(phase.name),
            recipe.deterministic,
            # Earlier versions rounded the adapter to bf16 as the phase started.
            "float32" if start.continued and self.quantize != "none" else None,
            phase.anchor.resolved() if phase.anchor else None,
            phase.replay.loss if phase.replay and replay else "answer",
            recipe.lora.peft.given(),
            recipe.forgetting,
            self.digests.english.get(phase.name),
        )
        parents = tuple(step.id for step in (replay, layers) if step)
        title, weights = f"train {phase.name}", start.weights
        return self.add(work, phase.name, title, phase.name, weights, start.continued, parents, start.under)

    def adapter(self, phase: Phase) -> Step:
        """An adapter made elsewhere, imported as a phase."""
        work = Adapter(self.model, self.digests.phases[phase.name], phase.adapter or "")
        return self.add(work, phase.name, f"import the adapter of {phase.name}", phase.name)

    def add(
        self,
        work: Work[Any],
        stage: str,
        title: str,
        phase: str | None,
        weights: str | None = None,
        adapter: str | None = None,
        parents: tuple[str, ...] = (),
        under: tuple[str, ...] = (),
    ) -> Step:
        """Add a step at the end."""
        step = Step(work, stage, title, phase, weights, adapter, parents, under)
        self.steps.append(step)
        return step

    def step_of(self, stage: str) -> Step:
        """The step of a stage."""
        return next(step for step in self.steps if step.stage == stage)

    def stage_name(self, word: str, phase: str) -> str:
        """`replay` the first time, `replay-NAME` later."""
        return word if all(step.stage != word for step in self.steps) else f"{word}-{phase}"

    def precision(self) -> str:
        """The precision of the base, in words."""
        return "NF4" if self.quantize == "nf4" else "16 bit"
