"""The matrix of stages and tasks, averages and changes: from the artefacts of the evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, TypedDict, cast

from qcft.files import read_json_lines
from qcft.measure.catalog import ENGLISH, family_of
from qcft.measure.clusters import item_clusters
from qcft.measure.continual import Items, backward_transfer, forgetting, paired_changes
from qcft.recipe import ALPACA_EVAL, FIDELITY, Recipe
from qcft.recipe.stages import ABILITIES, BASE, PROBES, merged_stage
from qcft.store.metrics import AlpacaMetrics, FidelityMetrics, GroupScore, TaskMetrics
from qcft.store.opened import DoneStep
from qcft.store.table import (
    Abilities,
    AlpacaOf,
    Averages,
    FidelityOf,
    Named,
    ScoreChange,
    Side,
    StagesTable,
    TaskChange,
    TaskOf,
    TaskScores,
    TasksTable,
    Transfer,
)

SIDES: tuple[Literal["EA"], Literal["MA"]] = ("EA", "MA")
SHARED = ("lm_eval", "chat_template", "attn_implementation", "batch")  # settings of all tasks of a table
ASKED = ("data", "prompts", "max_new_tokens", "chat_template", "attn_implementation")  # for the language of answers


class TaskInputs(TypedDict):
    """What a task was measured with: its own settings, and its data's digest."""

    limit: int | None
    shots: int | None
    max_new_tokens: int | None
    data: str


@dataclass(frozen=True)
class MeasuredTask:
    """A `suite` step of a stage, with the settings it was measured with: SHARED, the task's own, and ASKED."""

    stage: str
    name: str
    precision: str
    step: DoneStep
    settings: Mapping[str, object]
    own: TaskInputs
    asked: Mapping[str, object]

    def named(self) -> Named:
        """The stage."""
        return {"stage": self.stage, "name": self.name, "precision": self.precision}


@dataclass(frozen=True)
class Cell(MeasuredTask):
    """The result of one stage on one task of lm-eval."""

    found: TaskMetrics

    @property
    def side(self) -> str | None:
        """The average that includes the score, EA or MA."""
        if not (self.found["paired"] and self.found["higher_is_better"]):
            return None
        return "EA" if self.found["lang"] == ENGLISH else "MA"

    @property
    def average_of(self) -> str:
        """The task family whose languages are averaged first."""
        return self.found["task"] if self.found["lang"] == ENGLISH else family_of(self.found["task"])


Stages = Mapping[str, Mapping[str, Cell]]  # by stage and task


def abilities_table(recipe: Recipe, steps: Mapping[str, DoneStep], names: Mapping[str, tuple[str, str]]) -> Abilities:
    """Stages x tasks, as plain data. `steps` maps stages (`abilities/phase2/hellaswag`) to their done steps;
    `names` gives the name and precision of each measured stage (`phase2`).

    Results with other settings, another version of lm-eval, other data or other prompts are in separate `tables`;
    the language of answers can be compared where `asked` is equal.
    EA and MA are the unweighted means of a stage's scores on English tasks and on tasks in other languages, the
    languages of one task averaged first; overall is the mean of the two. They include only scores that are means over
    items and better when higher; a stage that lacks one of the table's tasks has no average.
    """
    every = [_measured(stage, step, names) for stage, step in steps.items() if stage.startswith(ABILITIES)]
    return {
        "tables": [_table(recipe, table) for table in _apart([one for one in every if isinstance(one, Cell)])],
        "fidelity": [_fidelity(one) for one in every if one.step.metrics["task"] == FIDELITY],
        "alpaca_eval": [_alpaca(one) for one in every if one.step.metrics["task"] == ALPACA_EVAL],
    }


def continual_nll(recipe: Recipe, table: StagesTable) -> Transfer | None:
    """Backward transfer and forgetting over the phases' own held-out rows, in nats per answer token; performance is
    the negative mean NLL. With a single phase, the unmodified model counts as the first phase, and held-out English
    as its rows. None where fewer than two phases with rows of their own are measured."""
    stages = {stage["stage"].removeprefix(PROBES): stage["groups"] for stage in table["stages"]}
    owns = {phase.name: [g["name"] for g in table["groups"] if g["phase"] == phase.name] for phase in recipe.phases}
    if len(owns) == 1 and not any(g["english"] for g in table["groups"] if g["phase"] in owns):
        owns = {BASE: [g["name"] for g in table["groups"] if g["english"]], **owns}
    phases = [name for name, own in owns.items() if own and name in stages]
    if len(phases) < 2:
        return None
    matrix = [[-_mean_nll([stages[after][g] for g in owns[of]]) for of in phases] for after in phases]
    return {"backward_transfer": backward_transfer(matrix), "forgetting": forgetting(matrix)}


