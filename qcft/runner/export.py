"""Taking a phase's model out of the runs folder: merged, or as an adapter; whole, or not there."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qcft.errors import InputError, nearest
from qcft.events import Watch
from qcft.files import telling_full_disk
from qcft.models.adapter_config import CONFIG, WEIGHTS
from qcft.models.chat import write_chat
from qcft.models.combine import write_adapter
from qcft.models.load import load_tokenizer
from qcft.models.sources import described_folder, resolve, weights_folder
from qcft.recipe import Dial, Goal, Recipe
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
                f"{recipe.name} was trained in 16 bits: there is no dequantised base", "leave --base dequantised out"
            )
        number = names.index(name) + 1
        if number < len(names) and recipe.phases[number].start == "merged":
            raise InputError(
                f"{names[number]} loads {name} merged in 4 bits again, where a dequantised base loses what it learned",
                "leave --base dequantised out; it is for use in 16 bits",
            )
    return Goal(name, dequantised, dtype)


METHODS = (
    "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd", "magnitude_prune",
    "magnitude_prune_svd", "linear", "svd", "cat",
)  # fmt: skip


def scales_of(text: str) -> tuple[float, ...]:
    """`0:1:0.1` (both ends, step) or `0,0.5,1`. Raises InputError."""
    hint = "give --scales FROM:TO:STEP, such as 0:1:0.1, or a list, such as 0,0.5,1"
    try:
        if ":" in text:
            low, high, step = (float(part) for part in text.split(":"))
            count = round((high - low) / step) if step > 0 and math.isfinite(high - low) else -1
            scales = [round(low + i * step, 9) for i in range(count + 1)]
        else:
            scales = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--scales {text!r} cannot be read", hint) from None
    if not scales or not all(math.isfinite(scale) for scale in scales) or len(scales) > 201:
        raise InputError(f"--scales {text!r} makes {len(scales)} points", f"{hint}; at most 201 points")
    return tuple(dict.fromkeys(scales))


def dial_for(recipe: Recipe, phase: str | None, scales: str, method: str | None, density: float) -> Dial:
    """The dial of a phase (None: the last). Raises InputError."""
    if method is not None and method not in METHODS:
        raise InputError(
            f"--method {method!r} is not known", nearest(method, list(METHODS)) + f"PEFT has {', '.join(METHODS)}"
        )
    if not 0 < density <= 1:
        raise InputError(
            f"--density {density:g} is outside (0, 1]", "it is the share of a delta's numbers that is kept"
        )
    return Dial(goal_for(recipe, phase, False, None).phase, scales_of(scales), method, density)


def check_place(to: Path) -> None:
    """Check that a folder can be written: there is none, or an empty one. Raises InputError."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError(f"{str(to)!r} is there already", "name a new folder with --to, or remove it")
    place = to.absolute().parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{str(to)!r} cannot be made: {str(place)!r} is a file", "name another folder with --to")


@contextmanager
def whole_folder(to: Path) -> Iterator[Path]:
    """A folder that is filled beside its place and renamed when whole; a killed run leaves none at its place."""
    from filelock import FileLock

    to = to.absolute()
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(to.with_name(f".{to.name}.lock")))
        with lock:
            check_place(to)
            work = to.with_name(f".{to.name}.partial")
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            try:
                with telling_full_disk(to.parent, "free some space, or name another folder with --to"):
                    yield work
                if to.exists():
                    to.rmdir()
                work.rename(to)
            finally:
                shutil.rmtree(work, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
    except PermissionError as error:
        raise InputError(f"{str(to)!r} cannot be written: {error.strerror}", "name another folder with --to") from None


def deliver_model(recipe: Recipe, model: Path, to: Path, finish: Callable[[Path], None], watch: Watch) -> None:
    """Copy a merged model's folder to `to`; `finish` adds to it before it is in its place."""
    with whole_folder(to) as work:
        files = sorted(model.iterdir())
        for done, file in enumerate(files):
            watch.progress(f"writing {to.name}", done, len(files), "files")
            shutil.copyfile(file, work / file.name)
        try:
            source = resolve(recipe.model)
        except InputError:  # the model it was made of is gone; the merge wrote its tokenizer
            if not (work / "tokenizer_config.json").is_file():
                raise
        else:
            write_chat(load_tokenizer(described_folder(source, watch), recipe.model), work)
        finish(work)


def deliver_adapter(
    recipe: Recipe, store: Store, probe: str, to: Path, finish: Callable[[Path], None], watch: Watch
) -> None:
    """Write a phase's deltas, those of the phases before it with it, as one adapter of the model as it came."""
    stack = [store.opened(step).part("adapter") for step in stack_of(store, probe)]
    with whole_folder(to) as work:
        try:
            source = resolve(recipe.model)
            base = source.location if source.kind == "hub" else str(weights_folder(source, watch))
        except InputError:  # the model is gone; the training wrote its tokenizer beside the adapter
            if not (stack[-1] / "tokenizer_config.json").is_file():
                raise
            write_adapter(stack, work, recipe.model.name)
            for file in stack[-1].iterdir():
                if file.name not in {CONFIG, WEIGHTS}:
                    shutil.copyfile(file, work / file.name)
        else:
            write_adapter(stack, work, base)
            described = described_folder(source, watch)
            write_chat(load_tokenizer(described, recipe.model), work, described)
        finish(work)


def stack_of(store: Store, step: str) -> list[str]:
    """The steps of all adapters whose deltas a step's model has, merged or live, the lowest first."""
    inputs = store.opened(step).inputs
    below = stack_of(store, inputs["weights"]) if inputs["weights"] else []
    return [*below, *inputs.get("under", []), *([inputs["adapter"]] if inputs["adapter"] else [])]
