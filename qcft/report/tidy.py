"""Measurements in long form, one number per row, for pandas and the like: of a run, and of a report's table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qcft.recipe.stages import PROBES
from qcft.report.document import Table
from qcft.store.table import Abilities, RunTable

COLUMNS = ("arm", "seed", "stage", "language", "rows_of", "measure", "value", "low", "high")

# Keys of records, with the columns that they fill.
NAMED = {"lang": "language", "group": "rows_of", "to": "stage", "phase": "stage"}
NUMBERED = {"seed", "layer", "scale"}  # numbers that identify a row, not measurements
BASIS = ("low", "high", "level", "clusters", "seeds", "method", "compared", "rows")  # of an interval


def tidy_rows(table: RunTable, arm: str, seed: int) -> Iterator[dict[str, Any]]:
    """The numbers of a run's table under the names of COLUMNS.

    `rows_of` is the held-out group or the task. `low` and `high` are the 95% interval of a change, the same as in the
    run's tables; None for other numbers. NLL is in nats per answer token; accuracy is the share of correct answer
    tokens.
    """
    for stage, language, rows_of, measure, value, low, high in (*_held_out(table), *_tasks(table["abilities"])):
        yield dict(zip(COLUMNS, (arm, seed, stage, language, rows_of, measure, value, low, high), strict=True))


TidyRow = tuple[str, str | None, str | None, str, float, float | None, float | None]


def _held_out(table: RunTable) -> Iterator[TidyRow]:
    langs = {group["name"]: group["lang"] for group in table["groups"]}
    for stage in table["stages"]:
        name = stage["stage"].removeprefix(PROBES)
        for group, score in stage["groups"].items():
            yield name, langs[group], group, "nll", score["nll"], None, None
            yield name, langs[group], group, "accuracy", score["accuracy"], None, None
            if "bits_per_byte" in score:
                yield name, langs[group], group, "bits per byte", score["bits_per_byte"], None, None
        if stage["answers"]:
            yield name, "en", None, "answer tokens", stage["answers"]["mean_tokens"], None, None
            yield name, "en", None, "answers finished", stage["answers"]["finished"], None, None
    for change in table["changes"]:
        since = f"nll since {change['from'].removeprefix(PROBES)}"
        for group, one in change["groups"].items():
            yield (
                *(change["to"].removeprefix(PROBES), langs[group], group, since),
                *(one["value"], one["low"], one["high"]),
            )
    for merged, kept in table["kept"].items():
        if kept["share"] is not None:
            yield merged, None, None, "kept", kept["share"], None, None


def _tasks(abilities: Abilities) -> Iterator[TidyRow]:
    for table in abilities["tables"]:
        tasks = {task["task"]: task for task in table["tasks"]}
        for stage in table["stages"]:
            for name, score in stage["scores"].items():
                yield stage["stage"], tasks[name]["lang"], name, tasks[name]["metric"], score, None, None
            for side, mean in (("EA", stage["EA"]), ("MA", stage["MA"]), ("overall", stage["overall"])):
                if mean is not None:
                    yield stage["stage"], None, None, side, mean, None, None
        for change in table["changes"]:
            for name, one in change["tasks"].items():
                measure = f"{tasks[name]['metric']} since {change['from']}"
                yield change["to"], tasks[name]["lang"], name, measure, one["value"], one["low"], one["high"]
    for cell in abilities["fidelity"]:
        for lang, answered in cell["languages"].items():
            if answered["right"] is not None:
                yield cell["stage"], lang, cell["task"], "answers in their language", answered["right"], None, None


def tidy_table(table: Table) -> list[dict[str, object]]:
    """A table's numbers, one per row: COLUMNS first, then other columns that identify the number, and the basis of
    intervals. Records without numbers keep their values, under the names of these columns."""
    rows = table.values or [row for record in table.records for row in _melted(record, table.measure)]
    if not rows:
        return [_named(record) for record in table.records]
    more = dict.fromkeys(key for row in rows for key in row if key not in COLUMNS)
    return [{key: row.get(key) for key in (*COLUMNS, *more)} for row in rows]


def _melted(record: Mapping[str, object], measure: str) -> Iterator[dict[str, object]]:
    """A row for each number of a record; `english_low`, `english_rows` and so on are in the row of `english_value`."""
    numbers = {key: value for key, value in record.items() if key not in NUMBERED and _is_number(value)}
    parts = {prefix + part for prefix in map(_prefix, numbers) for part in BASIS}
    which = _named({key: value for key, value in record.items() if key not in parts and key not in numbers})
    for key, value in numbers.items():
        if key not in parts:
            own = {part: record[whole] for part in BASIS if (whole := _prefix(key) + part) in record}
            name = measure if key == "value" else key.removesuffix("_value")
            yield {**which, "measure": name, "value": value, **own}


def _prefix(key: str) -> str:
    return key.removesuffix("value") if key == "value" or key.endswith("_value") else f"{key}_"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _named(record: Mapping[str, object]) -> dict[str, object]:
    return {NAMED.get(key, key): value for key, value in record.items() if value is not None}
