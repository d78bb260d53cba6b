"""What a plan is made of: steps with ids, what each rests on, the models they come to. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qcft.recipe import Phase

Kind = Literal["probe", "train", "adapter", "merge", "pool", "replay", "kept", "layers", "dial", "drift", "suite"]

# Raised when a change to the code changes what a step of that kind results in.
FORMATS: dict[Kind, int] = {
    "probe": 2,
    "train": 3,
    "adapter": 1,
    "merge": 1,
    "pool": 1,
    "replay": 2,
    "kept": 2,
    "layers": 1,
    "dial": 1,
    "drift": 1,
    "suite": 3,
}

# Settings of a training that change how it is run or watched, not what comes of it.
CIRCUMSTANCES = {"report_to", "checkpoint_steps", "gradient_checkpointing", "prefix_cache", "micro_batch"}


@dataclass(frozen=True)
class Digests:
    """Digests of a recipe's inputs: the model; each phase's training rows, or its adapter; for each kind
    of a phase's replay its rows or prompts in their order; the held-out rows that every stage is measured on;
    the model that the model was tuned from, where a freeze spec goes by what that changed; for each phase that the
    live probe watches the English rows it goes by; the tasks that stages are evaluated on, each with a digest of its
    data as far as it is local, and lm-eval's version."""

    model: str
    phases: Mapping[str, str]
    replay: Mapping[str, tuple[str, ...]]
    held_out: str
    base: str | None = None
    english: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, str] = field(default_factory=dict)
    lm_eval: str | None = None


@dataclass(frozen=True)
class Step:
    """One unit of work. `weights` is the merge step whose weights are loaded (None: the model as it
    came), `adapter` the step of the adapter live on them, `under` those that lie live and frozen under it,
    the lowest first."""

    kind: Kind
    stage: str
    title: str
    phase: str | None
    weights: str | None
    adapter: str | None
    settings: Mapping[str, Any]
    parents: tuple[str, ...]
    under: tuple[str, ...] = ()
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
            **({"under": list(self.under)} if self.under else {}),
        }


@dataclass(frozen=True)
class Live:
    """A phase's model as it was trained: weights, the adapters live on them, the phases whose deltas those hold,
    and its measurement beside that of the bare weights."""

    phase: Phase
    phases: tuple[str, ...]
    weights: str | None
    adapter: str
    under: tuple[str, ...]
    measured: Step
    bare: Step

    @property
    def stack(self) -> tuple[str, ...]:
        """The steps of its adapters, the lowest first."""
        return (*self.under, self.adapter)


@dataclass(frozen=True)
class Plan:
    """The steps in the order they are done; each phase's live model; the stage of the goal's merge.

    `pools` are the answers that replay is drawn from: never done, as a larger ratio makes more of them, so no
    steps of the plan, but kept in the store under their ids like steps, for all that draw from them.
    """

    steps: tuple[Step, ...]
    live: Mapping[str, Live] = field(default_factory=dict)
    goal: str | None = None
    pools: Mapping[str, Step] = field(default_factory=dict)

    def stages(self) -> dict[str, str]:
        """Stage -> step id."""
        return {step.stage: step.id for step in self.steps}

    def up_to(self, stage: str) -> tuple[Step, ...]:
        """The steps that a stage rests on, and its own. Raises KeyError."""
        wanted = {self.step(stage).id}
        for step in reversed(self.steps):
            if step.id in wanted:
                wanted |= {one for one in (step.weights, step.adapter, *step.under, *step.parents) if one}
        return tuple(step for step in self.steps if step.id in wanted)

    def step(self, stage: str) -> Step:
        """The step of a stage. Raises KeyError."""
        for step in self.steps:
            if step.stage == stage:
                return step
        raise KeyError(stage)
