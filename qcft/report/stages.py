"""The forgetting matrix: stages by languages, and what changed since phase 1 and since the base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qcft.report.arms import Arm, Evidence, shared_by
from qcft.report.cells import change_rows, conclusion, continual_in_words, header, stage_rows
from qcft.report.document import Block, Prose, Section, Table

NOTE = (
    "Held-out rows: mean NLL in nats per answer token (lower is better) and the share of answer tokens predicted "
    "right. * English; ! an English loss whose 95% interval (paired bootstrap over rows) excludes zero. Compare stages "
    "of one precision only."
)


def stages_section(arms: Sequence[Arm]) -> Section | None:
    """A table for each set of runs that were measured on the same rows in the same way."""
    runs = [(arm, run) for arm in arms for run in arm.runs if run.run.table["stages"]]
    alike: dict[str, list[tuple[Arm, Evidence]]] = {}
    for arm, run in runs:
        alike.setdefault(_way_of_measuring(run), []).append((arm, run))
    blocks: list[Block] = []
    for number, members in enumerate(alike.values(), start=1):
        more = "" if number == 1 else f"-{number}"
        if len(runs) == 1:
            blocks.append(_single(members[0][1]))
            blocks.append(Prose((*conclusion(members[0][1].run.table), *_transfer(members[0][1]))))
        else:
            blocks += [_levels(members, arms, more), *_changes(members, more)]
    if len(alike) > 1:
        blocks.insert(0, Prose(("These runs were measured on different rows or in different ways: a table for each.",)))
    return Section("stages", "Stages and languages", tuple(blocks)) if blocks else None


def _transfer(run: Evidence) -> list[str]:
    return continual_in_words(run.run.table["continual"], "nats over the phases' own held-out rows")


def _way_of_measuring(run: Evidence) -> str:
    """What must be equal for two runs to stand in one table: rows, the tokens they come to (an NLL per token means
    another thing with another tokenizer), and the settings."""
    stage = next(name for name in run.run.stages if name.startswith("eval/"))
    settings = run.run.stages[stage].opened.inputs["settings"]
    tokens = [group["answer_tokens"] for group in run.run.table["stages"][0]["groups"].values()]
    ways = [settings[key] for key in ("held_out", "answers", "chat_template", "attn_implementation")]
    return f"{header(run.run.table)} {tokens} {ways}"


def _single(run: Evidence) -> Table:
    table = run.run.table
    stages, changes = stage_rows(table), change_rows(table)
    return Table(
        "stages",
        "Stages and languages",
        tuple(header(table)),
        tuple(map(tuple, stages + changes)),
        (*_level_records("", run), *_change_records("", run)),
        NOTE,
        strong=frozenset(range(len(stages), len(stages) + len(changes))),
    )


def _levels(members: Sequence[tuple[Arm, Evidence]], arms: Sequence[Arm], more: str) -> Table:
    """Every stage once, with the runs that share it; the same stage of different arms one under the other."""
    found: dict[str, dict[str, list[str]]] = {}  # stage -> step -> cells
    sharing: dict[str, list[tuple[Arm, Evidence]]] = {}
    for arm, run in members:
        for stage, cells in zip(run.run.table["stages"], stage_rows(run.run.table), strict=True):
            step = run.run.stages[stage["stage"]].step
            found.setdefault(stage["stage"], {}).setdefault(step, cells)
            sharing.setdefault(step, []).append((arm, run))
    titles = header(members[0][1].run.table)
    return Table(
        f"stages{more}",
        "Stages and languages",
        (titles[0], "of", *titles[1:]),
        tuple(
            (cells[0], shared_by(sharing[step], arms), *cells[1:])
            for rows in found.values()
            for step, cells in rows.items()
        ),
        tuple(record for arm, run in members for record in _level_records(arm.name, run)),
        NOTE,
        words=(0, 1),
    )


def _changes(members: Sequence[tuple[Arm, Evidence]], more: str) -> Iterator[Table]:
    rows = []
    for arm, run in members:
        for cells in change_rows(run.run.table)[:2]:  # since phase 1 and since the base
            rows.append((arm.label(run), *cells))
    if rows:
        titles = header(members[0][1].run.table)
        yield Table(
            f"changes{more}",
            "What changed, with 95% intervals",
            ("arm", "change", *titles[1:]),
            tuple(rows),
            tuple(record for arm, run in members for record in _change_records(arm.name, run)),
            words=(0, 1),
        )


def _level_records(arm: str, run: Evidence) -> Iterator[dict[str, Any]]:
    for stage in run.run.table["stages"]:
        for group in run.run.table["groups"]:
            score = stage["groups"][group["name"]]
            yield {
                **_whose(arm, run),
                "stage": stage["name"],
                "precision": stage["precision"],
                "since": "",
                "group": group["name"],
                "lang": group["lang"],
                **{key: score[key] for key in ("nll", "accuracy", "rows", "answer_tokens")},
            }


def _change_records(arm: str, run: Evidence) -> Iterator[dict[str, Any]]:
    for change in run.run.table["changes"]:
        for group in run.run.table["groups"]:
            entry = change["groups"][group["name"]]
            yield {
                **_whose(arm, run),
                "stage": change["to_name"],
                "since": change["from_name"],
                "group": group["name"],
                "lang": group["lang"],
                **{key: entry[key] for key in ("value", "low", "high", "relative", "rows")},
            }


def _whose(arm: str, run: Evidence) -> dict[str, Any]:
    return {"arm": arm or run.run.name, "run": run.run.name, "seed": run.recipe.seed}
