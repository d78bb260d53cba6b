"""Which point of a run's dial to use, in numbers and in words, with the command that exports it."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

from qcft.errors import InputError
from qcft.measure.pick import NoPick, Pick, pick_point
from qcft.measure.score import RowScore, read_scores
from qcft.measure.stats import Difference
from qcft.recipe import TESTS, ByLayer, Dial, Recipe, parse_by_layer
from qcft.recipe.stages import BASE, PROBES, point_folder
from qcft.replay.pools import ENGLISH
from qcft.report.shown import HalfShown, NotPicked, Picked
from qcft.store.metrics import DeltaAmount, DialMetrics
from qcft.store.opened import runs_flag
from qcft.store.results import Run

Amount = float | ByLayer
FULL = "full"  # the phase as it was trained, which the run has measured


def check_share(share: float) -> None:
    """Check a share of the gain. Raises InputError."""
    if not 0 < share <= 1:  # true for NaN too
        raise InputError(
            f"--pick {share:g} is outside (0, 1]",
            "it is the share of the other languages' gain to keep, such as 0.95",
        )


def pick(done: Run, recipe: Recipe, dial: Dial, share: float, runs: Path) -> Picked | NotPicked:
    """The point to use of a measured dial; `said` holds it in sentences, `next` the command that uses it.

    English is that of a kind that nothing trains on, where such rows are held out. It is compared with the first phase,
    or with the base where the first phase was dialled; the gain with the base as it is loaded. Where nothing can be
    picked, `point` is None and `why` says so.
    """
    assert done.goal is not None
    stage, first = done.stages[done.goal], recipe.phases[0].name
    since = BASE if dial.phase == first else first
    measured = [read_scores(done.stages[f"{PROBES}{name}"].opened) for name in (BASE, since, dial.phase)]
    measured_points = cast("DialMetrics", stage.metrics)["points"]
    amounts = {point_folder(amount): amount for amount in map(_amount, measured_points)}
    points = {name: read_scores(stage.opened, name) for name in amounts}
    full = point_folder(1.0) if dial.method is None and point_folder(1.0) in points else FULL
    points.setdefault(full, measured[2])
    english = [name for name, g in measured_points[0]["groups"].items() if g["lang"] == ENGLISH]
    untrained = [name for name in english if name.startswith(f"{TESTS} ")] or english
    unused = {*english} - {*untrained}
    points = {name: _without(groups, unused) for name, groups in points.items()}
    base, before = (_without(groups, unused) for groups in measured[:2])
    found = pick_point(points, full, base, before, untrained, share)
    if isinstance(found, NoPick):
        return {"share": share, "point": None, "why": found.why, "said": [f"no point is picked: {found.why}"]}
    amount = None if found.point == full else amounts[found.point]
    return {
        "share": share,
        "point": _record(1.0 if amount is None else amount),
        "points": found.points,
        "enough": found.enough,
        "chosen": cast("HalfShown", asdict(found.chosen)),
        "reported": cast("HalfShown", asdict(found.reported)),
        "since": since,
        "said": _sentences(found, amount, share, since),
        "next": _command(done.name, recipe, dial, amount, runs),
    }


def _amount(point: DeltaAmount) -> Amount:
    return parse_by_layer(point["by"]) if "by" in point else point["scale"]


def _record(amount: Amount) -> DeltaAmount:
    return {"by": str(amount)} if isinstance(amount, ByLayer) else {"scale": amount}


def _without(groups: Mapping[str, list[RowScore]], names: Collection[str]) -> dict[str, list[RowScore]]:
    return {name: rows for name, rows in groups.items() if name not in names}


def _sentences(found: Pick, amount: Amount | None, share: float, since: str) -> list[str]:
    name = "the full delta" if amount is None else amount.label if isinstance(amount, ByLayer) else f"scale {amount:g}"
    chosen, on = found.chosen, found.reported
    sentences = [
        f"pick: {name}. Of {found.points} points, {found.enough} keep at least {share:.0%} of the other languages' "
        f"gain, and of these it has the lowest English loss. It was chosen on {chosen.english.rows} English and "
        f"{chosen.others.rows} other held-out rows.",
        f"On the {on.english.rows} English and {on.others.rows} other rows not used to choose it, the English "
        f"loss {_moved(on.english)} since {since}, the loss of the other languages {_moved(on.others)} since the base.",
    ]
    if amount is None:
        return sentences
    kept = "which is not a clear gain on these rows"
    if on.kept is not None:
        kept = f"of which it keeps {on.kept.value:.0%}"
        if on.kept.low is not None and on.kept.high is not None:
            kept += f" [{on.kept.low:.0%}, {on.kept.high:.0%}]"
            if on.kept.high < share:
                kept += f", less than the {share:.0%} asked for"
            elif on.kept.low < share:
                kept += f", so {share:.0%} is not certain"
    than = "lower" if on.against_full.value < 0 else "higher"
    value, interval = abs(on.against_full.value), _interval(on.against_full, 1 if than == "higher" else -1)
    return [
        *sentences,
        f"With the full delta, on the same rows, the English loss {_moved(on.full_english)}, so with the pick it is "
        f"{value:.3f} nats per token {interval} {than}; the loss of the other languages {_moved(on.full_others)}, "
        f"{kept}.",
    ]


def _moved(change: Difference) -> str:
    """How an NLL changed, with the 95% interval in the same direction."""
    word, sign = ("rose by", 1) if change.value > 0 else ("fell by", -1)
    return f"{word} {abs(change.value):.3f} nats per token {_interval(change, sign)}"


def _interval(change: Difference, sign: int) -> str:
    if change.low is None or change.high is None:
        return f"[{change.method}]"
    low, high = sorted((sign * change.low, sign * change.high))
    return f"[{low:.3f}, {high:.3f}]"


def _command(run: str, recipe: Recipe, dial: Dial, amount: Amount | None, runs: Path) -> str:
    """The command that exports the point."""
    words = ["qcft", "export", run]
    if isinstance(amount, ByLayer):
        words += ["--by", str(amount)]
    elif amount is not None and dial.method is not None:
        words = ["qcft", "dial", run, "--method", dial.method, "--density", f"{dial.density:g}"]
        words += ["--scales", f"{amount:g}", "--merge-at", f"{amount:g}"]
    elif amount is not None:
        words += ["--scale", f"{amount:g}"]
    words += ["--stage", dial.phase] if dial.phase != recipe.phases[-1].name else []
    return f"{shlex.join(words)}{runs_flag(runs)} --to FOLDER"
