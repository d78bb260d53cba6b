"""The matrix of stages and tasks: what the stages were evaluated on, in `table["abilities"]` of their runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qcft.report.arms import Arm, Evidence, shared_by
from qcft.report.cells import continual_in_words
from qcft.report.document import Block, Prose, Section, Table

SIDES = ("EA", "MA", "overall")
NOTE = (
    "Scores in percent. EA: mean over English tasks; MA: over tasks in other languages, a task's languages averaged "
    "first; overall: the mean of the two. In brackets 95% intervals (paired bootstrap over items); * excludes zero."
)
Member = tuple[Arm, Evidence, Mapping[str, Any]]


def suites_section(arms: Sequence[Arm]) -> Section | None:
    """A table for each way of evaluating, and the language of answers."""
    blocks: list[Block] = []
    several = sum(len(arm.runs) for arm in arms) > 1
    ways = evaluated(arms)
    fidelity: dict[str, list[Member]] = {}
    for arm, run, found in _found(arms):
        for cell in found["fidelity"]:
            fidelity.setdefault(json.dumps(cell["asked"], sort_keys=True), []).append((arm, run, cell))
    if max(len(ways), len(fidelity)) > 1:
        blocks.append(Prose(("Measured with other settings, and not to be compared: a table for each.",)))
    for number, members in enumerate(ways, start=1):
        more = "" if number == 1 else f"-{number}"
        blocks.append(_matrix(members, arms, more, several))
        if any(table["changes"] for _, _, table in members):
            blocks.append(_changes(members, more, several))
        told = [f"{_of(arm, run, several)}{text}" for arm, run, table in members for text in _transfer(table)]
        if told:
            blocks.append(Prose(tuple(told)))
    for number, cells in enumerate(fidelity.values(), start=1):
        blocks.append(_fidelity(cells, "" if number == 1 else f"-{number}", several))
    return Section("suites", "What the stages can do", tuple(blocks)) if blocks else None


def _transfer(table: Mapping[str, Any]) -> list[str]:
    return continual_in_words(table["continual"], "points", 100)


def _of(arm: Arm, run: Evidence, several: bool) -> str:
    return f"{arm.label(run)}: " if several else ""


def evaluated(arms: Sequence[Arm]) -> list[list[Member]]:
    """The runs' tables of scores, those together that were made with the same settings on the same items."""
    alike: dict[str, list[Member]] = {}
    for arm, run, found in _found(arms):
        for table in found["tables"]:
            key = json.dumps([table["settings"], table["tasks"]], sort_keys=True)
            alike.setdefault(key, []).append((arm, run, table))
    return list(alike.values())


def last_averages(arms: Sequence[Arm]) -> dict[str, list[tuple[float, float]]] | None:
    """EA and MA (shares) of each arm's runs after their last phase; None unless all were evaluated alike."""
    every = sum(len(arm.runs) for arm in arms)
    for members in evaluated(arms):
        found: dict[str, list[tuple[float, float]]] = {}
        for arm, run, table in members:
            last = next((s for s in table["stages"] if s["stage"] == run.recipe.phases[-1].name), None)
            if last and last["EA"] is not None and last["MA"] is not None:
                found.setdefault(arm.name, []).append((last["EA"], last["MA"]))
        if sum(map(len, found.values())) == every:
            return found
    return None


def _found(arms: Sequence[Arm]) -> Iterator[Member]:
    for arm in arms:
        for run in arm.runs:
            found = run.run.table.get("abilities")
            if found:
                yield arm, run, found


