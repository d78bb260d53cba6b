"""The texts and numbers of the evaluations' tables, shared by the terminal and the page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from qcft.report.cells import bracket, change_name, stage_name
from qcft.store.metrics import AnsweredIn
from qcft.store.table import FidelityOf, ScoreChange, Side, TaskChange, TaskScores, TasksTable

SIDES: tuple[Side, ...] = ("EA", "MA", "overall")
SCORES = (
    "Scores in percent. EA: mean over English tasks; MA: mean over tasks in other languages, the languages of one task "
    "averaged first; overall: the mean of the two."
)
INTERVALS = (
    "In brackets 95% intervals of changes, over items (questions on one text, and translations of one question, count "
    "once). Those of a row are simultaneous: if nothing changed, the chance of any * is 5%. * It excludes zero."
)
FIDELITY = "Greedy answers to held-out prompts: the share in the prompt's language, of those long enough to identify."


def sides_of(tables: Sequence[TasksTable]) -> list[Side]:
    """The averages that any stage has."""
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
        "change": f"{change_name(change)}\n[95% intervals{_together(change)}]",
        **{title: _changed(change["tasks"].get(task)) for task, title in titles.items()},
        **{side: _changed(change.get(side)) for side in sides},
    }


def way_of_asking(cell: FidelityOf) -> str:
    """What must be equal for the languages of answers to be in one table."""
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
    share = "none identified" if entry["right"] is None else f"{entry['right']:.0%} of {entry['told']} in it"
    return f"{share}\n{entry['mean_tokens']:.0f} tokens, {entry['unfinished']:.0%} unfinished"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _changed(change: ScoreChange | None) -> str:
    if change is None:
        return "-"
    star = " *" if change["clear"] else ""
    low, high = (None if end is None else 100 * end for end in (change["low"], change["high"]))
    return f"{100 * change['value']:+.1f}{star}\n{bracket(low, high, 1)}"


def _together(change: TaskChange) -> str:
    """How many intervals of a row are simultaneous."""
    counts = [entry["compared"] for entry in change["tasks"].values() if entry["compared"] > 1]
    return f", {counts[0]} simultaneous" if counts else ""
