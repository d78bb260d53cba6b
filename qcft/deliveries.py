"""Merges, exports and dials of finished runs, without printing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qcft.api import read, reported
from qcft.events import Watch
from qcft.report.card import write_card
from qcft.report.curve import curve_points
from qcft.report.shown import Dialled, Exported, Merged
from qcft.runner.beyond import reach
from qcft.runner.stored import not_done
from qcft.store import Store, read_run


def merge(
    name: str | None,
    to: Path | None,
    runs: Path,
    watch: Watch,
    *,
    phase: str | None = None,
    dequantised: bool = False,
    dtype: str | None = None,
    scale: float | None = None,
    by: str | None = None,
    method: str | None = None,
    density: float = 1.0,
) -> Merged:
    """Merge a run's phase (the last by default), measure what that kept, and write it to `to` with a model card.

    `scale` times the phase's delta is taken, or of each layer's what `by` says: `layers=0-9:0.5`. Raises QcftError.
    """
    from qcft.runner.delivery import check_place
    from qcft.runner.dialling import scaled
    from qcft.runner.export import deliver_model, goal_for, phases_until

    named = read_run(runs, name)
    recipe = named.recipe()
    goal = scaled(goal_for(recipe, phase, dequantised, dtype), scale, by)
    goal = replace(goal, method=method, density=density)
    if to is not None:
        check_place(to)
    done = reach(named, recipe, goal, runs, watch)
    assert done.goal is not None
    whole = reported(done, runs)
    folder = done.stages[done.goal].opened.part("model", watch)
    if to is not None:
        onto = "the dequantised 4-bit weights, for use in 16 bits" if dequantised else "the 16-bit weights"
        at = f" (of the last: {goal.share()})" if goal.way() else ""
        what = f"{' and '.join(phases_until(recipe, goal.phase))}{at}, merged onto {onto}."
        deliver_model(
            recipe,
            folder,
            to,
            lambda work: write_card(work, recipe, whole.table, f"eval/{done.goal}", what, adapter=False),
            watch,
        )
        folder = to
    return {"folder": str(folder), "stage": done.goal, "kept": whole.table["kept"].get(done.goal)}


def export_adapter(
    name: str | None,
    to: Path,
    runs: Path,
    watch: Watch,
    *,
    phase: str | None = None,
    scale: float | None = None,
    by: str | None = None,
) -> Exported:
    """Write a run's phase (the last by default) as one PEFT adapter of the model as it came, with a model card.

    `scale` and `by` as `merge` has them. Raises QcftError.
    """
    from qcft.runner.delivery import check_place
    from qcft.runner.dialling import scale_by_weight, scaled
    from qcft.runner.export import deliver_adapter, goal_for, phases_until

    named = read_run(runs, name)
    recipe = named.recipe()
    goal = scaled(goal_for(recipe, phase, False, None), scale, by)
    last = goal.phase
    check_place(to)
    stage = f"eval/{last}"
    whole = read(named.name, runs)
    if stage not in whole.stages:
        raise not_done(named, stage)
    what = f"The adapter of {' and '.join(phases_until(recipe, last))}, for the model as it came."
    if goal.way():
        what += f" Of {last}, it has {goal.share()}; below, {last} is measured with all of its delta."
    deliver_adapter(
        recipe,
        Store(runs),
        whole.stages[stage].step,
        to,
        lambda work: write_card(work, recipe, whole.table, stage, what, adapter=True),
        watch,
        scale_by_weight(goal, recipe, watch),
    )
    return {"folder": str(to), "phase": last}


def dial(
    name: str | None,
    scales: str | None,
    runs: Path,
    watch: Watch,
    *,
    phase: str | None = None,
    method: str | None = None,
    density: float = 1.0,
    by: Sequence[str] = (),
    merge_at: float | None = None,
    share: float | None = None,
    to: Path | None = None,
) -> Dialled:
    """Measure EA and MA at each scale of a phase's delta, and scaled `by` layers (`layers=0-9:0.5`, `auto`), and draw
    the curve; merge one scale, or pick the point that keeps a `share` of the languages' gain, when asked to.

    Raises QcftError.
    """
    from qcft.inspect.pick import check_share, pick
    from qcft.runner.delivery import check_place
    from qcft.runner.dialling import AUTO, SCALES, check_scalable, dial_for, measured_before, with_patterns

    named = read_run(runs, name)
    recipe = named.recipe()
    wanted = dial_for(recipe, phase, scales or SCALES, method, density, merge_at, by)
    check_scalable(wanted, named, runs)
    if share is not None:
        check_share(share)
        if scales is None and not by:
            wanted = measured_before(wanted, named, runs)
    if to is not None:
        check_place(to)
    if any(text.strip() == AUTO for text in by):
        wanted = with_patterns(wanted, named, recipe, runs, watch)
    done = reach(named, recipe, wanted, runs, watch)
    assert done.goal is not None
    points = curve_points(done.stages[done.goal].metrics)
    reported(done, runs)
    drawing = done.folder / "report" / "plots" / f"{done.goal}.svg"
    found: Dialled = {"run": named.name, "phase": wanted.phase, "points": points, "drawing": str(drawing)}
    if share is not None:
        found["pick"] = pick(done, recipe, wanted, share, runs)
    if merge_at is not None:
        found["merged"] = merge(
            named.name, to, runs, watch, phase=wanted.phase, scale=merge_at, method=method, density=density
        )
    return found