def _matrix(members: Sequence[Member], arms: Sequence[Arm], more: str, several: bool) -> Table:
    tasks = [task["task"] for task in members[0][2]["tasks"]]
    sides = [side for side in SIDES if any(stage[side] is not None for _, _, t in members for stage in t["stages"])]
    rows: dict[str, dict[str, list[str]]] = {}
    sharing: dict[str, list[tuple[Arm, Evidence]]] = {}
    records = []
    for arm, run, table in members:
        for stage in table["stages"]:
            cells = [f"{stage['name']}, {stage['precision']}"]
            cells += [_percent(stage["scores"].get(task)) for task in tasks]
            cells += [_percent(stage[side]) for side in sides]
            key = " ".join(run.run.stages[f"abilities/{stage['stage']}/{task}"].step for task in stage["scores"])
            rows.setdefault(stage["stage"], {}).setdefault(key, cells)
            sharing.setdefault(key, []).append((arm, run))
            records.append(
                {"arm": arm.name, "run": run.run.name, "seed": run.recipe.seed}
                | {key: stage[key] for key in ("stage", "precision")}
                | {task: stage["scores"].get(task) for task in tasks}
                | {side: stage[side] for side in sides}
            )
    shown = [
        (cells[0], *([shared_by(sharing[key], arms)] if several else []), *cells[1:])
        for steps in rows.values()
        for key, cells in steps.items()
    ]
    titles = [f"{t['task']}\n{t['metric']}, {t['items']:,} items" for t in members[0][2]["tasks"]]
    return Table(
        f"tasks{more}",
        "Stages and tasks",
        ("stage", *(["of"] if several else []), *titles, *sides),
        tuple(shown),
        tuple(records),
        f"{_settings(members[0][2])} {NOTE}",
        words=(0, 1) if several else (0,),
    )


def _changes(members: Sequence[Member], more: str, several: bool) -> Table:
    tasks = [task["task"] for task in members[0][2]["tasks"]]
    rows, records = [], []
    for arm, run, table in members:
        for change in table["changes"]:
            found = {**change["tasks"], **{side: change[side] for side in SIDES if side in change}}
            name = f"{change['to_name']} since {change['from_name']}"
            cells = [_changed(found.get(key)) for key in (*tasks, *SIDES)]
            rows.append((*([arm.label(run)] if several else []), name, *cells))
            records += [
                {"arm": arm.name, "run": run.run.name, "seed": run.recipe.seed, "to": change["to"]}
                | {"from": change["from"], "of": key}
                | {part: entry[part] for part in ("value", "low", "high", "items")}
                for key, entry in found.items()
            ]
    return Table(
        f"task-changes{more}",
        "What changed, in points",
        (*(["arm"] if several else []), "change", *tasks, *SIDES),
        tuple(rows),
        tuple(records),
        words=(0, 1) if several else (0,),
    )


def _fidelity(cells: Sequence[Member], more: str, several: bool) -> Table:
    languages = list(dict.fromkeys(lang for _, _, cell in cells for lang in cell["languages"]))
    rows, records = [], []
    for arm, run, cell in cells:
        row = [f"{cell['name']}, {cell['precision']}", *([arm.label(run)] if several else [])]
        for lang in languages:
            entry = cell["languages"].get(lang)
            row.append(_answered(entry))
            if entry:
                records.append({"run": run.run.name, "stage": cell["stage"], "lang": lang, **entry})
        rows.append(tuple(row))
    return Table(
        f"fidelity{more}",
        "The language of answers",
        ("stage", *(["of"] if several else []), *(f"prompts in {lang}" for lang in languages)),
        tuple(rows),
        tuple(records),
        "Greedy answers to held-out prompts: the share in the prompt's language, of those long enough to tell.",
        words=(0, 1) if several else (0,),
    )


def _settings(table: Mapping[str, Any]) -> str:
    cuts = [
        f"{task['task']} {word} {task[key]}"
        for task in table["tasks"]
        for key, word in (("limit", "limit"), ("max_new_tokens", "answers of at most (tokens)"))
        if task[key]
    ]
    return "; ".join([f"lm-eval {table['settings']['lm_eval']}", "chat template applied", *cuts]) + "."


def _answered(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "-"
    share = "none can be told" if entry["right"] is None else f"{entry['right']:.0%} of {entry['told']} in it"
    return f"{share}\n{entry['mean_tokens']:.0f} tokens, {entry['unfinished']:.0%} unfinished"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _changed(change: Mapping[str, Any] | None) -> str:
    if change is None:
        return "-"
    star = " *" if change["clear"] else ""
    return f"{100 * change['value']:+.1f}{star}\n[{100 * change['low']:+.1f}, {100 * change['high']:+.1f}]"
