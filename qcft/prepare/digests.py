"""Digests of a recipe's inputs, which step ids depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Digests:
    """Digests of a recipe's inputs: the model; each phase's training rows, or its adapter; for each kind of a phase's
    replay its rows or prompts in order; the held-out rows that every stage is measured on; the model that the model was
    tuned from, if a freeze spec depends on it; for each phase with a live probe its English rows; the tasks that stages
    are evaluated on, each with a digest of its local data, and lm-eval's version; for each phase that balances its
    languages, what decides which rows are drawn; the special treatment that the chat template needs."""

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
