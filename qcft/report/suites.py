"""The matrix of stages and tasks: the evaluations, in `table["abilities"]` of the runs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from qcft.report.arms import ArmRuns, Evidence, grouped, members, shared_once, whose
from qcft.report.cells import continual_in_words
from qcft.report.document import Block, Prose, Section, Table
from qcft.report.task_cells import (
    FIDELITY,
    INTERVALS,
    SCORES,
    SIDES,
    change_row,
    fidelity_rows,
    score_row,
    sides_of,
    way_of_asking,
)
from qcft.store.table import FidelityOf, TasksTable

NOTE = f"{SCORES} {INTERVALS}"
Scored = tuple[ArmRuns, Evidence, TasksTable]  # a run with one of its tables
Answered = tuple[ArmRuns, Evidence, FidelityOf]  # a run with the answers of one of its stages


def suites_section(arms: Sequence[ArmRuns]) -> Section | None:
    """A table for each way of evaluating, and the language of answers."""
    blocks: list[Block] = []
    several = len(members(arms)) > 1
    ways, fidelity = evaluated(arms), grouped(_answered(arms), lambda one: way_of_asking(one[2]))
    if max(len(ways), len(fidelity)) > 1:
        blocks.append(Prose(("Results with different settings cannot be compared, so they are in several tables.",)))
    for number, scored in enumerate(ways, start=1):
        more = "" if number == 1 else f"-{number}"
        blocks.append(_matrix(scored, arms, more))
        if any(table["changes"] for _, _, table in scored):
            blocks.append(_changes(scored, more, several))
        sentences = tuple(
            (f"{arm.label(run)}: " if several else "") + text
            for arm, run, table in scored
            for text in continual_in_words(table["continual"], "points", 100)
        )
        blocks += [Prose(sentences)] if sentences else []
    for number, cells in enumerate(fidelity, start=1):
        blocks.append(_fidelity(cells, "" if number == 1 else f"-{number}", arms))
    return Section("suites", "What the stages can do", tuple(blocks)) if blocks else None


def evaluated(arms: Sequence[ArmRuns]) -> list[list[Scored]]:
    """The runs' tables of scores, grouped by settings and items."""
    found = [(arm, run, table) for arm, run in members(arms) for table in run.run.table["abilities"]["tables"]]
    return grouped(found, lambda one: json.dumps([one[2]["settings"], one[2]["tasks"]], sort_keys=True))


def last_averages(arms: Sequence[ArmRuns]) -> dict[str, list[tuple[float, float]]] | None:
    """EA and MA (shares) of each arm's runs after their last phase; None unless all were evaluated in the same way."""
    for scored in evaluated(arms):
        found: dict[str, list[tuple[float, float]]] = {}
        for arm, run, table in scored:
            last = next((s for s in table["stages"] if s["stage"] == run.recipe.phases[-1].name), None)
            if last and last["EA"] is not None and last["MA"] is not None:
                found.setdefault(arm.name, []).append((last["EA"], last["MA"]))
        if sum(map(len, found.values())) == len(members(arms)):
            return found
    return None


def _answered(arms: Sequence[ArmRuns]) -> list[Answered]:
    return [(arm, run, one) for arm, run in members(arms) for one in run.run.table["abilities"]["fidelity"]]


def _matrix(scored: Sequence[Scored], arms: Sequence[ArmRuns], more: str) -> Table:
    tasks, sides = scored[0][2]["tasks"], sides_of([table for _, _, table in scored])
    arrows = {t["task"]: "\u2191" if t["higher_is_better"] else "\u2193" for t in tasks}
    titles = {t["task"]: f"{t['task']} {arrows[t['task']]}\n{t['metric']}, {t['items']:,} items" for t in tasks}
    rows, records, values = [], [], []
    for arm, run, table in scored:
        for stage in table["stages"]:
            key = " ".join(run.run.stages[f"abilities/{stage['stage']}/{task}"].step for task in stage["scores"])
            rows.append((stage["stage"], key, score_row(stage, titles, sides), (arm, run)))
            which = {**whose(arm, run), "stage": stage["stage"], "precision": stage["precision"]}
            averages = {side: stage[side] for side in sides}
            records.append(which | {task: stage["scores"].get(task) for task in titles} | averages)
            values += [
                {**which, "language": t["lang"], "rows_of": t["task"], "measure": t["metric"], "value": score}
                for t in tasks
                if (score := stage["scores"].get(t["task"])) is not None
            ]
            values += [{**which, "measure": side, "value": mean} for side, mean in averages.items() if mean is not None]
    note = f"{_settings(scored[0][2])} {NOTE}"
    title = "Stages and tasks, in percent (\u2191 higher is better)"
    return Table.of(f"tasks{more}", title, shared_once(rows, arms), records, note, values=values)


def _changes(scored: Sequence[Scored], more: str, several: bool) -> Table:
    titles = {task["task"]: task["task"] for task in scored[0][2]["tasks"]}
    rows, records = [], []
    for arm, run, table in scored:
        for change in table["changes"]:
            rows.append(({"arm": arm.label(run)} if several else {}) | change_row(change, titles, SIDES))
            averages = {str(side): change[side] for side in SIDES if side in change}
            records += [
                {**whose(arm, run), "to": change["to"], "from": change["from"], "of": key}
                | {part: value for part, value in entry.items() if part != "clear"}
                for key, entry in (change["tasks"] | averages).items()
            ]
    return Table.of(f"task-changes{more}", "What changed, in points", rows, records, measure="score change")


def _fidelity(cells: Sequence[Answered], more: str, arms: Sequence[ArmRuns]) -> Table:
    rows = [
        (cell["stage"], run.run.stages[f"abilities/{cell['stage']}/{cell['task']}"].step, row, (arm, run))
        for row, (arm, run, cell) in zip(fidelity_rows([cell for _, _, cell in cells]), cells, strict=True)
    ]
    records = (
        {**whose(arm, run), "stage": cell["stage"], "lang": lang, **entry}
        for arm, run, cell in cells
        for lang, entry in cell["languages"].items()
    )
    return Table.of(f"fidelity{more}", "The language of answers", shared_once(rows, arms), records, FIDELITY)


def _settings(table: TasksTable) -> str:
    cuts = [
        f"{task['task']} {word} {value}"
        for task in table["tasks"]
        for word, value in (("limit", task["limit"]), ("answers of at most (tokens)", task["max_new_tokens"]))
        if value
    ]
    return "; ".join([f"lm-eval {table['settings']['lm_eval']}", "chat template applied", *cuts]) + "."
