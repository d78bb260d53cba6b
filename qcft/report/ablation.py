"""The results of an ablation's arms, side by side: from their runs' tables and the steps' metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from statistics import fmean
from typing import Any, TypedDict, cast

from qcft.report.standing import mean_of
from qcft.store.ablations import AblationIndex, Fault, State
from qcft.store.metrics import TrainMetrics
from qcft.store.results import Run
from qcft.store.table import RunTable


class Spread(TypedDict):
    """A figure over an arm's seeds."""

    mean: float
    least: float
    most: float


class ArmFigures(TypedDict):
    """An arm: the number of its seeds, how many are done, and figures over the done ones (None where none has one);
    epochs are means."""

    arm: str
    seeds: int
    done: int
    english: Spread | None
    english_untrained: Spread | None
    others: Spread | None
    steps: Spread | None
    tokens: Spread | None
    answer_tokens: Spread | None
    epochs: list[float]
    seconds: Spread | None


class RunState(TypedDict):
    """The state of one arm with one seed (store.ablations.ArmState)."""

    arm: str
    seed: int
    run: str
    set: Mapping[str, Any]
    mixed: bool
    state: State
    done: int
    steps: int
    error: Fault | None


class Outcome(TypedDict):
    """The results of an ablation."""

    ablation: str
    folder: str
    unit: str
    arms: list[ArmFigures]
    runs: list[RunState]


def outcome(ablation: AblationIndex, found: Mapping[str, Run]) -> Outcome:
    """The ablation as plain data: `arms`, each with the mean, least and most over its seeds, and every run's state.

    Changes are those of the last stage's NLL relative to the base as it is loaded, which all arms share, in nats per
    answer token: `english` over all rows of the English groups, `others` over all other rows, with equal weight for
    every token. Where English is measured both on rows like those trained on and on others, `english` is over the
    former, `english_untrained` over the latter. `steps`, `tokens` and `answer_tokens` are sums over all phases,
    `epochs` has each phase. `found` has the runs by name, as far as they are done.
    """
    states = ablation.states()
    arms: list[ArmFigures] = []
    for name in dict.fromkeys(state.arm for state in states):
        own = [state for state in states if state.arm == name]
        done = [_figures(found[state.run]) for state in own if state.state == "done"]
        lengths = [one.length for one in done]
        arms.append(
            {
                "arm": name,
                "seeds": len(own),
                "done": len(done),
                "english": _spread([one.english for one in done]),
                "english_untrained": _spread([one.english_untrained for one in done]),
                "others": _spread([one.others for one in done]),
                "steps": _spread([one["steps"] for one in lengths]),
                "tokens": _spread([one["tokens"] for one in lengths]),
                "answer_tokens": _spread([one["answer_tokens"] for one in lengths]),
                "epochs": [fmean(each) for each in zip_longest(*(one["epochs"] for one in lengths), fillvalue=0.0)],
                "seconds": _spread([one.seconds for one in done]),
            }
        )
    return {
        "ablation": ablation.name,
        "folder": str(ablation.folder),
        "unit": "NLL since the base, nats per answer token; lower is better",
        "arms": arms,
        "runs": [cast("RunState", asdict(state)) for state in states],
    }


def in_words(error: Fault) -> str:
    """The error that ended an arm, on one line."""
    where = f"{error['title']}: " if error.get("title") else ""
    return f"{where}{error['message']}" + (f" ({error['hint']})" if error["hint"] else "")


class TrainedLength(TypedDict):
    """How long trainings were: the sums of optimizer steps, tokens and tokens with loss; the epochs of each."""

    steps: int
    tokens: int
    answer_tokens: int
    epochs: list[float]


def trained_length(trainings: Sequence[TrainMetrics]) -> TrainedLength:
    """How long trainings were, by the rows that they really trained on."""
    return {
        "steps": sum(m["steps"] for m in trainings),
        "tokens": sum(m["tokens"] for m in trainings),
        "answer_tokens": sum(fed["answer_tokens"] for m in trainings for fed in m["exposure"]),
        "epochs": [sum(fed["rows"] for fed in m["exposure"]) / sum(of["rows"] for of in m["mix"]) for m in trainings],
    }


def epochs_in_words(epochs: Sequence[float]) -> str:
    """The epochs of each phase, as in `1 + 1`."""
    return " + ".join(f"{one:.3g}" for one in epochs)


def count_against(count: float, first: float, is_first: bool) -> str:
    """A count; for other arms than the first with the difference from the first arm's in brackets."""
    return f"{count:,.0f}" + ("" if is_first or not first else f" ({count / first - 1:+.0%})")


@dataclass(frozen=True)
class _Figures:
    english: float | None
    english_untrained: float | None
    others: float | None
    length: TrainedLength
    seconds: float


def _figures(run: Run) -> _Figures:
    groups = run.table["groups"]
    english = [g["name"] for g in groups if g["english"] and g["trained"]]
    untrained = [g["name"] for g in groups if g["english"] and not g["trained"]]
    if not english:
        english, untrained = untrained, []
    return _Figures(
        english=_since_base(run.table, english),
        english_untrained=_since_base(run.table, untrained),
        others=_since_base(run.table, [g["name"] for g in groups if not g["english"]]),
        length=trained_length(run.trainings()),
        seconds=sum(stage.seconds for stage in run.stages.values()),
    )


def _since_base(table: RunTable, groups: Sequence[str]) -> float | None:
    """The change of mean NLL per answer token from the base to the last stage, over all rows of these groups."""
    change = next((c for c in table["changes"] if c["from"] == "eval/base"), None)
    if change is None:
        return None
    stages = {stage["stage"]: stage["groups"] for stage in table["stages"]}
    before, after = (mean_of(stages[end][name] for name in groups) for end in (change["from"], change["to"]))
    return None if before is None or after is None else after - before


def _spread(found: Sequence[float | None]) -> Spread | None:
    values = [value for value in found if value is not None]
    return {"mean": fmean(values), "least": min(values), "most": max(values)} if values else None
