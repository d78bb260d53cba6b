"""From a recipe and the digests of what it names to the ordered steps that make it up. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qcft.plan.plan import CIRCUMSTANCES, Live, Plan
from qcft.plan.suite_steps import ability_steps
from qcft.prepare.digests import Digests
from qcft.recipe import Phase, Recipe
from qcft.recipe.stages import BASE, BASE_16BIT, PROBES, kept_stage, merged_stage
from qcft.steps.step import Kind, Step


def make_plan(recipe: Recipe, digests: Digests) -> Plan:
    """Lay out the steps: measure the base; train, measure, merge and check each phase in turn; then what the stages
    are evaluated on."""
    return Planner(recipe, digests).plan()


@dataclass(frozen=True)
class _Start:
    """What a phase starts from: weights, the adapter it goes on with, the adapters frozen under the one it trains."""

    weights: str | None
    goes_on: str | None
    under: tuple[str, ...]

    @property
    def stack(self) -> tuple[str, ...]:
        """The adapters of the model as the phase finds it."""
        return (*self.under, self.goes_on) if self.goes_on else self.under


class Planner:
    """Lays out the steps of a recipe, each after those it depends on."""

    def __init__(self, recipe: Recipe, digests: Digests) -> None:
        self.recipe = recipe
        self.first = recipe.phases[0].name
        self.digests = digests
        self.steps: list[Step] = []
        self.pools: dict[str, Step] = {}
        model = recipe.model
        self.model = {
            "model": digests.model,
            "attn_implementation": model.attn_implementation,
            "chat_template": model.chat_template,
            **({"template": list(digests.template)} if digests.template else {}),
        }
        self.quantize = model.quantize
        self.chain: str | None = None  # the merge step that holds every earlier delta, as far as merged
        self.unmerged: list[Live] = []
        self.live: dict[str, Live] = {}

    def plan(self) -> Plan:
        """All steps of the recipe."""
        if self.quantize != "none":
            self.probe(BASE_16BIT, "base, 16 bit", None, None, quantize="none")
        bare = self.probe(BASE, f"base, {self.precision()}", None, None)
        for number, phase in enumerate(self.recipe.phases):
            weights: str | None = None
            goes_on: str | None = None
            under: tuple[str, ...] = ()
            phases: tuple[str, ...] = ()
            if number and phase.start == "merged":
                weights, bare = self.merge_all()
            elif number and phase.start in {"stacked", "continue"}:
                below = self.unmerged.pop()  # this phase's model holds what that one held
                weights, bare, phases, under = below.weights, below.bare, below.phases, below.stack
                if phase.start == "continue":
                    goes_on, under = below.adapter, below.under
            else:
                bare = self.step_of(PROBES + BASE)
            start = _Start(weights, goes_on, under)
            replay = self.replay(phase, start) if phase.replay and phase.replay.ratio > 0 else None
            layers = self.layers(phase, weights)
            trained = self.adapter(phase) if phase.adapter else self.train(phase, start, replay, layers)
            measured = self.probe(phase.name, phase.name, weights, trained.id, under=under)
            live = Live(phase, (*phases, phase.name), weights, trained.id, under, measured, bare)
            self.unmerged.append(live)
            self.live[phase.name] = live
        self.steps += ability_steps(self.recipe, self.digests, self.steps, self.live)
        return Plan(tuple(self.steps), self.live, self.pools)

    def merge_all(self) -> tuple[str | None, Step]:
        """Merge every earlier delta that is not merged yet onto the chain; its weights and their measurement."""
        measured = self.step_of(PROBES + BASE)
        for live in self.unmerged:
            name = live.phase.name
            stage, onto = merged_stage(name, self.first), self.chain
            merged = self.add(
                "merge", stage, f"merge {' and '.join(live.phases)}", name, onto, live.adapter, self.merging(),
                under=live.under,
            )  # fmt: skip
            measured = self.probe(stage, f"{name} merged, {self.precision()}", merged.id, None)
            if live.weights == onto:  # else the adapter meets other weights than it was trained on
                self.kept(stage, live, merged, measured)
            self.chain = merged.id
        self.unmerged.clear()
        return self.chain, measured

    def merging(self) -> dict[str, Any]:
        """The settings of every merge."""
        return {**self.model, **({"dtype": self.recipe.merge.dtype} if self.recipe.merge.dtype else {})}

    def kept(self, stage: str, live: Live, merged: Step, measured: Step) -> Step:
        """The comparison of a merge with the live model."""
        title = f"check what merging {' and '.join(live.phases)} kept"
        settings = {"phases": list(live.phases), "quantize": measured.settings["quantize"]}
        parents = (live.bare.id, live.measured.id, measured.id)
        return self.add("kept", kept_stage(stage), title, live.phase.name, None, None, settings, parents)

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
        settings = {
            **self.model,
            "quantize": quantize or self.quantize,
            "held_out": self.digests.held_out,
            "answers": self.recipe.answers.model_dump(),
        }
        return self.add("probe", f"{PROBES}{stage}", f"measure {title}", None, weights, adapter, settings, under=under)

    def replay(self, phase: Phase, start: _Start) -> Step:
        """The rows of replay a phase mixes in, drawn from pools that do not depend on how many there are."""
        assert phase.replay is not None
        parts: list[dict[str, Any]] = []
        for part, digest in zip(phase.replay.parts(), self.digests.replay[phase.name], strict=True):
            pool = self.pool(phase, start, digest) if part.kind == "generative" else None
            drawn = {"kind": part.kind, "weight": part.weight, "pool": pool.id if pool else None, "rows": digest}
            parts.append(drawn | ({"phase": part.phase} if part.phase else {}))
        generative = any(part["pool"] for part in parts)
        settings = {
            **self.model,
            "parts": parts,
            **{key: getattr(phase.replay, key) for key in ("ratio", "unit", "on_shortfall")},
            "filters": phase.replay.filters.model_dump() if generative else None,
            "beside": self.digests.phases[phase.name],
            "limits": _limits(phase),
            "replay_system": self.recipe.phases[0].system,
            **self.balance(phase),
        }
        stage = self.numbered("replay", phase.name)
        title = f"{'generate' if generative else 'choose'} replay for {phase.name}"
        weights, stack = (start.weights, start.stack) if generative else (None, ())
        return self.add(
            "replay", stage, title, phase.name, weights, stack[-1] if stack else None, settings, under=stack[:-1]
        )

    def pool(self, phase: Phase, start: _Start, prompts: str) -> Step:
        """The answers of the model the phase starts from to prompts in their order; as many as were needed so far."""
        assert phase.replay is not None
        settings = {
            **self.model,
            "quantize": self.quantize,
            "prompts": prompts,
            "seed": self.recipe.seed,
            "system": self.recipe.phases[0].system,
            "max_length": phase.train.max_length,
            **{key: getattr(phase.replay, key) for key in ("max_new_tokens", "temperature", "top_p", "chunk", "batch")},
        }
        title, stack = f"answers for the replay of {phase.name}", start.stack
        adapter = stack[-1] if stack else None
        pool = Step("pool", "pool", title, phase.name, start.weights, adapter, settings, (), stack[:-1])
        return self.pools.setdefault(pool.id, pool)

    def layers(self, phase: Phase, weights: str | None) -> Step | None:
        """What a freeze spec goes by: how much earlier phases changed each module, or its signal-to-noise ratio."""
        measure = phase.freeze.measure
        if measure is None:
            return None
        stage = self.numbered("layers", phase.name)
        settings: dict[str, Any] = {"model": self.digests.model, "measure": measure}
        if measure == "snr":
            title = f"measure signal to noise for {phase.name}"
            return self.add("layers", stage, title, phase.name, weights, None, settings)
        names = [p.name for p in self.recipe.phases]
        number = names.index(phase.name)
        # An adapter that a later phase went on with is part of that phase's.
        earlier = [
            name
            for name, later in zip(names[:number], self.recipe.phases[1:], strict=False)
            if later.name == phase.name or later.start != "continue"
        ]
        settings["since"] = None if earlier else self.digests.base
        title = f"measure what {' and '.join(earlier) or 'tuning the base'} changed"
        parents = tuple(self.step_of(name).id for name in earlier)
        return self.add("layers", stage, title, phase.name, None, None, settings, parents)

    def train(self, phase: Phase, start: _Start, replay: Step | None, layers: Step | None) -> Step:
        """The training of a phase's adapter."""
        settings = {
            **self.model,
            "quantize": self.quantize,
            "seed": self.recipe.seed,
            "lora": self.recipe.lora.model_dump(),
            "freeze": phase.freeze.text,
            "rows": self.digests.phases[phase.name],
            "limits": _limits(phase),
            "replay_system": self.recipe.phases[0].system if replay else None,
            "train": phase.train.model_dump(exclude=CIRCUMSTANCES),
            **self.balance(phase),
        }
        watched = self.recipe.forgetting
        english = self.digests.english.get(phase.name)
        if watched is not None and watched.stop is not None and english:  # the probe itself changes nothing
            settings["forgetting"] = {**watched.model_dump(exclude={"warn"}), "english": english}
        if self.recipe.deterministic:
            settings["deterministic"] = True
        if start.goes_on and self.quantize != "none":
            settings["carried"] = "float32"  # earlier versions rounded the adapter to bf16 as the phase began
        parents = tuple(step.id for step in (replay, layers) if step)
        title, weights = f"train {phase.name}", start.weights
        return self.add("train", phase.name, title, phase.name, weights, start.goes_on, settings, parents, start.under)

    def balance(self, phase: Phase) -> dict[str, Any]:
        """What decides which rows of a phase are drawn, where not all are."""
        return {"balance": self.digests.balance[phase.name]} if phase.name in self.digests.balance else {}

    def adapter(self, phase: Phase) -> Step:
        """An adapter made elsewhere, taken in as a phase."""
        settings = {**self.model, "rows": self.digests.phases[phase.name]}
        return self.add("adapter", phase.name, f"take in the adapter of {phase.name}", phase.name, None, None, settings)

    def add(
        self,
        kind: Kind,
        stage: str,
        title: str,
        phase: str | None,
        weights: str | None,
        adapter: str | None,
        settings: Mapping[str, Any],
        parents: tuple[str, ...] = (),
        under: tuple[str, ...] = (),
    ) -> Step:
        """Add a step at the end."""
        step = Step(kind, stage, title, phase, weights, adapter, settings, parents, under)
        self.steps.append(step)
        return step

    def step_of(self, stage: str) -> Step:
        """The step of a stage."""
        return next(step for step in self.steps if step.stage == stage)

    def numbered(self, word: str, phase: str) -> str:
        """`merged` the first time, `merged-NAME` after."""
        return word if all(step.stage != word for step in self.steps) else f"{word}-{phase}"

    def precision(self) -> str:
        """The precision of the base, in words."""
        return "NF4" if self.quantize == "nf4" else "16 bit"


def _limits(phase: Phase) -> dict[str, Any]:
    """What decides how a phase's rows become tokens."""
    return {
        "system": phase.system,
        "max_length": phase.train.max_length,
        "long_rows": phase.train.long_rows,
        **({"thinking": phase.thinking} if phase.thinking != "auto" else {}),
    }
