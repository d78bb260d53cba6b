"""From a recipe and the digests of what it names to the ordered steps that make it up. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qcft.recipe import Phase, Recipe, parse_freeze

Kind = Literal["probe", "train", "adapter", "merge", "replay", "kept", "layers"]

# Raised when a change to the code changes what a step of that kind results in.
FORMATS: dict[Kind, int] = {"probe": 1, "train": 2, "adapter": 1, "merge": 1, "replay": 1, "kept": 1, "layers": 1}

# Settings of a training that change how it is run or watched, not what comes of it.
CIRCUMSTANCES = {"report_to", "checkpoint_steps", "gradient_checkpointing", "prefix_cache"}


@dataclass(frozen=True)
class Digests:
    """Digests of a recipe's inputs: the model; each phase's training rows, or its adapter; each
    phase's replay rows or prompts; the held-out rows that every stage is measured on; the model that the model was
    tuned from, where a freeze spec goes by what that changed."""

    model: str
    phases: Mapping[str, str]
    replay: Mapping[str, str]
    held_out: str
    base: str | None = None


@dataclass(frozen=True)
class Step:
    """One unit of work. `weights` is the merge step whose weights are loaded (None: the model as it
    came), `adapter` the step of the adapter live on them."""

    kind: Kind
    stage: str
    title: str
    phase: str | None
    weights: str | None
    adapter: str | None
    settings: Mapping[str, Any]
    parents: tuple[str, ...]
    id: str = field(init=False)

    def __post_init__(self) -> None:
        text = json.dumps(self.inputs(), sort_keys=True, separators=(",", ":"))
        object.__setattr__(self, "id", f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:10]}")

    def inputs(self) -> dict[str, Any]:
        """Everything that changes the step's result."""
        return {
            "kind": self.kind,
            "format": FORMATS[self.kind],
            "weights": self.weights,
            "adapter": self.adapter,
            "settings": dict(self.settings),
            "parents": list(self.parents),
        }


@dataclass(frozen=True)
class Plan:
    """The steps in the order they are done."""

    steps: tuple[Step, ...]

    def stages(self) -> dict[str, str]:
        """Stage -> step id."""
        return {step.stage: step.id for step in self.steps}

    def step(self, stage: str) -> Step:
        """The step of a stage. Raises KeyError."""
        for step in self.steps:
            if step.stage == stage:
                return step
        raise KeyError(stage)


def make_plan(recipe: Recipe, digests: Digests) -> Plan:
    """Lay out the steps: measure the base; train, measure, merge and check each phase in turn."""
    return _Planner(recipe, digests).plan()


