"""The parts of a plan: its steps in order, and the models they produce. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qcft.recipe import Phase
from qcft.steps.step import Step


@dataclass(frozen=True)
class PhaseModel:
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
    """The steps in the order they are run; each phase's model.

    `pools` are the answers that replay is drawn from. They are never done, as a larger ratio needs more of them, so
    they are not steps of the plan, but they are stored under their ids like steps, for all that draw from them.
    """

    steps: tuple[Step, ...]
    live: Mapping[str, PhaseModel] = field(default_factory=dict)
    pools: Mapping[str, Step] = field(default_factory=dict)

    def by_id(self) -> dict[str, Step]:
        """Every step by its id, pools included."""
        return {step.id: step for step in (*self.steps, *self.pools.values())}

    def stages(self) -> dict[str, str]:
        """Stage -> step id."""
        return {step.stage: step.id for step in self.steps}

    def up_to(self, stage: str) -> tuple[Step, ...]:
        """The steps that a stage depends on, and its own. Raises KeyError."""
        wanted = {self.step(stage).id}
        for step in reversed(self.steps):
            if step.id in wanted:
                wanted |= {*step.depends_on}
        return tuple(step for step in self.steps if step.id in wanted)

    def step(self, stage: str) -> Step:
        """The step of a stage. Raises KeyError."""
        for step in self.steps:
            if step.stage == stage:
                return step
        raise KeyError(stage)
