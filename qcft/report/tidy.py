"""A run's measurements in long form: one number a row, for pandas and the like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qcft.recipe.stages import PROBES
from qcft.store.table import Abilities, RunTable

COLUMNS = ("arm", "seed", "stage", "language", "rows_of", "measure", "value", "low", "high")


def tidy_rows(table: RunTable, arm: str, seed: int) -> Iterator[dict[str, Any]]:
    """The numbers of a run's table under the names of COLUMNS.

    `rows_of` is the held-out group or the task. `low` and `high` are the 95% interval of a change, as the run's tables
    have it, None for what is no change. NLL is in nats per answer token; accuracy is the share of answer tokens right.
    """
    for stage, language, rows_of, measure, value, low, high in (*_held_out(table), *_tasks(table["abilities"])):
        yield dict(zip(COLUMNS, (arm, seed, stage, language, rows_of, measure, value, low, high), strict=True))


Row = tuple[str, str | None, str | None, str, float, float | None, float | None]


def _held_out(table: RunTable) -> Iterator[Row]:
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


def _tasks(abilities: Abilities) -> Iterator[Row]:
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
