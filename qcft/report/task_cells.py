"""The words and numbers of the evaluations' tables, shared by the terminal and the page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from qcft.report.cells import change_name, stage_name
from qcft.store.metrics import AnsweredIn
from qcft.store.table import FidelityOf, ScoreChange, Side, TaskChange, TaskScores, TasksTable

SIDES: tuple[Side, ...] = ("EA", "MA", "overall")
SCORES = (
    "Scores in percent. EA: mean over English tasks; MA: over tasks in other languages, a task's languages averaged "
    "first; overall: the mean of the two."
)
FIDELITY = "Greedy answers to held-out prompts: the share in the prompt's language, of those long enough to tell."


def sides_of(tables: Sequence[TasksTable]) -> list[Side]:
    """The averages that there are."""
    return [side for side in SIDES if any(s[side] is not None for table in tables for s in table["stages"])]


def score_row(stage: TaskScores, titles: Mapping[str, str], sides: Iterable[Side]) -> dict[str, str]:
    """A stage's scores; `titles` are those of the tasks' columns."""
    return {
        "stage": stage_name(stage),
        **{title: _percent(stage["scores"].get(task)) for task, title in titles.items()},
        **{side: _percent(stage[side]) for side in sides},
    }


def change_row(change: TaskChange, titles: Mapping[str, str], sides: Iterable[Side]) -> dict[str, str]:
    """A change of scores, with its 95% intervals."""
    return {
        "change": change_name(change),
        **{title: _changed(change["tasks"].get(task)) for task, title in titles.items()},
        **{side: _changed(change.get(side)) for side in sides},
    }


def way_of_asking(cell: FidelityOf) -> str:
    """What must be equal for the language of answers to stand in one table."""
    return json.dumps(cell["asked"], sort_keys=True)


def fidelity_rows(cells: Sequence[FidelityOf]) -> list[dict[str, str]]:
    """A row per stage, a column per language of the prompts."""
    languages = list(dict.fromkeys(lang for cell in cells for lang in cell["languages"]))
    return [
        {
            "stage": stage_name(cell),
            **{f"prompts in {lang}": _answered(cell["languages"].get(lang)) for lang in languages},
        }
        for cell in cells
    ]


def _answered(entry: AnsweredIn | None) -> str:
    if entry is None:
        return "-"
    share = "none can be told" if entry["right"] is None else f"{entry['right']:.0%} of {entry['told']} in it"
    return f"{share}\n{entry['mean_tokens']:.0f} tokens, {entry['unfinished']:.0%} unfinished"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _changed(change: ScoreChange | None) -> str:
    if change is None:
        return "-"
    star = " *" if change["clear"] else ""
    return f"{100 * change['value']:+.1f}{star}\n[{100 * change['low']:+.1f}, {100 * change['high']:+.1f}]"
