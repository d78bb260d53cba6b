"""A step of a plan: its kind, what it rests on, and the id made of that. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qcft.store.opened import step_id

Kind = Literal["probe", "train", "adapter", "merge", "pool", "replay", "kept", "layers", "dial", "drift", "suite"]


# Raised when a change to the code changes what a step of that kind results in.
FORMATS: dict[Kind, int] = {
    "probe": 2,
    "train": 4,
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
        object.__setattr__(self, "id", step_id(self.inputs()))

    @classmethod
    def stored(cls, id: str, stage: str, inputs: Mapping[str, Any]) -> Step:
        """A step as its step.json has it, under its own id, whichever version made it."""
        step = cls(
            inputs["kind"], stage, stage, None, inputs["weights"], inputs["adapter"], inputs["settings"],
            tuple(inputs["parents"]), tuple(inputs.get("under", ())),
        )  # fmt: skip
        object.__setattr__(step, "id", id)
        return step

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