class _Planner:
    def __init__(self, recipe: Recipe, digests: Digests) -> None:
        self.recipe = recipe
        self.digests = digests
        self.steps: list[Step] = []
        model = recipe.model
        self.model = {
            "model": digests.model,
            "attn_implementation": model.attn_implementation,
            "chat_template": model.chat_template,
        }
        self.quantize = model.quantize
        self.chain: str | None = None  # the merge step that holds every earlier delta, as far as merged
        self.unmerged: list[tuple[Phase, Step, Step, Step]] = []

    def plan(self) -> Plan:
        if self.quantize != "none":
            self.probe("eval/base-16bit", "base, 16 bit", None, None, quantize="none")
        before = self.probe("eval/base", f"base, {self.precision()}", None, None)
        for number, phase in enumerate(self.recipe.phases):
            weights = None
            if number and phase.start == "merged":
                weights, before = self.merge_all()
            elif number:
                before = self.step_of("eval/base")
            replay = self.replay(phase, weights) if phase.replay and phase.replay.ratio > 0 else None
            layers = self.layers(phase, weights)
            trained = self.adapter(phase) if phase.adapter else self.train(phase, weights, replay, layers)
            live = self.probe(f"eval/{phase.name}", phase.name, weights, trained.id)
            self.unmerged.append((phase, trained, live, before))
        return Plan(tuple(self.steps))

    def merge_all(self) -> tuple[str | None, Step]:
        """Merge every earlier delta that is not merged yet onto the chain; its weights and their measurement."""
        measured = self.step_of("eval/base")
        for phase, trained, live, base in self.unmerged:
            stage, onto = self.numbered("merged", phase.name), self.chain
            merged = self.add("merge", stage, f"merge {phase.name}", phase.name, onto, trained.id, {**self.model})
            measured = self.probe(f"eval/{stage}", f"{phase.name} merged, {self.precision()}", merged.id, None)
            if trained.weights == onto:  # else the adapter meets other weights than it was trained on
                self.add(
                    "kept", f"kept-{stage}", f"check what merging {phase.name} kept", phase.name, None, None, {},
                    parents=(base.id, live.id, measured.id),
                )  # fmt: skip
            self.chain = merged.id
        self.unmerged.clear()
        return self.chain, measured

    def probe(
        self, stage: str, title: str, weights: str | None, adapter: str | None, quantize: str | None = None
    ) -> Step:
        """A measurement of one stage on all held-out rows."""
        settings = {
            **self.model,
            "quantize": quantize or self.quantize,
            "held_out": self.digests.held_out,
            "answers": self.recipe.answers.model_dump(),
        }
        return self.add("probe", stage, f"measure {title}", None, weights, adapter, settings)

    def replay(self, phase: Phase, weights: str | None) -> Step:
        """The rows of replay a phase mixes in."""
        assert phase.replay is not None
        settings = {
            **self.model,
            "quantize": self.quantize,
            "seed": self.recipe.seed,
            "replay": phase.replay.model_dump(exclude={"data"}),
            "rows": self.digests.replay[phase.name],
            "beside": self.digests.phases[phase.name],
            "limits": _limits(phase),
            "replay_system": self.recipe.phases[0].system,
        }
        if phase.replay.kind != "generative":
            weights, settings = None, {k: v for k, v in settings.items() if k != "quantize"}
        stage = self.numbered("replay", phase.name)
        title = "generate replay" if phase.replay.kind == "generative" else "choose English replay"
        return self.add("replay", stage, f"{title} for {phase.name}", phase.name, weights, None, settings)

    def layers(self, phase: Phase, weights: str | None) -> Step | None:
        """What a freeze spec goes by: how much earlier phases changed each module, or its signal-to-noise ratio."""
        measure = parse_freeze(phase.freeze).measure
        if measure is None:
            return None
        stage = self.numbered("layers", phase.name)
        settings: dict[str, Any] = {"model": self.digests.model, "measure": measure}
        if measure == "snr":
            title = f"measure signal to noise for {phase.name}"
            return self.add("layers", stage, title, phase.name, weights, None, settings)
        names = [p.name for p in self.recipe.phases]
        earlier = names[: names.index(phase.name)]
        settings["since"] = None if earlier else self.digests.base
        title = f"measure what {' and '.join(earlier) or 'tuning the base'} changed"
        parents = tuple(self.step_of(name).id for name in earlier)
        return self.add("layers", stage, title, phase.name, None, None, settings, parents)

    def train(self, phase: Phase, weights: str | None, replay: Step | None, layers: Step | None) -> Step:
        """The training of a phase's adapter."""
        settings = {
            **self.model,
            "quantize": self.quantize,
            "seed": self.recipe.seed,
            "lora": self.recipe.lora.model_dump(),
            "freeze": phase.freeze,
            "rows": self.digests.phases[phase.name],
            "ratio": phase.replay.ratio if phase.replay and replay else 0.0,
            "limits": _limits(phase),
            "replay_system": self.recipe.phases[0].system if replay else None,
            "train": phase.train.model_dump(exclude=CIRCUMSTANCES),
        }
        parents = tuple(step.id for step in (replay, layers) if step)
        return self.add("train", phase.name, f"train {phase.name}", phase.name, weights, None, settings, parents)

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
    ) -> Step:
        step = Step(kind, stage, title, phase, weights, adapter, settings, parents)
        self.steps.append(step)
        return step

    def step_of(self, stage: str) -> Step:
        return next(step for step in self.steps if step.stage == stage)

    def numbered(self, word: str, phase: str) -> str:
        """`merged` the first time, `merged-NAME` after."""
        return word if all(step.stage != word for step in self.steps) else f"{word}-{phase}"

    def precision(self) -> str:
        return "NF4" if self.quantize == "nf4" else "16 bit"


def _limits(phase: Phase) -> dict[str, Any]:
    """What decides how a phase's rows become tokens."""
    return {"system": phase.system, "max_length": phase.train.max_length, "long_rows": phase.train.long_rows}
