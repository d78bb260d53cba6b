"""Runs as arms of one comparison: runs that differ only in their seed are one arm; how the arms differ."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel

from qcft.recipe import Recipe
from qcft.store.results import Run, Stage

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Evidence:
    """The done part of one run. `changes`: for each phase's adapter, ||s B A||_F^2 by module."""

    recipe: Recipe
    run: Run
    changes: Mapping[str, Mapping[str, float]]

    @property
    def last(self) -> Stage | None:
        """The measurement of the last phase; None until it is done."""
        return self.run.stages.get(f"eval/{self.recipe.phases[-1].name}")


@dataclass(frozen=True)
class ArmRuns:
    """One variant with its runs, which differ only in their seed. `sets`: the changes to the first arm's recipe."""

    name: str
    runs: tuple[Evidence, ...]
    sets: Mapping[str, Any]

    def label(self, evidence: Evidence) -> str:
        """The arm's name; with the seed if it has several runs."""
        return self.name if len(self.runs) == 1 else f"{self.name}, seed {evidence.recipe.seed}"


Member = tuple[ArmRuns, Evidence]


def members(arms: Sequence[ArmRuns]) -> list[Member]:
    """Every run with its arm."""
    return [(arm, run) for arm in arms for run in arm.runs]


def grouped(things: Iterable[Thing], key: Callable[[Thing], str]) -> list[list[Thing]]:
    """The things of each key together, in their order."""
    found: dict[str, list[Thing]] = {}
    for thing in things:
        found.setdefault(key(thing), []).append(thing)
    return list(found.values())


def whose(arm: ArmRuns, run: Evidence) -> dict[str, object]:
    """The keys that identify a record's run."""
    return {"arm": arm.name, "run": run.run.name, "seed": run.recipe.seed}


def with_of(row: Mapping[str, str], runs: Sequence[Member], arms: Sequence[ArmRuns]) -> dict[str, str]:
    """A row with the runs that it belongs to in its second cell, if the report is of several."""
    (title, first), *more = row.items()
    return {title: first, **({"of": shared_by(runs, arms)} if len(members(arms)) > 1 else {}), **dict(more)}


def shared_once(
    rows: Iterable[tuple[str, str, dict[str, str], Member]], arms: Sequence[ArmRuns]
) -> list[dict[str, str]]:
    """Rows (stage, key, cells, run), each key once with the runs that share it; rows of one stage are adjacent."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    sharing: dict[str, list[Member]] = {}
    for stage, key, cells, member in rows:
        found.setdefault(stage, {}).setdefault(key, cells)
        sharing.setdefault(key, []).append(member)
    return [with_of(cells, sharing[key], arms) for keys in found.values() for key, cells in keys.items()]


def arms_of(found: Sequence[Evidence], named: Mapping[str, str] | None = None) -> tuple[ArmRuns, ...]:
    """Runs as arms, in their order; `named` gives the arm of each run of an ablation."""

    def variant(one: Evidence) -> str:
        document = one.recipe.model_dump(mode="json", exclude={"name", "seed"})
        return named[one.run.name] if named else json.dumps(document, sort_keys=True)

    return tuple(
        ArmRuns(variant(runs[0]) if named else _name(runs), tuple(runs), differences(found[0].recipe, runs[0].recipe))
        for runs in grouped(found, variant)
    )


def shared_by(runs: Sequence[Member], arms: Sequence[ArmRuns]) -> str:
    """Which of all runs these are, in a few words: `all`, `all but mixed, seed 0`, or the arms with their seeds."""
    every = members(arms)
    seeds = {run.recipe.seed for _, run in runs}
    same_seeds = [(arm, run) for arm, run in every if run.recipe.seed in seeds]
    seed = f", seed {min(seeds)}" if len(seeds) == 1 and len(same_seeds) < len(every) else ""
    here = {run.run.name for _, run in runs}
    others = list(dict.fromkeys(arm.name for arm, run in same_seeds if run.run.name not in here))
    if not others and len(runs) > 1:
        return f"all{seed}"
    if 0 < 3 * len(others) <= len(here) and not any(arm.name in others for arm, _ in runs):
        return f"all but {', '.join(others)}{seed}"
    counts = Counter(arm.name for arm, _ in runs)
    whole = {arm.name for arm, _ in runs if counts[arm.name] == len(arm.runs)}
    return "; ".join(dict.fromkeys(arm.name if arm.name in whole else arm.label(run) for arm, run in runs))


def _name(runs: Sequence[Evidence]) -> str:
    names = [evidence.run.name for evidence in runs]
    if len(names) == 1:
        return names[0]
    shared = os.path.commonprefix(names)  # noqa: RUF071 (these are names, not paths)
    shared = shared.rstrip("0123456789").removesuffix("seed").removesuffix("s").rstrip("-_.")
    return shared or names[0]


def differences(first: Recipe, other: Recipe) -> dict[str, Any]:
    """The recipe keys, in the form of `--set`, that turn `first` into `other`; without name and seed."""
    top = {"name", "seed", "phases"}
    found = _differing(first, other, "", top)
    before, after = ({phase.name: phase for phase in recipe.phases} for recipe in (first, other))
    kept = [name for name in before if name in after]
    if kept != list(after):  # a new phase, or another order
        return found | {"phases": [phase.model_dump(mode="json", exclude_defaults=True) for phase in other.phases]}
    found |= {name: None for name in before if name not in after}
    for name in kept:
        found |= _differing(before[name], after[name], f"{name}.")
    return found


def flow(value: Any) -> str:
    """A value on one line, in the form of `--set`."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf"))
    return text.removesuffix("...\n").strip()


def _differing(before: BaseModel, after: BaseModel, prefix: str, apart: set[str] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in type(after).model_fields:
        old, new = getattr(before, key), getattr(after, key)
        if old == new or key in (apart or ()):
            continue
        if isinstance(new, BaseModel) and type(old) is type(new):
            found |= _differing(old, new, f"{prefix}{key}.")
        else:
            short = after.model_dump(mode="json", include={key}, exclude_defaults=True)
            whole = after.model_dump(mode="json", include={key}, exclude_none=True)
            found[prefix + key] = short.get(key) or whole.get(key)  # `{}` would not say what it is
    return found
