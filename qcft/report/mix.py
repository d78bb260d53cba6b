"""The training data of the phases: sources and replay, by rows and by answer tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, cast

from qcft.report.arms import ArmRuns, Member, grouped, members, with_of
from qcft.report.cells import reasons_in_words
from qcft.report.document import Block, Figure, Section, Table
from qcft.report.plots import INK, PAPER, draw, legend_below, look
from qcft.report.training import TrainingCurve, trainings
from qcft.store.metrics import ReplayMetrics
from qcft.store.results import Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def mix_section(arms: Sequence[ArmRuns]) -> Section | None:
    """The mixes of the last phase as bars, and a table of every training's sources."""
    found = trainings(arms)
    if not found:
        return None
    # One training represents all those with the same rows of the same sources.
    mixes = [replace(same[0], runs=tuple(run for one in same for run in one.runs)) for same in grouped(found, _fed)]
    last = [mix for mix in mixes if mix.phase == found[-1].phase]
    blocks: list[Block] = []
    if any(len(mix.metrics["mix"]) > 1 for mix in last):
        blocks.append(_bars(last, arms))
    blocks.append(_table(mixes, arms))
    if replayed := _replay_table(arms):
        blocks.append(replayed)
    return Section("mix", "What was trained on", tuple(blocks))


def _fed(one: TrainingCurve) -> str:
    fed = sorted(one.metrics["exposure"], key=lambda entry: str(entry["source"]))
    return json.dumps([one.phase, one.metrics["mix"], fed])


def _bars(mixes: Sequence[TrainingCurve], arms: Sequence[ArmRuns]) -> Figure:
    """A bar of rows and one of answer tokens for each mix of an arm's first run."""
    mixes = [mix for mix in mixes if _names(mix)]
    phase = mixes[0].phase
    sources = list(dict.fromkeys(share["source"] for mix in mixes for share in mix.metrics["mix"]))
    lines: list[tuple[str, TrainingCurve, Literal["rows", "answer_tokens"]]] = []
    for mix in mixes:
        lines.append((f"{_names(mix) if len(arms) > 1 else phase}\nrows", mix, "rows"))
        lines.append(("answer tokens", mix, "answer_tokens"))

    def body(axes: Axes) -> None:
        for i, source in enumerate(sources):
            widths, starts = [], []
            for _, one, key in lines:
                shares = {share["source"]: share[key] for share in one.metrics["mix"]}
                total = sum(shares.values())
                before = sum(shares.get(name, 0) for name in sources[:i])
                starts.append(100 * before / total)
                widths.append(100 * shares.get(source, 0) / total)
            axes.barh(
                range(len(lines)), widths, left=starts, color=look(i).colour, label=source,
                hatch=look(i).hatch, edgecolor=PAPER, linewidth=0.8, height=0.8,
            )  # fmt: skip
        axes.set_yticks(range(len(lines)), [label for label, _, _ in lines])
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.tick_params(left=False, labelcolor=INK)
        axes.set_xlim(0, 100)
        axes.set_xlabel(f"% of {phase}'s mix")
        legend_below(axes, columns=1)

    return draw(
        "mix",
        f"The mix of {phase}: each source's share of the rows, and of the answer tokens, which have the loss."
        + (" Of each arm's first seed." if any(len(arm.runs) > 1 for arm in arms) else ""),
        "Stacked bars of each source's share; the numbers are in the table that follows.",
        body,
        height=1.0 + 0.42 * len(lines),
    )


def _names(mix: TrainingCurve) -> str:
    return ", ".join(arm.name for arm, run in mix.runs if run is arm.runs[0])


