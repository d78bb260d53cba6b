"""The forgetting matrix: stages by languages, and the changes since phase 1 and since the base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qcft.report.arms import ArmRuns, Evidence, Member, grouped, members, shared_once, whose
from qcft.report.cells import change_rows, conclusion, continual_in_words, stage_rows, text_note
from qcft.report.document import Block, Prose, Section, Table

LOWER_NLL = "NLL (\u2193 lower is better)"
CAPTION, CHANGE = f"{LOWER_NLL} and token accuracy (\u2191 higher is better)", "nll change"
NOTE = (
    "Held-out rows: mean NLL in nats per answer token (lower is better) and the share of answer tokens predicted "
    "right. In brackets 95% intervals of changes, not simultaneous, paired, over rows: bootstrap-t, or Student's t for "
    "fewer than 8. * English; ! English got worse, and the interval excludes zero. Compare stages of one precision "
    "only."
)


def stages_section(arms: Sequence[ArmRuns]) -> Section | None:
    """A table for each set of runs measured on the same rows in the same way."""
    runs = [(arm, run) for arm, run in members(arms) if run.run.table["stages"]]
    comparable = grouped(runs, lambda member: _way_of_measuring(member[1]))
    blocks: list[Block] = []
    for number, measured in enumerate(comparable, start=1):
        more = "" if number == 1 else f"-{number}"
        if len(runs) == 1:
            table = runs[0][1].run.table
            transfer = continual_in_words(table["continual"], "nats over the phases' own held-out rows")
            blocks += [_single(*runs[0]), Prose((*conclusion(table), *transfer))]
        else:
            blocks += [_levels(measured, arms, more), *_changes(measured, more)]
    if len(comparable) > 1:
        blocks.insert(
            0, Prose(("These runs were measured on different rows or in different ways, so there are several tables.",))
        )
    return Section("stages", "Stages and languages", tuple(blocks)) if blocks else None


def _way_of_measuring(run: Evidence) -> str:
    """What must be equal for two runs to be in one table: rows, the number of their tokens (an NLL per token cannot be
    compared between tokenizers), and the settings."""
    stage = next(name for name in run.run.stages if name.startswith("eval/"))
    settings = run.run.stages[stage].opened.inputs["settings"]
    tokens = [group["answer_tokens"] for group in run.run.table["stages"][0]["groups"].values()]
    ways = [settings[key] for key in ("held_out", "answers", "chat_template", "attn_implementation")]
    return f"{[*stage_rows(run.run.table)[0]]} {tokens} {ways}"


def _single(arm: ArmRuns, run: Evidence) -> Table:
    levels, changes = stage_rows(run.run.table), change_rows(run.run.table)
    records = ({**record, "arm": run.run.name} for of in (_level_records, _change_records) for record in of(arm, run))
    strong = range(len(levels), len(levels) + len(changes))
    return Table.of("stages", CAPTION, [*levels, *changes], records, _note(run), strong=strong, measure=CHANGE)


def _note(run: Evidence) -> str:
    return " ".join(filter(None, (NOTE, text_note(run.run.table))))


def _levels(measured: Sequence[Member], arms: Sequence[ArmRuns], more: str) -> Table:
    """Every stage once, with the runs that share it; the same stage of different arms in adjacent rows."""
    rows = [
        (stage["stage"], run.run.stages[stage["stage"]].step, cells, (arm, run))
        for arm, run in measured
        for stage, cells in zip(run.run.table["stages"], stage_rows(run.run.table), strict=True)
    ]
    records = (record for arm, run in measured for record in _level_records(arm, run))
    return Table.of(f"stages{more}", CAPTION, shared_once(rows, arms), records, _note(measured[0][1]))


def _changes(measured: Sequence[Member], more: str) -> Iterator[Table]:
    rows = [  # since phase 1 and since the base
        {"arm": arm.label(run), **cells} for arm, run in measured for cells in change_rows(run.run.table)[:2]
    ]
    if rows:
        records = (record for arm, run in measured for record in _change_records(arm, run))
        yield Table.of(
            f"changes{more}", f"What changed, with 95% intervals: {LOWER_NLL}", rows, records, measure=CHANGE
        )


def _level_records(arm: ArmRuns, run: Evidence) -> Iterator[dict[str, object]]:
    for stage in run.run.table["stages"]:
        for group in run.run.table["groups"]:
            score = stage["groups"][group["name"]]
            yield {
                **whose(arm, run),
                "stage": stage["name"],
                "precision": stage["precision"],
                "since": "",
                "group": group["name"],
                "lang": group["lang"],
                "nll": score["nll"],
                "accuracy": score["accuracy"],
                "rows": score["rows"],
                "answer_tokens": score["answer_tokens"],
                **({"bits_per_byte": score.get("bits_per_byte")} if text_note(run.run.table) else {}),
            }


def _change_records(arm: ArmRuns, run: Evidence) -> Iterator[dict[str, object]]:
    for change in run.run.table["changes"]:
        for group in run.run.table["groups"]:
            yield {
                **whose(arm, run),
                "stage": change["to_name"],
                "since": change["from_name"],
                "group": group["name"],
                "lang": group["lang"],
                **change["groups"][group["name"]],
            }
