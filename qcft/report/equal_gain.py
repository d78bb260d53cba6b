"""English at an equal gain in the other languages, for the arms with a dial of their last phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from qcft.measure.equal_gain import place_of, scores_between
from qcft.measure.pick import RowsByGroup
from qcft.measure.score import RowScore, read_scores
from qcft.measure.stats import Difference, Runs, all_pairs, changes, mean_nll
from qcft.recipe import Dial
from qcft.recipe.stages import dial_stage, point_folder
from qcft.report.arms import ArmRuns, Evidence
from qcft.report.cells import basis, bracket
from qcft.report.document import Table
from qcft.report.standing import Standing, common_groups, standings
from qcft.store.metrics import DialMetrics

SHARE = 0.95  # of a gain


@dataclass(frozen=True)
class _Run:
    """The dial of one run, by increasing scale: the gain in the other languages and the scores of the English rows at
    each point; the scores of these rows before the phase, and the gain of the full delta."""

    seed: int
    gains: tuple[float, ...]
    english: tuple[list[RowScore], ...]
    before: list[RowScore]
    full: float


def equal_gain_tables(arms: Sequence[ArmRuns]) -> list[Table]:
    """English at 95% of each dialled arm's own gain, and of the smallest gain of all dialled arms; with several arms,
    the differences of all pairs there."""
    found = standings(arms)
    names = common_groups([standing.arm for standing in found])
    dialled = [(standing, runs) for standing in found if (runs := _runs(standing, names.english, names.others))]
    if not dialled:
        return []
    least, of = min((_mean([run.full for run in runs]), standing.arm.name) for standing, runs in dialled)
    several = len(dialled) > 1
    own = [_there(runs, [SHARE * run.full for run in runs]) for _, runs in dialled]
    equal = [_there(runs, [SHARE * least] * len(runs)) for _, runs in dialled]
    of_own, of_equal = (_changes([runs for _, runs in dialled], there) for there in (own, equal))
    rows, records = [], []
    for (standing, runs), at_own, at_equal in zip(dialled, of_own, of_equal, strict=True):
        full, gain = standing.lost, _mean([run.full for run in runs])
        cells = {
            "arm": standing.arm.name,
            "gain of the full delta \u2191": f"{gain:.3f}",
            f"English \u2193, since {standing.since}": _cell(full),
            f"at {SHARE:.0%} of its gain": _cell(at_own),
        }
        rows.append({**cells, **({f"at {SHARE:.0%} of {of}'s gain": _cell(at_equal)} if several else {})})
        record = {"arm": standing.arm.name, "gain": gain, "since": standing.since, **_record("full", full)}
        equally = {"of": of, **_record("equal", at_equal)} if several else {}
        records.append({**record, **_record("own", at_own), **equally})
    note = (
        "Changes of mean NLL in nats per answer token: the other languages' since the base (a gain), English with its "
        f"95% interval over {basis(dialled[0][0].lost)} (above zero: a loss). Interpolated linearly between the dial's "
        "nearest scales, whose gains are treated as exact; dashes: the dial's points do not reach that gain."
    )
    tables = [Table.of("equal-gain", "English at an equal gain", rows, records, note)]
    reached = {one.arm.name: there for (one, _), there in zip(dialled, equal, strict=True) if there}
    return tables + ([_pairs(reached, of)] if len(reached) > 1 else [])


def _pairs(reached: Mapping[str, Runs], of: str) -> Table:
    """The differences of English NLL of all pairs of arms, at the same gain."""
    pairs = all_pairs(reached)
    several = next(iter(pairs.values()))
    rows = [
        {"arm": other, **{f"than {one}": _cell(pairs[one, other]) if one != other else "-" for one in reached}}
        for other in reached
    ]
    records = [{"arm": other, "than": one, **found.as_dict()} for (one, other), found in pairs.items()]
    note = (
        f"English NLL of the arm minus that of the other, in nats per answer token, each at {SHARE:.0%} of {of}'s gain "
        f"(below zero: the arm's English is better). The 95% intervals of all {several.compared} pairs are "
        f"simultaneous, over {basis(several)}."
    )
    return Table.of(
        "equal-gain-pairs", "English at an equal gain, arm against arm", rows, records, note, measure="english"
    )


def _runs(standing: Standing, english: Sequence[str], others: Sequence[str]) -> list[_Run]:
    """The dials of an arm's runs; empty if one of them has no dial on the rows that the arms are compared on."""
    found = [
        _dial(run, read_scores(before.opened), english, others)
        for run, before in zip(standing.arm.runs, standing.before, strict=True)
    ]
    return [run for run in found if run] if all(found) else []


def _dial(run: Evidence, before: RowsByGroup, english: Sequence[str], others: Sequence[str]) -> _Run | None:
    stage = run.run.stages.get(dial_stage(Dial(run.recipe.phases[-1].name, ())))
    if stage is None or run.last is None:
        return None
    step, last = stage.opened, run.last.opened
    if step.inputs["settings"]["held_out"] != last.inputs["settings"]["held_out"]:
        return None
    measured = cast("DialMetrics", stage.metrics)["points"]
    scales = sorted(point["scale"] for point in measured if point.get("scale", -1) >= 0)
    points: dict[float, RowsByGroup] = {1.0: read_scores(last)}
    points |= {scale: read_scores(step, point_folder(scale)) for scale in scales}
    base = mean_nll(_of(read_scores(run.run.stages["eval/base"].opened), others))
    gains = {scale: base - mean_nll(_of(groups, others)) for scale, groups in points.items()}
    rising = sorted(points)
    return _Run(
        run.recipe.seed,
        tuple(gains[scale] for scale in rising),
        tuple(_of(points[scale], english) for scale in rising),
        _of(before, english),
        gains[1.0],
    )


def _there(runs: Sequence[_Run], wanted: Sequence[float]) -> Runs | None:
    """The English scores of an arm's runs, by seed, where each has the wanted gain.

    None where a run does not reach it, or where nothing was gained.
    """
    places = [place_of(run.gains, gain) for run, gain in zip(runs, wanted, strict=True)]
    if min(wanted) <= 0 or any(place is None for place in places):
        return None
    return {run.seed: scores_between(run.english, place) for run, place in zip(runs, places, strict=True) if place}


def _changes(arms: Sequence[Sequence[_Run]], there: Sequence[Runs | None]) -> list[Difference | None]:
    """The change of English of each arm that reaches the gain, None for the others."""
    pairs = [({run.seed: run.before for run in runs}, at) for runs, at in zip(arms, there, strict=True) if at]
    found = iter(changes(pairs) if pairs else [])
    return [next(found) if at else None for at in there]


def _of(groups: RowsByGroup, names: Sequence[str]) -> list[RowScore]:
    return [row for name in names for row in groups[name]]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _cell(change: Difference | None) -> str:
    return "-" if change is None else f"{change.value:+.3f}\n{bracket(change.low, change.high, 3)}"


def _record(name: str, change: Difference | None) -> dict[str, float | None]:
    values = (None, None, None) if change is None else (change.value, change.low, change.high)
    return dict(zip((f"english_{name}", f"english_{name}_low", f"english_{name}_high"), values, strict=True))
