"""The words and numbers of the evaluations' tables in the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

Table = Mapping[str, Any]

NOTE = (
    "Scores in percent. EA: mean over English tasks; MA: over tasks in other languages, a task's languages averaged "
    "first; overall: the mean of the two. * a change whose 95% interval (paired bootstrap over items) excludes zero."
)
FIDELITY_NOTE = "Greedy answers to held-out prompts: the share in the prompt's language, of those long enough to tell."


def settings_in_words(table: Table) -> str:
    """How the scores of a table were made."""
    words = [f"lm-eval {table['settings']['lm_eval']}", "chat template applied"]
    for task in table["tasks"]:
        cuts = [f"limit {task['limit']}"] if task["limit"] else []
        cuts += [f"answers of at most {task['max_new_tokens']} tokens"] if task["max_new_tokens"] else []
        if cuts:
            words.append(f"{task['task']} {', '.join(cuts)}")
    return "; ".join(words)


def task_header(table: Table) -> list[str]:
    """Column titles: the stage, each task with its score and items, the averages."""
    titles = [f"{t['task']}\n{t['metric']}, {t['items']}{_shots(t)}" for t in table["tasks"]]
    return ["stage", *titles, *_sides(table)]


def task_rows(table: Table) -> list[list[str]]:
    """A line per stage, then one per comparison."""
    lines = []
    for stage in table["stages"]:
        line = [f"{stage['name']}, {stage['precision']}"]
        line += [_percent(stage["scores"].get(task["task"])) for task in table["tasks"]]
        lines.append(line + [_percent(stage[side]) for side in _sides(table)])
    for change in table["changes"]:
        line = [f"{change['to_name']} since {change['from_name']}"]
        line += [_changed(change["tasks"].get(task["task"])) for task in table["tasks"]]
        lines.append(line + [_changed(change.get(side)) for side in _sides(table)])
    return lines


def asked_alike(cells: Iterable[Table]) -> list[list[Table]]:
    """The language of answers, those together that were asked the same in the same way."""
    ways: dict[str, list[Table]] = {}
    for cell in cells:
        ways.setdefault(json.dumps(cell["asked"], sort_keys=True), []).append(cell)
    return list(ways.values())


def fidelity_table(cells: list[Table]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows: a line per stage, a column per language of the prompts."""
    languages = list(dict.fromkeys(lang for cell in cells for lang in cell["languages"]))
    rows = []
    for cell in cells:
        row = [f"{cell['name']}, {cell['precision']}"]
        for lang in languages:
            row.append(_answered(cell["languages"].get(lang)))
        rows.append(row)
    return ["stage", *(f"prompts in {lang}" for lang in languages)], rows


def _answered(entry: Table | None) -> str:
    if entry is None:
        return "-"
    share = "none can be told" if entry["right"] is None else f"{entry['right']:.0%} of {entry['told']} in it"
    return f"{share}\n{entry['mean_tokens']:.0f} tokens, {entry['unfinished']:.0%} unfinished"


def _sides(table: Table) -> list[str]:
    return [side for side in ("EA", "MA", "overall") if any(stage[side] is not None for stage in table["stages"])]


def _shots(task: Table) -> str:
    return f" items, {task['shots']} shots" if task["shots"] else " items"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _changed(change: Table | None) -> str:
    if change is None:
        return "-"
    star = " *" if change["clear"] else ""
    return f"{100 * change['value']:+.1f}{star}\n[{100 * change['low']:+.1f}, {100 * change['high']:+.1f}]"
