"""The report's first section: EA against MA, with the arms' seeds; and the answer at the top of the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from qcft.measure.stats import Difference
from qcft.report.arms import ArmRuns, Evidence, members, whose
from qcft.report.cells import basis, bracket, conclusion, listed, stage_name
from qcft.report.document import Figure, Section, Table
from qcft.report.plots import BETTER, FAINT, INK, PAPER, UNIT, better_up_and_right, draw, label, legend_below, look
from qcft.report.standing import ENGLISH, NEAR, Standing, english_pairs, front, mean_of, standings, verdict
from qcft.report.suites import last_averages
from qcft.report.verdict import ONE_RUN, became, verdict_in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def question_and_answer(arms: Sequence[ArmRuns]) -> tuple[str, str]:
    """The question that these runs answer, and the answer, on one line each."""
    languages = _languages(arms)
    gain = f"gain in {languages}" if languages else "gain"
    if len(arms) == 1:
        question = f"What did {arms[0].name} {gain}, and what English did it forget?"
        if len(arms[0].runs) == 1:
            table = arms[0].runs[0].run.table
            of_english = sum(group["english"] for group in table["groups"])
            answer = " ".join(conclusion(table)[: of_english + 1])
        else:
            answer = " ".join(f"{became(one)}; means over {len(one.english)} seeds." for one in standings(arms))
        return question, answer or "Not known yet: its last phase is not measured."
    question = f"Which of {len(arms)} arms kept the most English for the most {gain}?"
    found = standings(arms)
    said = verdict(found)
    if said is None:
        why = "no arm gained in the other languages" if found else "too few arms are measured on the same rows"
        return question, f"None can be named: {why}."
    return question, verdict_in_words(said, len(found))


def ability_section(arms: Sequence[ArmRuns]) -> Section | None:
    """EA against MA: the arms, or one run's stages."""
    found = standings(arms)
    if not found:
        return None
    if len(arms) == 1 and len(arms[0].runs) == 1:
        return Section("abilities", "English against the other languages", (_path(arms[0].runs[0]),))
    tasks = last_averages(arms)
    first = (_pareto_of_tasks(tasks),) if tasks else ()
    return Section(
        "abilities", "English against the other languages", (*first, _pareto(found), _table(found), *_pairs(found))
    )


def _languages(arms: Sequence[ArmRuns]) -> str:
    groups = [g["lang"] for _, run in members(arms) for g in run.run.table["groups"] if not g["english"]]
    names = [name for name in dict.fromkeys(groups) if name != "?"]
    return listed(names)


def _pareto(found: Sequence[Standing]) -> Figure:
    before = {s.before[0].step for s in found}

    def body(axes: Axes) -> None:
        places = {s.arm.name: list(zip(s.english, s.others, strict=True)) for s in found}
        _scatter(axes, places, {s.arm.name for s in found if s.front})
        if len(before) == 1:
            level = found[0].place[0] - found[0].lost.value
            axes.axhline(level, color=INK, linewidth=1, linestyle="--", zorder=1)
            axes.annotate(  # at the left: the best arms lie at the right, near the line
                f"English after {found[0].since}", (0, level), xycoords=("axes fraction", "data"),
                xytext=(4, -11), textcoords="offset points", ha="left", fontsize=9,
            )  # fmt: skip
        better_up_and_right(axes)
        legend_below(axes)

    return draw(
        "pareto",
        f"EA against MA at the end of each arm: mean {UNIT}, on the same held-out rows; up and to the right is "
        f"better.{_seeds([s.english for s in found])}",
        "Scatter plot of English against the other languages, arm by arm; the numbers are in the table that follows.",
        body,
        height=2.8,
    )