def _table(mixes: Sequence[TrainingCurve], arms: Sequence[ArmRuns]) -> Table:
    rows, records = [], []
    for one in mixes:
        mix = one.metrics["mix"]
        fed = {entry["source"]: entry for entry in one.metrics["exposure"]}
        total = sum(share["rows"] for share in mix), sum(share["answer_tokens"] for share in mix)
        for share in mix:
            seen = fed.get(share["source"], {"rows": 0, "tokens": 0, "answer_tokens": 0})
            row = {
                "phase": one.phase,
                "source": share["source"],
                "rows": f"{share['rows']:,} ({share['rows'] / total[0]:.1%})",
                "answer tokens": f"{share['answer_tokens']:,} ({share['answer_tokens'] / total[1]:.1%})",
                "tokens": f"{share['tokens']:,}",
                "trained, all epochs": f"{seen['rows']:,} rows, {seen['answer_tokens']:,} answer tokens",
                "dropped": reasons_in_words(share["left_out"], "none"),
            }
            rows.append(with_of(row, one.runs, arms))
            records.append(
                {"phase": one.phase, "runs": "; ".join(run.run.name for _, run in one.runs)}
                | {"source": share["source"]}
                | {key: share[key] for key in ("rows", "tokens", "answer_tokens")}
                | {f"trained_{key}": seen[key] for key in ("rows", "tokens", "answer_tokens")}
            )
    words = ("source", "dropped")
    note = "Answer tokens are those with loss."
    return Table.of("mix", "Sources, and how much of them was used", rows, records, note, words=words)


def _replay_table(arms: Sequence[ArmRuns]) -> Table | None:
    """The requested and the actual share of each replay, in both units, and how many answers were cut off."""
    found: dict[str, tuple[str, Stage]] = {}
    sharing: dict[str, list[Member]] = {}
    for member in members(arms):
        run = member[1]
        phases = [phase.name for phase in run.recipe.phases if phase.replay and phase.replay.ratio > 0]
        stages = [stage for stage in run.run.stages.values() if stage.step.startswith("replay-")]
        for phase, stage in zip(phases, stages, strict=False):  # some may not be done
            found.setdefault(stage.step, (phase, stage))
            sharing.setdefault(stage.step, []).append(member)
    rows, records = [], []
    for step, (phase, stage) in found.items():
        made, asked = cast("ReplayMetrics", stage.metrics), stage.opened.inputs["settings"]
        cut = [part["cut"] for part in made["parts"] if "cut" in part]
        cut_rows, cut_tokens = sum(one["rows"] for one in cut), sum(one["answer_tokens"] for one in cut)
        mean = _per(made["answer_tokens"], made["rows"])
        without = _per(made["answer_tokens"] - cut_tokens, made["rows"] - cut_rows)
        record = {
            "phase": phase,
            "ratio": asked["ratio"],
            "unit": asked["unit"],
            "rows": made["rows"],
            "share_of_rows": made["share_of_rows"],
            "answer_tokens": made["answer_tokens"],
            "share_of_answer_tokens": made["share_of_answer_tokens"],
            "cut": cut_rows,
            "mean_answer_tokens": mean,
            "mean_without_cut": without,
        }
        row = {
            "phase": phase,
            "requested": f"{asked['ratio']:g} of {asked['unit']}",
            "rows": f"{made['rows']:,} ({made['share_of_rows']:.1%})",
            "answer tokens": f"{made['answer_tokens']:,} ({made['share_of_answer_tokens']:.1%})",
            "answers cut off": f"{cut_rows:,} of {made['rows']:,}",
            "mean answer tokens": _whole(mean),
            "without those cut off": _whole(without),
        }
        rows.append(with_of(row, sharing[step], arms))
        records.append(record | {"runs": "; ".join(run.run.name for _, run in sharing[step])})
    note = (
        "In brackets: the share of the phase's mix. Answers are cut off if they are not finished at max_new_tokens: "
        "they are trained on without loss on an end of turn."
    )
    return Table.of("replay", "Replay", rows, records, note, words=("requested",)) if rows else None


def _per(tokens: int, rows: int) -> float | None:
    return tokens / rows if rows else None


def _whole(mean: float | None) -> str:
    return "-" if mean is None else f"{mean:.0f}"
