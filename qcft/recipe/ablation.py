"""The `ablation` section: arms, each a set of changes to the recipe, and seeds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from qcft.recipe.parts import NAME, Number, Part, Seed

# A recipe key and its values: a list of plain values, or a mapping from names to values. Under the key `set` each name
# maps to several keys and their values.
Grid = dict[str, list[Any] | dict[str, Any]]
Match = Literal["tokens", "steps"]


class ArmSpec(Part):
    """One variant, or with `grid` several. `set` changes recipe keys as `--set` does, null included.

    `mixed`: the last phase alone, trained on the data of all phases, without replay, for as long as all phases train
    together without replay. `match` is the unit of that length: answer tokens, to the nearest row (the default), or
    optimizer steps.
    """

    name: str = ""
    set: dict[str, Any] = {}
    grid: Grid = {}
    mixed: bool = False
    match: Match | None = None

    @model_validator(mode="after")
    def _match_is_of_a_mixed_arm(self) -> Self:
        if self.match is not None and not self.mixed:
            raise ValueError(f"match: {self.match} is for an arm that is mixed | add mixed: true, or omit match")
        return self


class AblationSpec(Part):
    """Arms x seeds (the recipe's own seed where none are given). `grid` crosses every arm with all its combinations.

    `gpus` and `cpus`: what one step reserves on a Ray cluster (`--on ray`); null: one GPU where the cluster has any.
    """

    seeds: Annotated[list[Seed], Field(min_length=1)] | None = None
    arms: list[ArmSpec] = []
    grid: Grid = {}
    gpus: Annotated[Number, Field(ge=0)] | None = None
    cpus: Annotated[Number, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _arms_have_own_names(self) -> Self:
        if twice := [seed for seed, times in Counter(self.seeds or ()).items() if times > 1]:
            raise ValueError(f"seeds: {twice[0]} is given twice | give each once")
        names = [name for name, *_ in self.variants()]
        if not names:
            raise ValueError("there are no arms | add arms: [{name: plain}], or a grid")
        for name in names:
            if not NAME.fullmatch(name):
                raise ValueError(f"arms: {name!r} cannot name an arm | use letters, digits, '.', '_' and '-'")
            if names.count(name) > 1:
                raise ValueError(f"arms: two arms are named {name!r} | rename one of them")
        return self

    def variants(self) -> Iterator[tuple[str, dict[str, Any], Match | None]]:
        """Every arm's name, its changes, and for a mixed arm its `match`; grids are expanded, the last key fastest."""
        arms = self.arms or ([ArmSpec()] if self.grid else [])
        for arm in arms:
            match = (arm.match or "tokens") if arm.mixed else None
            axes = [_axis(key, values) for key, values in {**arm.grid, **self.grid, **arm.grid}.items()]
            for chosen in product(*axes):
                name = "-".join(filter(None, (arm.name, *(label for label, _ in chosen))))
                settings = dict(arm.set)
                for _, more in chosen:
                    settings |= more
                yield name, settings, match


def _axis(key: str, values: list[Any] | Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A grid's key as labels with their changes; a plain value's label is the key's last word and the value."""
    if isinstance(values, Mapping):
        named = [(str(label), value if key == "set" else {key: value}) for label, value in values.items()]
        if not all(isinstance(more, dict) for _, more in named):
            raise ValueError("grid: a name under set stands for a mapping of keys | write {set: {NAME: {KEY: VALUE}}}")
        return named
    word = key.rsplit(".", 1)[-1]
    labelled = []
    for value in values:
        if isinstance(value, (list, dict)):
            raise ValueError(
                f"grid: {key}: {value!r} is not a plain value | name each value: {{{key}: {{NAME: VALUE}}}}"
            )
        text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        labelled.append((f"{word}-{re.sub('[^A-Za-z0-9._]+', '-', text)}", {key: value}))
    return labelled