def _pareto_of_tasks(places: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    means = {name: tuple(-sum(side) / len(side) for side in zip(*runs, strict=True)) for name, runs in places.items()}

    def body(axes: Axes) -> None:
        percent = {name: [(100 * ea, 100 * ma) for ea, ma in runs] for name, runs in places.items()}
        _scatter(axes, percent, front(means))
        axes.margins(0.12)
        label(axes, f"MA: tasks in other languages, %, {BETTER}", f"EA: English tasks, %\n{BETTER}")

    return draw(
        "pareto-tasks",
        "EA against MA at the end of each arm: mean scores of the tasks, in percent; up and to the right is "
        f"better.{_seeds(list(places.values()))}",
        "Scatter plot of English tasks against those in other languages; the numbers are in the table of tasks.",
        body,
        height=2.8,
    )


def _scatter(axes: Axes, places: Mapping[str, Sequence[tuple[float, float]]], best: set[str]) -> None:
    """Each arm's runs (EA, MA), their mean and spread, and a line through the `best`."""
    means = {}
    for i, (name, runs) in enumerate(places.items()):
        own: dict[str, Any] = {"marker": look(i).marker, "color": look(i).colour}
        english, others = zip(*runs, strict=True)
        means[name] = here = (sum(others) / len(others), sum(english) / len(english))
        if len(runs) > 1:
            axes.plot(others, english, linestyle="", markersize=4, alpha=0.55, **own)
            axes.errorbar(
                *here, xerr=_spread(others), yerr=_spread(english), fmt="none", ecolor=FAINT, capsize=3, linewidth=1
            )
        axes.plot(
            *here, linestyle="", markersize=9, markeredgecolor=INK if name in best else PAPER, markeredgewidth=1.2,
            label=name, zorder=3, **own,
        )  # fmt: skip
    line = sorted(means[name] for name in best)
    axes.plot([x for x, _ in line], [y for _, y in line], color=FAINT, linewidth=1, linestyle=":", zorder=1)


def _seeds(arms: Sequence[Sequence[Any]]) -> str:
    outlined = " Outlined points joined by the dotted line: no other arm is better on both axes."
    if all(len(runs) == 1 for runs in arms):
        return outlined
    return f" Large points: the mean over seeds; small points: each seed; bars: the range.{outlined}"


def _path(evidence: Evidence) -> Figure:
    stages = evidence.run.table["stages"]
    places: list[tuple[str, Any, Any]] = []
    for stage in stages:
        groups = stage["groups"].values()
        english, others = (mean_of(g for g in groups if (g["lang"] == ENGLISH) is side) for side in (True, False))
        places.append((stage_name(stage), others, english))

    def body(axes: Axes) -> None:
        axes.plot([p[1] for p in places], [p[2] for p in places], color=FAINT, linewidth=1, linestyle=":", zorder=1)
        for i, (name, others, english) in enumerate(places):
            axes.plot(
                others, english, linestyle="", markersize=8, marker=look(i).marker,
                color=look(i).colour, markeredgecolor=PAPER, label=name,
            )  # fmt: skip
        better_up_and_right(axes)
        legend_below(axes)

    return draw(
        "stages",
        f"EA against MA, stage by stage: mean {UNIT}, on held-out rows; up and to the right is better. 4-bit "
        "weights alone make a small model much worse: compare stages of one precision only.",
        "The path of the model from stage to stage, English against the other languages; the numbers are in the table "
        "of stages and languages.",
        body,
        height=2.8,
    )


def _spread(values: Sequence[float]) -> list[list[float]]:
    mean = sum(values) / len(values)
    return [[mean - min(values)], [max(values) - mean]]


def _table(found: Sequence[Standing]) -> Table:
    several = any(len(s.english) > 1 for s in found)
    seeds, interval = ("\n[least to most of the seeds]", "rows and seeds") if several else ("", "rows")
    rows, records = [], []
    for one in found:
        rows.append(
            {
                "arm": one.arm.name + ("\u00a0*" if one.front else ""),
                "runs": str(len(one.english)),
                f"EA: English \u2193{seeds}": _level(one.place[0], one.english),
                f"MA: other languages \u2193{seeds}": _level(one.place[1], one.others),
                f"change of English \u2193\n[95% interval over {interval}]": _change(one.lost, f" since {one.since}"),
                f"change since the base \u2193\n[95% interval over {interval}]": _change(one.gained),
                **({f"English like that trained on \u2193\n[95% interval over {interval}]": _change(one.lost_trained)}
                   if one.lost_trained else {}),
            }
        )  # fmt: skip
        parts = {"english": one.lost, "others": one.gained, "english_trained": one.lost_trained}
        changes = {f"{key}_{part}": value for key, change in parts.items() if change
                   for part, value in change.as_dict().items()}  # fmt: skip
        records += [
            {**whose(one.arm, run), "ea_nll": ea, "ma_nll": ma, "front": one.front, "since": one.since, **changes}
            for run, ea, ma in zip(one.arm.runs, one.english, one.others, strict=True)
        ]
    note = (
        f"Mean {UNIT}, over all tokens of all rows, lower is better (\u2193). Changes are means over an arm's runs; "
        f"their intervals are not simultaneous: English {basis(found[0].lost)}, other languages "
        f"{basis(found[0].gained)}. {'' if several else f'{ONE_RUN}. '}* No other arm is better at both. The answer is "
        f"about the arm with the most English among those with at least {NEAR:.0%} of the largest gain."
    )
    if found[0].lost_trained:
        note += (
            " The English rows are of a kind that no arm trains on; next to them is the change on rows like those of "
            f"the first phase, which replay and mixed arms may train on ({basis(found[0].lost_trained)})."
        )
    return Table.of("abilities", "EA and MA, arm by arm", rows, records, note)


def _pairs(found: Sequence[Standing]) -> Iterator[Table]:
    """English, arm against arm."""
    pairs = english_pairs(found)
    once = {(a.arm.name, b.arm.name): pairs[a.arm.name, b.arm.name] for a, b in combinations(found, 2)}
    if not once:
        return
    several = any(len(s.english) > 1 for s in found)
    title = f"English NLL of the second minus the first\n[95% interval over rows{' and seeds' if several else ''}]"
    rows = [
        {"arms": f"{a}, {b}", title: _change(d),
         "clear": ("yes" if d.is_clear else "no") if several else "not tested"}
        for (a, b), d in once.items()
    ]  # fmt: skip
    records = ({"arm": b, "against": a, **d.as_dict()} for (a, b), d in once.items())
    some = next(iter(once.values()))
    note = (
        f"{UNIT}; {basis(some)}. Clear: the interval excludes zero. The {some.compared} intervals are simultaneous: if "
        f"all arms are equal, the chance that any of them excludes zero is 5%. {'' if several else f'{ONE_RUN}.'}"
    )
    yield Table.of(
        "comparisons", "English, arm against arm", rows, records, note.strip(), words=("clear",), measure="english"
    )


def _change(change: Difference, since: str = "") -> str:
    return f"{change.value:+.3f}{since}\n{bracket(change.low, change.high, 3)}"


def _level(mean: float, runs: Sequence[float]) -> str:
    return f"{mean:.3f}" if len(runs) == 1 else f"{mean:.3f}\n[{min(runs):.3f} to {max(runs):.3f}]"
