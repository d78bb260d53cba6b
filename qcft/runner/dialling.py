"""What a dial measures, and how much of a delta a merge uses: from flags, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qcft.errors import InputError, nearest
from qcft.events import Watch
from qcft.layers import decoder_layers, layer_of, scales_by_layer
from qcft.models.deltas import Scale, read_adapter
from qcft.prepare.model import PreparedModel
from qcft.recipe import ByLayer, Dial, Goal, Recipe, parse_by_layer
from qcft.recipe.by_layer import LARGEST_SCALE, patterns
from qcft.recipe.goal import METHODS
from qcft.recipe.stages import dial_stage
from qcft.runner.export import goal_for
from qcft.runner.libraries import quiet, set_environment
from qcft.runner.stored import not_done
from qcft.store import NamedRun, Store

AUTO = "auto"
SCALES = "0:1:0.1"  # of a dial for which none are given
MOST_SCALES = 201


def scales_of(text: str) -> tuple[float, ...]:
    """`0:1:0.1` (both ends, step) or `0,0.5,1`. Raises InputError."""
    hint = f"give --scales FROM:TO:STEP, such as 0:1:0.1, or a list, such as 0,0.5,1; at most {MOST_SCALES} points"
    try:
        numbers = [float(part) for part in text.split(":" if ":" in text else ",")]
        if ":" in text:
            low, high, step = numbers
    except ValueError:
        raise InputError(f"--scales {text[:80]!r} cannot be read", hint) from None
    for number in numbers:
        check_scale("--scales", number)
    if ":" in text:
        steps = round(min((high - low) / step, 1e9)) if step > 0 else -1
        if not 0 <= steps < MOST_SCALES:
            raise InputError(f"--scales {text[:80]!r} makes {max(steps + 1, 0)} points", hint)
        numbers = [round(low + i * step, 9) for i in range(steps + 1)]
    if len(numbers) > MOST_SCALES:
        raise InputError(f"--scales makes {len(numbers)} points", hint)
    return tuple(dict.fromkeys(numbers))


def check_scale(flag: str, scale: float) -> None:
    """Refuse a number that a delta cannot be multiplied by in 16 bits. Raises InputError."""
    if not abs(scale) <= LARGEST_SCALE:  # true for NaN too
        raise InputError(
            f"{flag}: {scale:g} is not a scale for a delta", f"give numbers from {-LARGEST_SCALE} to {LARGEST_SCALE}"
        )


def dial_for(
    recipe: Recipe,
    phase: str | None,
    scales: str,
    method: str | None,
    density: float,
    merge_at: float | None = None,
    by: Sequence[str] = (),
) -> Dial:
    """The dial of a phase (None: the last), `merge_at` a scale that may be merged; `by` as `--by` takes it, without
    `auto`. Raises InputError."""
    if merge_at is not None:
        check_scale("--merge-at", merge_at)
    if method is not None and method not in METHODS:
        raise InputError(
            f"--method {method!r} is not known", nearest(method, list(METHODS)) + f"PEFT has {', '.join(METHODS)}"
        )
    if not 0 < density <= 1:
        raise InputError(f"--density {density:g} is outside (0, 1]", "it is the share of the delta's values to keep")
    if method is not None and by:
        raise InputError(
            f"--by cannot be combined with --method {method}: PEFT's methods combine whole adapters, at one scale",
            "omit one of them",
        )
    found = tuple(dict.fromkeys(parse_by_layer(text) for text in by if text.strip() != AUTO))
    points = scales_of(scales)
    if len(points) + len(found) > MOST_SCALES:
        raise InputError(f"--scales and --by make {len(points) + len(found)} points", f"at most {MOST_SCALES}")
    return Dial(goal_for(recipe, phase, False, None).phase, points, method, density, found)


def with_patterns(dial: Dial, run: NamedRun, recipe: Recipe, runs: Path, watch: Watch) -> Dial:
    """A dial with the patterns of `--by auto` on the layers that the phase's adapter is on. Raises InputError."""
    if dial.phase not in run.stages:
        raise not_done(run, dial.phase)
    set_environment()
    quiet()
    layer = layer_of(PreparedModel(recipe.model, watch).meta_model)
    changes = read_adapter(Store(runs).opened(run.stages[dial.phase]).part("adapter")).changes
    tried = patterns(found for name in changes if (found := layer(name)) is not None)
    return replace(dial, by=tuple(dict.fromkeys((*dial.by, *tried))))


def check_scalable(dial: Dial, run: NamedRun, runs: Path) -> None:
    """Check that the phase's delta has a scale, which DoRA's has not. Raises InputError."""
    if step := run.stages.get(dial.phase):
        set_environment()
        read_adapter(Store(runs).opened(step).part("adapter"), scale=0.5)


def with_measured(dial: Dial, run: NamedRun, runs: Path, new_scales: bool) -> Dial:
    """The dial with the points that the run has of this phase, in their order, before its own; without `new_scales`,
    the run's scales, if it has some, take the place of the dial's. Raises InputError for too many points."""
    step = run.stages.get(dial_stage(dial))
    done = Store(runs).open(step) if step else None
    if done is None:
        return dial
    settings = done.inputs["settings"]
    scales = tuple(dict.fromkeys((*settings["scales"], *(dial.scales if new_scales else ()))))
    by = tuple(dict.fromkeys((*map(parse_by_layer, settings.get("by", ())), *dial.by)))
    if len(scales) + len(by) > MOST_SCALES:
        raise InputError(
            f"with those that the run has, the dial has {len(scales) + len(by)} points",
            f"it can have {MOST_SCALES}: ask for fewer",
        )
    return replace(dial, scales=scales, by=by)


def scaled(goal: Goal, scale: float | None, by: str | None) -> Goal:
    """A merge that adds `scale` times the phase's delta, or each layer's scaled by `by`. Raises InputError."""
    if scale is not None and by is not None:
        raise InputError("--scale and --by are two ways to set how much of the delta is used", "give one of them")
    if by is not None:
        return replace(goal, by=parse_by_layer(by))
    if scale is not None:
        check_scale("--scale", scale)
        return replace(goal, scale=scale)
    return goal


def check_layers(by: Sequence[ByLayer], model: PreparedModel) -> None:
    """Check that a model has the layers that are named. Raises InputError."""
    for one in by:
        one.check(decoder_layers(model.meta_model)[1])


def scale_by_weight(goal: Goal, recipe: Recipe, watch: Watch) -> Scale:
    """The goal's scale, or that of each weight by its name. Raises InputError for layers that the model lacks."""
    if goal.by is None:
        return goal.scale
    set_environment()
    quiet()
    model = PreparedModel(recipe.model, watch)
    check_layers([goal.by], model)
    return scales_by_layer(model.meta_model, goal.by)
