"""From a recipe with an `ablation` section to one recipe for each arm and seed, validated as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qcft.errors import InputError, nearest
from qcft.recipe.ablation import Match
from qcft.recipe.load import changed, read_recipe, recipe_from
from qcft.recipe.schema import MeasuredPhase, Recipe


@dataclass(frozen=True)
class ArmRun:
    """One arm with one seed: a recipe of its own. `set`: its changes to the plain recipe.

    `as_long_as`: for a mixed arm, the recipe whose phases, without replay, it trains as long as: in answer tokens or
    optimizer steps, by `match`.
    """

    arm: str
    seed: int
    recipe: Recipe
    set: Mapping[str, Any]
    as_long_as: Recipe | None = None
    match: Match | None = None


def load_ablation(recipe: str | Path, changes: Mapping[str, Any] | None = None) -> tuple[Recipe, list[ArmRun]]:
    """The plain recipe of a file or built-in name with `changes` applied, and its arms, seed by seed.

    `changes` are applied before an arm's own settings, so the arm's settings win. Raises InputError, naming the arm.
    """
    raw, folder = read_recipe(recipe)
    return expand_ablation(raw, changes, folder)


def expand_ablation(
    raw: dict[str, Any], changes: Mapping[str, Any] | None = None, folder: Path | None = None
) -> tuple[Recipe, list[ArmRun]]:
    """`load_ablation` of a recipe given as plain data; relative paths are looked for in `folder` first."""
    plain = recipe_from(raw, changes)
    if plain.ablation is None:
        raise InputError(f"the recipe {plain.name!r} has no ablation", "add ablation: {arms: [{name: ..., set: ...}]}")
    raw = {**changed(raw, changes or {}, folder), "ablation": None}
    arms = [
        _arm(raw, folder, plain.name, name, seed, settings, match)
        for seed in plain.ablation.seeds or [plain.seed]
        for name, settings, match in plain.ablation.variants()
    ]
    measured = measured_of([plain, *(one.recipe for one in arms)])
    if all(measured_of([one.recipe]) == measured for one in arms):
        return plain, arms
    return plain, [
        replace(
            one,
            recipe=_measuring(one.recipe, measured),
            as_long_as=one.as_long_as and _measuring(one.as_long_as, measured),
        )
        for one in arms
    ]


def chosen_arms(arms: Sequence[ArmRun], names: Sequence[str] | None, seeds: Sequence[int] | None) -> list[ArmRun]:
    """The requested arms and seeds. Raises InputError for one that does not exist."""
    for wanted, known, what in (
        (names, list(dict.fromkeys(one.arm for one in arms)), "arm"),
        (seeds, list(dict.fromkeys(one.seed for one in arms)), "seed"),
    ):
        for name in wanted or ():
            if not any(_matches(one, name) for one in known):
                texts = [str(one) for one in known]
                raise InputError(
                    f"there is no {what} {name!r}", nearest(str(name), texts) + f"{what}s: {', '.join(texts)}"
                )
    return [
        one
        for one in arms
        if (not names or any(_matches(one.arm, name) for name in names)) and (not seeds or one.seed in seeds)
    ]


def _matches(known: str | int, wanted: str | int) -> bool:
    """Whether an arm or seed is the wanted one, or an arm's name matches a pattern such as `gr*`."""
    return known == wanted or (isinstance(wanted, str) and fnmatchcase(str(known), wanted))


def _arm(
    raw: dict[str, Any],
    folder: Path | None,
    run: str,
    name: str,
    seed: int,
    settings: Mapping[str, Any],
    match: Match | None,
) -> ArmRun:
    own = {"name": f"{run}-{name}-s{seed}", "seed": seed}
    try:
        raw = changed(raw, {**settings, **own}, folder)
        if match is None:
            return ArmRun(name, seed, recipe_from(raw), settings)
        return ArmRun(name, seed, recipe_from(_joined(raw)), settings, _without_replay(recipe_from(raw)), match)
    except InputError as error:
        message = error.message.removeprefix("recipe: ").removeprefix("--set ")
        raise InputError(f"arm {name!r}: {message}", error.hint) from None


def _joined(raw: dict[str, Any]) -> dict[str, Any]:
    """The last phase alone, on the data of all phases."""
    phases = raw["phases"]
    for phase in phases:
        if not phase.get("data"):
            raise InputError(f"{phase['name']} has no data to mix", "mixed: true is for recipes whose phases have data")
    data = [source for phase in phases for source in phase["data"]]
    return {**raw, "phases": [{**phases[-1], "data": data, "replay": None, "anchor": None}]}


def _without_replay(recipe: Recipe) -> Recipe:
    phases = [phase.model_copy(update={"replay": None}) for phase in recipe.phases]
    return recipe.model_copy(update={"phases": phases})


def measured_of(recipes: Sequence[Recipe]) -> list[MeasuredPhase]:
    """The sources whose rows are held out by the phases of all recipes, each once, under its first phase."""
    found: dict[str, MeasuredPhase] = {}
    seen: set[str] = set()
    for phase in (phase for recipe in recipes for phase in recipe.phases):
        new = []
        for source in phase.sources():
            rows = source.model_dump_json(exclude={"take"})  # the same rows are held out, whatever `take` is
            if rows not in seen:
                seen.add(rows)
                new.append(source)
        if not new:
            continue
        entry = found.get(phase.name) or MeasuredPhase.of(phase)
        found[phase.name] = entry.model_copy(update={"data": [*entry.data, *new]})
    return list(found.values())


def _measuring(recipe: Recipe, measured: list[MeasuredPhase]) -> Recipe:
    return recipe.model_copy(update={"heldout": recipe.heldout.model_copy(update={"of": measured})})
