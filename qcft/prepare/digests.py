"""Digests of a recipe's inputs, from which ids of steps are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Digests:
    """Digests of a recipe's inputs: the model; each phase's training rows, or its adapter; for each kind
    of a phase's replay its rows or prompts in their order; the held-out rows that every stage is measured on;
    the model that the model was tuned from, where a freeze spec goes by what that changed; for each phase that the
    live probe watches the English rows it goes by; the tasks that stages are evaluated on, each with a digest of its
    data as far as it is local, and lm-eval's version; for each phase that balances its languages, what decides which
    rows are drawn; what is done beyond the plain reading of the chat template."""

    model: str
    phases: Mapping[str, str]
    replay: Mapping[str, tuple[str, ...]]
    held_out: str
    base: str | None = None
    english: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, str] = field(default_factory=dict)
    lm_eval: str | None = None
    balance: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    template: tuple[str, ...] = ()
