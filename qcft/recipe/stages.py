"""The names of a run's stages, and the names that a phase cannot have because they would be mistaken for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from qcft.recipe.by_layer import ByLayer
from qcft.recipe.goal import METHODS, Dial, Goal

BASE = "base"  # the unmodified model, as a run loads it
BASE_16BIT = "base-16bit"
MERGED, KEPT, DIAL = "merged", "kept", "dial"
PROBES = "eval/"
ABILITIES = "abilities/"
DRIFT = "drift/"  # stages that compare what the run has; not part of any plan

# A run's folder has its stages beside these files; the folders of stages such as `eval/base` are reserved too.
FILES = {"run.json", "recipe.yaml", "ablation.json", "report"}
WORDS = {BASE, BASE_16BIT, MERGED, KEPT, DIAL, "replay", "layers", "pool", "eval", "abilities", "drift", "similarity"}
NUMBERED = (MERGED, KEPT, DIAL, "replay", "layers")  # merged, then merged-NAME
ABOUT_ONE = re.compile(
    rf"dequantised|at-.+|({'|'.join(METHODS)})-.+"
)  # the end of names such as merged-NAME-dequantised


def merged_stage(phase: str, first: str) -> str:
    """The merge of a phase: `merged` for the first, `merged-NAME` for others."""
    return MERGED if phase == first else f"{MERGED}-{phase}"


def goal_stage(goal: Goal, first: str) -> str:
    """The stage of a merge beyond the recipe's own."""
    if way := goal.way():
        return f"{MERGED}-{goal.phase}-at-{goal.by.path if goal.by else amount(way)}"
    return f"{MERGED}-{goal.phase}-dequantised" if goal.dequantised else merged_stage(goal.phase, first)


def amount(way: Mapping[str, Any]) -> str:
    """How much of a delta a merge uses, for a name: `0.5`, `0.5-ties-0.2`."""
    return "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in way.values())


def kept_stage(merged: str) -> str:
    """The stage that measures what a merge kept."""
    return f"{KEPT}-{merged}"


def dial_stage(dial: Dial) -> str:
    """The stage that measures a phase's delta at several scales."""
    return "-".join([DIAL, dial.phase, *([dial.method, f"{dial.density:g}"] if dial.method else [])])


def point_folder(amount: float | ByLayer) -> str:
    """The folder of one of a dial's points in its step."""
    return amount.path if isinstance(amount, ByLayer) else f"{amount:g}"


def is_kept(stage: str) -> bool:
    """Whether a stage measures what a merge kept."""
    return stage == KEPT or stage.startswith(f"{KEPT}-")


def is_dial(stage: str) -> bool:
    """Whether a stage is a dial."""
    return stage.startswith(f"{DIAL}-")


def is_measurement(stage: str) -> bool:
    """Whether a stage only measures other stages: it may be measured again without making a new run."""
    return stage.startswith((PROBES, ABILITIES, DRIFT)) or is_kept(stage) or is_dial(stage)


def taken_for(phase: str, others: Iterable[str]) -> str | None:
    """What a phase of this name would be mistaken for in a run with these other phases; None if the name is free.

    Case is ignored, as it is in some file systems.
    """
    name = phase.lower()
    if name in FILES or name.endswith(".path"):
        return "a file of the run's folder"
    if name in WORDS or name.startswith(tuple(f"{word}-" for word in NUMBERED)):
        return "a stage that qcft makes itself"
    for other in others:
        if name.startswith(f"{other.lower()}-") and ABOUT_ONE.fullmatch(name[len(other) + 1 :]):
            return f"a stage that qcft makes of {other!r}"
    return None
