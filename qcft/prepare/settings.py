"""Settings of steps: frozen dataclasses that ids are computed from. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from pydantic import BaseModel

from qcft.data.template import Thinking
from qcft.recipe import FreezeSpec, Phase

# How a field enters the id, if not simply under its own key.
ADDED = {"id": "added"}  # added later: omitted at its default, so that existing ids stay the same
SPREAD = {"id": "spread"}  # settings, or a mapping, whose keys enter on the same level as the others
CIRCUMSTANCE = {"id": "circumstance"}  # changes how the work is done, not its result: not part of the id


@dataclass(frozen=True)
class Settings:
    """A frozen dataclass that an id is computed from."""

    def settings(self) -> dict[str, Any]:
        """Its fields as JSON has them."""
        found: dict[str, Any] = {}
        for one in fields(self):
            value, way = getattr(self, one.name), one.metadata.get("id")
            if way == "spread":
                found |= value.settings() if isinstance(value, Settings) else value
            elif way != "circumstance" and not (way == "added" and value == one.default):
                found[one.name] = _plain(value, one.metadata.get("without"))
        return found


@dataclass(frozen=True)
class ModelSettings(Settings):
    """What most steps depend on: the model's digest, its attention, and its chat template."""

    model: str
    attn_implementation: str | None
    chat_template: str | None
    template: tuple[str, ...] = field(default=(), metadata=ADDED)


@dataclass(frozen=True)
class Limits(Settings):
    """The settings that decide how rows become tokens."""

    system: str | None
    max_length: int
    long_rows: str
    thinking: Thinking = field(default="auto", metadata=ADDED)
    min_tokens: int = field(default=16, metadata=ADDED)


def limits_of(phase: Phase) -> Limits:
    """How a phase's own rows become tokens."""
    train = phase.train
    return Limits(phase.system, train.max_length, train.long_rows, phase.thinking, train.text.min_tokens)


def replay_limits(limits: Limits, system: str | None) -> Limits:
    """How replay becomes tokens beside rows under `limits`: with the `system` prompt of the phase that it replays, and
    with thoughts only in rows that have some, as answers are generated without."""
    return replace(limits, system=system, thinking="off" if limits.thinking == "off" else "auto")


def _plain(value: Any, without: set[str] | None = None) -> Any:
    """A setting as JSON has it, without some keys of a part of the recipe."""
    if isinstance(value, BaseModel):
        return value.model_dump(exclude=without)
    if isinstance(value, Settings):
        return value.settings()
    if isinstance(value, FreezeSpec):
        return value.text
    return [_plain(one) for one in value] if isinstance(value, (tuple, list)) else value
