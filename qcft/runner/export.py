"""Taking a phase's model out of the runs folder: merged, or as an adapter; whole, or not there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from qcft.errors import InputError, nearest
from qcft.events import Watch
from qcft.models.adapter_config import CONFIG, WEIGHTS
from qcft.models.chat import write_chat
from qcft.models.combine import write_adapter
from qcft.models.deltas import Scale
from qcft.models.embedded import public_name
from qcft.models.load import load_tokenizer
from qcft.models.sources import described_folder, resolve
from qcft.recipe import Goal, Recipe
from qcft.runner.delivery import whole_folder
from qcft.store import Store


def goal_for(recipe: Recipe, phase: str | None, dequantised: bool, dtype: str | None) -> Goal:
    """The merge of a phase (None: the last), after checking that it makes sense. Raises InputError."""
    names = [p.name for p in recipe.phases]
    name = names[-1] if phase is None else phase
    if name not in names:
        raise InputError(f"{recipe.name} has no phase {name!r}", nearest(name, names) + f"it has {', '.join(names)}")
    if dequantised:
        if recipe.model.quantize == "none":
            raise InputError(
                f"{recipe.name} was trained in 16 bits: there is no dequantised base", "omit --base dequantised"
            )
        number = names.index(name) + 1
        if number < len(names) and recipe.phases[number].start == "merged":
            raise InputError(
                f"{names[number]} loads {name} merged in 4 bits again, where a dequantised base loses what it learned",
                "omit --base dequantised; it is for use in 16 bits",
            )
    return Goal(name, dequantised, dtype)


def phases_until(recipe: Recipe, phase: str) -> list[str]:
    """The phases whose deltas a phase's model has."""
    names: list[str] = []
    for number, one in enumerate(recipe.phases):
        names = [one.name] if number and one.start == "base" else [*names, one.name]
        if one.name == phase:
            break
    return names


def deliver_model(recipe: Recipe, model: Path, to: Path, finish: Callable[[Path], None], watch: Watch) -> None:
    """Copy a merged model's folder to `to`; `finish` adds to it before it is in its place."""
    with whole_folder(to) as work:
        fill_model(recipe, model, work, watch, shutil.copyfile)
        finish(work)


def fill_model(recipe: Recipe, model: Path, folder: Path, watch: Watch, copy: Callable[[Path, Path], object]) -> None:
    """Copy a merged model's files to a folder, with the tokenizer that it was trained with."""
    files = sorted(model.iterdir())
    for done, file in enumerate(files):
        watch.progress("copying the model", done, len(files), "files")
        copy(file, folder / file.name)
    try:
        source = resolve(recipe.model)
    except InputError:  # the model it was made of is gone; the merge wrote its tokenizer
        if not (folder / "tokenizer_config.json").is_file():
            raise
    else:
        write_chat(load_tokenizer(described_folder(source, watch), recipe.model), folder)


def deliver_adapter(
    recipe: Recipe, store: Store, probe: str, to: Path, finish: Callable[[Path], None], watch: Watch, scale: Scale = 1.0
) -> None:
    """Write a phase's deltas, with those of the phases before it, as one adapter for the unmodified model.

    `scale` multiplies the phase's own delta.
    """
    stack = [store.opened(step).part("adapter") for step in stack_of(store, probe)]
    with whole_folder(to) as work:
        try:
            source = resolve(recipe.model)
        except InputError:  # the model is gone; the training wrote its tokenizer beside the adapter
            if not (stack[-1] / "tokenizer_config.json").is_file():
                raise
            write_adapter(stack, work, public_name(recipe.model.name), scale)
            for file in stack[-1].iterdir():
                if file.name not in {CONFIG, WEIGHTS}:
                    shutil.copyfile(file, work / file.name)
        else:
            write_adapter(stack, work, public_name(recipe.model.name), scale)
            described = described_folder(source, watch)
            write_chat(load_tokenizer(described, recipe.model), work, described)
        finish(work)


def stack_of(store: Store, step: str) -> list[str]:
    """The steps of all adapters whose deltas a step's model has, merged or live, the lowest first."""
    inputs = store.opened(step).inputs
    below = stack_of(store, inputs["weights"]) if inputs["weights"] else []
    return [*below, *inputs.get("under", []), *([inputs["adapter"]] if inputs["adapter"] else [])]