def _mean_nll(groups: Sequence[GroupScore]) -> float:
    return sum(g["nll"] * g["answer_tokens"] for g in groups) / sum(g["answer_tokens"] for g in groups)


def _apart(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells by table: each has one version of lm-eval, and one set of prompts for each task; the largest is first."""
    ways: dict[str, dict[str, dict[str, list[Cell]]]] = {}
    for cell in cells:
        way = f"{cell.own} {cell.found['prompts']}"
        ways.setdefault(str(cell.settings), {}).setdefault(cell.found["task"], {}).setdefault(way, []).append(cell)
    tables: list[list[Cell]] = []
    for tasks in ways.values():
        ranked = [sorted(found.values(), key=len, reverse=True) for found in tasks.values()]
        for number in range(max(map(len, ranked))):
            tables.append([cell for found in ranked if number < len(found) for cell in found[number]])
    return sorted(tables, key=len, reverse=True)


def _measured(stage: str, step: DoneStep, names: Mapping[str, tuple[str, str]]) -> MeasuredTask:
    inputs = step.inputs["settings"]
    word = stage.split("/")[1]
    name, precision = names.get(word, (word, "16 bit" if inputs["quantize"] == "none" else "NF4"))
    settings, asked = ({key: inputs.get(key) for key in keys} for keys in (SHARED, ASKED))
    own = cast("TaskInputs", {key: inputs.get(key) for key in TaskInputs.__annotations__})
    if "score" in step.metrics:
        return Cell(word, name, precision, step, settings, own, asked, cast("TaskMetrics", step.metrics))
    return MeasuredTask(word, name, precision, step, settings, own, asked)


def _fidelity(one: MeasuredTask) -> FidelityOf:
    found = cast("FidelityMetrics", one.step.metrics)
    return {**one.named(), "task": found["task"], "languages": found["languages"], "asked": one.asked}


def _alpaca(one: MeasuredTask) -> AlpacaOf:
    found = cast("AlpacaMetrics", one.step.metrics)
    return {
        **one.named(),
        "task": found["task"],
        "rows": found["rows"],
        "mean_tokens": found["mean_tokens"],
        "unfinished": found["unfinished"],
        "max_new_tokens": found["max_new_tokens"],
        "file": str(one.step.folder / "model_outputs.json"),
    }


def _table(recipe: Recipe, cells: Sequence[Cell]) -> TasksTable:
    by_stage: dict[str, dict[str, Cell]] = {}
    tasks: dict[str, Cell] = {}
    for cell in cells:
        by_stage.setdefault(cell.stage, {})[cell.found["task"]] = cell
        tasks.setdefault(cell.found["task"], cell)
    stages: list[TaskScores] = []
    for cells_of in by_stage.values():
        first, scores = next(iter(cells_of.values())), {name: cell.found["score"] for name, cell in cells_of.items()}
        stages.append(
            {
                **first.named(),
                "scores": scores,
                "all_scores": {name: cell.found["scores"] for name, cell in cells_of.items()},
                **_averages(tasks, scores),
            }
        )
    return {
        "settings": cells[0].settings,
        "tasks": [_task(cell) for cell in tasks.values()],
        "stages": stages,
        "changes": [_change(by_stage[a], by_stage[b], tasks) for a, b in _pairs(recipe, by_stage)],
        "continual": _continual(recipe, by_stage, tasks),
    }


def _task(cell: Cell) -> TaskOf:
    found = cell.found
    return {
        "task": found["task"],
        "lang": found["lang"],
        "metric": found["metric"],
        "items": found["items"],
        "shots": found["shots"],
        "higher_is_better": found["higher_is_better"],
        "limit": cell.own["limit"],
        "data": cell.own["data"],
        "prompts": found["prompts"],
        "max_new_tokens": cell.own["max_new_tokens"] if found["generates"] else None,
        "side": cell.side,
        "average_of": cell.average_of,
    }


def _averages(tasks: Mapping[str, Cell], scores: Mapping[str, float]) -> Averages:
    found: dict[str, float | None] = {}
    for side in SIDES:
        families = _families(tasks, side)
        whole = families and all(task in scores for family in families for task in family)
        means = [sum(scores[task] for task in family) / len(family) for family in families] if whole else []
        found[side] = sum(means) / len(means) if means else None
    both = [value for value in found.values() if value is not None]
    return {"EA": found["EA"], "MA": found["MA"], "overall": sum(both) / 2 if len(both) == 2 else None}


def _families(tasks: Mapping[str, Cell], side: str) -> list[list[str]]:
    """The tasks of one side, the languages of each together."""
    families: dict[str, list[str]] = {}
    for name, task in tasks.items():
        if task.side == side:
            families.setdefault(task.average_of, []).append(name)
    return list(families.values())


def _of_phases(recipe: Recipe, stages: Stages) -> list[str]:
    """The stage that represents each phase: as trained, else as merged; phases without such a stage are skipped."""
    found = []
    for phase in recipe.phases:
        merged = merged_stage(phase.name, recipe.phases[0].name)
        found += [name for name in (phase.name, merged) if name in stages][:1]
    return found


def _pairs(recipe: Recipe, stages: Stages) -> list[tuple[str, str]]:
    """The pairs of stages to compare: the last phase with the first and with the base, each phase with the one before
    it; both of a pair in the same precision."""
    phases = _of_phases(recipe, stages)
    if not phases:
        return []
    starts = [phases[0], BASE] if len(recipe.phases) > 1 else [BASE]
    pairs = [(start, phases[-1]) for start in starts] + list(pairwise(phases))
    return [
        (a, b)
        for a, b in dict.fromkeys(pairs)
        if a in stages and b in stages and a != b and _precision(stages[a]) == _precision(stages[b])
    ]


def _precision(cells: Mapping[str, Cell]) -> str:
    return next(iter(cells.values())).precision


def _change(before: Mapping[str, Cell], after: Mapping[str, Cell], tasks: Mapping[str, Cell]) -> TaskChange:
    start, end = next(iter(before.values())), next(iter(after.values()))
    names = [name for name in tasks if all(name in cells and cells[name].found["paired"] for cells in (before, after))]
    sides: dict[Side, dict[str, float]] = {}
    for side in SIDES:
        families = _families(tasks, side)
        if families and all(task in names for family in families for task in family):
            sides[side] = {task: 1 / (len(families) * len(family)) for family in families for task in family}
    if len(sides) == len(SIDES):
        sides["overall"] = {task: weight / 2 for weights in sides.values() for task, weight in weights.items()}
    made: list[ScoreChange] = []
    if names:
        items = {name: _items(before[name]) for name in names}
        clusters = item_clusters({name: (family_of(name), items[name]) for name in names})
        pairs = [
            Items(_scores(before[name], items[name]), _scores(after[name], _items(after[name])), clusters[name])
            for name in names
        ]
        weights = [[own.get(name, 0.0) for name in names] for own in sides.values()]
        made = [cast("ScoreChange", asdict(one) | {"clear": one.is_clear}) for one in paired_changes(pairs, weights)]
    change: TaskChange = {
        "from": start.stage,
        "from_name": start.name,
        "to": end.stage,
        "to_name": end.name,
        "tasks": dict(zip(names, made, strict=False)),
    }
    for average, found in zip(sides, made[len(names) :], strict=True):
        change[average] = found
    return change


def _items(cell: Cell) -> list[dict[str, Any]]:
    return read_json_lines(cell.step.file("items.jsonl"))


def _scores(cell: Cell, items: Sequence[Mapping[str, Any]]) -> list[float]:
    """The main score, item by item."""
    key = cell.found["metric"].partition(",")[0]
    return [float(item["scores"][key]) for item in items]


def _continual(recipe: Recipe, stages: Stages, tasks: Mapping[str, Cell]) -> Transfer | None:
    """Backward transfer and forgetting: a language belongs to the first phase that has data in it. With a single
    phase, the unmodified model counts as the first phase."""
    names, chosen = [phase.name for phase in recipe.phases], _of_phases(recipe, stages)
    if len(names) == 1:
        names, chosen = [BASE, *names], [*([BASE] if BASE in stages else []), *chosen]
    taught: dict[str, str] = {}
    for phase in recipe.phases:
        for source in phase.sources():
            taught.setdefault(str(source.lang).split("-")[0], phase.name)
    taught.setdefault(ENGLISH, names[0])
    of = [[n for n, t in tasks.items() if t.side and taught.get(t.found["lang"]) == name] for name in names]
    whole = len(chosen) == len(names) and all(of)
    if not whole or any(name not in stages[stage] for stage in chosen for names in of for name in names):
        return None
    matrix = [[sum(stages[s][name].found["score"] for name in names) / len(names) for names in of] for s in chosen]
    return {"backward_transfer": backward_transfer(matrix), "forgetting": forgetting(matrix)}
