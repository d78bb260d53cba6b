"""A run's measurements in long form: one number a row, for pandas and the like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qcft.recipe.stages import PROBES

COLUMNS = ("arm", "seed", "stage", "language", "rows_of", "measure", "value", "low", "high")


def tidy_rows(table: Mapping[str, Any], arm: str, seed: int) -> Iterator[dict[str, Any]]:
    """The numbers of a run's table under the names of COLUMNS.

    `rows_of` is the held-out group or the task. `low` and `high` are the 95% interval (paired bootstrap over items) of
    a change, None for what is no change. NLL is in nats per answer token; accuracy is the share of answer tokens right.
    """
    for stage, language, rows_of, measure, value, low, high in (*_held_out(table), *_tasks(table["abilities"])):
        yield dict(zip(COLUMNS, (arm, seed, stage, language, rows_of, measure, value, low, high), strict=True))


Row = tuple[str, str | None, str | None, str, float, float | None, float | None]


def _held_out(table: Mapping[str, Any]) -> Iterator[Row]:
    langs = {group["name"]: group["lang"] for group in table["groups"]}
    for stage in table["stages"]:
        name = stage["stage"].removeprefix(PROBES)
        for group, score in stage["groups"].items():
            for measure in ("nll", "accuracy"):
                yield name, langs[group], group, measure, score[measure], None, None
        if stage["answers"]:
            for measure, key in (("answer tokens", "mean_tokens"), ("answers finished", "finished")):
                yield name, "en", None, measure, stage["answers"][key], None, None
    for change in table["changes"]:
        since = f"nll since {change['from'].removeprefix(PROBES)}"
        for group, one in change["groups"].items():
            yield (
                *(change["to"].removeprefix(PROBES), langs[group], group, since),
                *(one["value"], one["low"], one["high"]),
            )
    for stage, kept in table["kept"].items():
        if kept["share"] is not None:
            yield stage, None, None, "kept", kept["share"], None, None


def _tasks(abilities: Mapping[str, Any]) -> Iterator[Row]:
    for table in abilities["tables"]:
        tasks = {task["task"]: task for task in table["tasks"]}
        for stage in table["stages"]:
            for name, score in stage["scores"].items():
                yield stage["stage"], tasks[name]["lang"], name, tasks[name]["metric"], score, None, None
            for side in ("EA", "MA", "overall"):
                if stage[side] is not None:
                    yield stage["stage"], None, None, side, stage[side], None, None
        for change in table["changes"]:
            for name, one in change["tasks"].items():
                measure = f"{tasks[name]['metric']} since {change['from']}"
                yield change["to"], tasks[name]["lang"], name, measure, one["value"], one["low"], one["high"]
    for cell in abilities["fidelity"]:
        if cell["right"] is not None:
            yield cell["stage"], cell["lang"], cell["task"], "answers in their language", cell["right"], None, None
