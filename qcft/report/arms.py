"""Runs as arms of one comparison: which differ in their seed only, and what sets the others apart."""

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
    """One run as far as it is done. `changes`: of each phase's adapter, ||s B A||_F^2 by module."""

    recipe: Recipe
    run: Run
    changes: Mapping[str, Mapping[str, float]]

    @property
    def last(self) -> Stage | None:
        """The measurement of the last phase, once it is done."""
        return self.run.stages.get(f"eval/{self.recipe.phases[-1].name}")


@dataclass(frozen=True)
class Arm:
    """One variant: runs that differ in their seed only. `sets` is what makes the first arm's recipe this one's."""

    name: str
    runs: tuple[Evidence, ...]
    sets: Mapping[str, Any]

    def label(self, evidence: Evidence) -> str:
        """The arm, and where it has several runs the seed."""
        return self.name if len(self.runs) == 1 else f"{self.name}, seed {evidence.recipe.seed}"


Member = tuple[Arm, Evidence]


def members(arms: Sequence[Arm]) -> list[Member]:
    """Every run with its arm."""
    return [(arm, run) for arm in arms for run in arm.runs]


def grouped(things: Iterable[Thing], key: Callable[[Thing], str]) -> list[list[Thing]]:
    """The things of each key together, in their order."""
    found: dict[str, list[Thing]] = {}
    for thing in things:
        found.setdefault(key(thing), []).append(thing)
    return list(found.values())


def whose(arm: Arm, run: Evidence) -> dict[str, object]:
    """The keys by which a record tells its run."""
    return {"arm": arm.name, "run": run.run.name, "seed": run.recipe.seed}


def with_of(row: Mapping[str, str], runs: Sequence[Member], arms: Sequence[Arm]) -> dict[str, str]:
    """A row with the runs that it stands for after its first cell, where the report is of several."""
    (title, first), *more = row.items()
    return {title: first, **({"of": shared_by(runs, arms)} if len(members(arms)) > 1 else {}), **dict(more)}


def shared_once(rows: Iterable[tuple[str, str, dict[str, str], Member]], arms: Sequence[Arm]) -> list[dict[str, str]]:
    """Rows (stage, key, cells, run) once for each key, with the runs that share it; those of a stage together."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    sharing: dict[str, list[Member]] = {}
    for stage, key, cells, member in rows:
        found.setdefault(stage, {}).setdefault(key, cells)
        sharing.setdefault(key, []).append(member)
    return [with_of(cells, sharing[key], arms) for keys in found.values() for key, cells in keys.items()]


def arms_of(found: Sequence[Evidence], named: Mapping[str, str] | None = None) -> tuple[Arm, ...]:
    """Runs as arms, in their order; `named` gives the arm of each run, where an ablation made them."""

    def alike(one: Evidence) -> str:
        document = one.recipe.model_dump(mode="json", exclude={"name", "seed"})
        return named[one.run.name] if named else json.dumps(document, sort_keys=True)

    return tuple(
        Arm(alike(runs[0]) if named else _name(runs), tuple(runs), differences(found[0].recipe, runs[0].recipe))
        for runs in grouped(found, alike)
    )


def shared_by(runs: Sequence[Member], arms: Sequence[Arm]) -> str:
    """Which of all runs these are, in a few words: `all`, `all but mixed, seed 0`, or the arms with their seeds."""
    every = members(arms)
    seeds = {run.recipe.seed for _, run in runs}
    alike = [(arm, run) for arm, run in every if run.recipe.seed in seeds]  # all there are with these seeds
    seed = f", seed {min(seeds)}" if len(seeds) == 1 and len(alike) < len(every) else ""
    here = {run.run.name for _, run in runs}
    others = list(dict.fromkeys(arm.name for arm, run in alike if run.run.name not in here))
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
    """The recipe keys, as `--set` takes them, that make `first` into `other`; its name and seed apart."""
    top = {"name", "seed", "phases"}
    found = _differing(first, other, "", top)
    before, after = ({phase.name: phase for phase in recipe.phases} for recipe in (first, other))
    kept = [name for name in before if name in after]
    if kept != list(after):  # a phase that is new, or in another place
        return found | {"phases": [phase.model_dump(mode="json", exclude_defaults=True) for phase in other.phases]}
    found |= {name: None for name in before if name not in after}
    for name in kept:
        found |= _differing(before[name], after[name], f"{name}.")
    return found


def flow(value: Any) -> str:
    """A value on one line, as `--set` reads it."""
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
            found[prefix + key] = short.get(key, after.model_dump(mode="json", include={key})[key])
    return found
