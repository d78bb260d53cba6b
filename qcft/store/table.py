"""The table of a run: stages by held-out groups, and stages by the tasks they were evaluated on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NotRequired, TypedDict

from qcft.store.metrics import (
    AlpacaMetrics,
    AnswerLengths,
    FidelityMetrics,
    GroupScore,
    IntervalOf,
    KeptMetrics,
    Paired,
)


class GroupOf(TypedDict):
    """A group of held-out rows; `trained`: whether rows like its own are trained on, by this run or another arm."""

    name: str
    phase: str
    lang: str
    english: bool
    trained: bool


class Named(TypedDict):
    """A measured stage: its key, the name that people read, and the precision it was measured in."""

    stage: str
    name: str
    precision: str


class StageScores(Named):
    """A stage's scores by group, and its English answers."""

    groups: dict[str, GroupScore]
    answers: AnswerLengths | None


class GroupChange(Paired):
    """A change of NLL, and relative to where it starts."""

    relative: float


# Which stages are compared.
Between = TypedDict("Between", {"from": str, "from_name": str, "to": str, "to_name": str})


class StageChange(Between):
    """What changed from one stage to another, group by group."""

    groups: dict[str, GroupChange]


class Transfer(TypedDict):
    """Backward transfer and forgetting over the phases."""

    backward_transfer: float
    forgetting: float


class TaskOf(TypedDict):
    """A task of a table, and how it was run; `side` and `average_of`: the average it is part of."""

    task: str
    lang: str
    metric: str
    items: int
    shots: int
    higher_is_better: bool
    limit: int | None
    data: str
    prompts: str
    max_new_tokens: int | None
    side: str | None
    average_of: str


Side = Literal["EA", "MA", "overall"]


class Averages(TypedDict):
    """Means of a stage's scores: English tasks, tasks in other languages, the mean of the two."""

    EA: float | None
    MA: float | None
    overall: float | None


class TaskScores(Named, Averages):
    """A stage's scores by task."""

    scores: dict[str, float]
    all_scores: dict[str, dict[str, float]]


class ScoreChange(IntervalOf):
    """A change of mean scores, with its paired 95% interval over items; `clear` where that excludes zero."""

    items: int
    clear: bool


class TaskChange(Between):
    """What changed from one stage to another, task by task and on average."""

    tasks: dict[str, ScoreChange]
    EA: NotRequired[ScoreChange]
    MA: NotRequired[ScoreChange]
    overall: NotRequired[ScoreChange]


class TasksTable(TypedDict):
    """Stages by tasks that were evaluated with the same `settings`."""

    settings: Mapping[str, object]
    tasks: list[TaskOf]
    stages: list[TaskScores]
    changes: list[TaskChange]
    continual: Transfer | None


class FidelityOf(Named, FidelityMetrics):
    """In which language a stage answers, and how it was `asked`."""

    asked: Mapping[str, object]


class AlpacaOf(Named, AlpacaMetrics):
    """A stage's answers to AlpacaEval's prompts, in `file`."""

    file: str


class Abilities(TypedDict):
    """What the stages of a run were evaluated on."""

    tables: list[TasksTable]
    fidelity: list[FidelityOf]
    alpaca_eval: list[AlpacaOf]


class StagesTable(TypedDict):
    """Stages by held-out groups; `kept`: what each merge kept."""

    run: str
    model: str
    unit: str
    groups: list[GroupOf]
    stages: list[StageScores]
    changes: list[StageChange]
    kept: dict[str, KeptMetrics]


class RunTable(StagesTable):
    """All tables of a run."""

    continual: Transfer | None
    abilities: Abilities
