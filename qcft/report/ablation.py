"""What the arms of an ablation came to, side by side: from their runs' tables and the steps' metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, TypedDict, cast

from qcft.store.ablations import Ablation, Fault, State
from qcft.store.results import Run


class Spread(TypedDict):
    """A figure over an arm's seeds."""

    mean: float
    least: float
    most: float


class ArmFigures(TypedDict):
    """An arm: its seeds, how many are done, and figures over these (None where none has one)."""

    arm: str
    seeds: int
    done: int
    english: Spread | None
    others: Spread | None
    steps: Spread | None
    tokens: Spread | None
    seconds: Spread | None


class RunState(TypedDict):
    """One arm with one seed as it stands (store.ablations.ArmState)."""

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
    """What an ablation came to."""

    ablation: str
    folder: str
    unit: str
    arms: list[ArmFigures]
    runs: list[RunState]


def outcome(ablation: Ablation, found: Mapping[str, Run]) -> Outcome:
    """The ablation as plain data: `arms`, each with the mean, least and most over its seeds, and every run's state.

    Changes are of the last stage's NLL since the base as it is loaded, which all arms share, in nats per answer token:
    `english` over the English groups, `others` over the rest, each group weighing the same. `steps` and `tokens` are
    the training of all phases. `found` holds the runs by name, as far as they are done.
    """
    states = ablation.states()
    arms: list[ArmFigures] = []
    for name in dict.fromkeys(state.arm for state in states):
        own = [state for state in states if state.arm == name]
        done = [_figures(found[state.run]) for state in own if state.state == "done"]
        arms.append(
            {
                "arm": name,
                "seeds": len(own),
                "done": len(done),
                "english": _spread([one.english for one in done]),
                "others": _spread([one.others for one in done]),
                "steps": _spread([one.steps for one in done]),
                "tokens": _spread([one.tokens for one in done]),
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
    """What ended an arm, on one line."""
    where = f"{error['title']}: " if error.get("title") else ""
    return f"{where}{error['message']}" + (f" ({error['hint']})" if error["hint"] else "")


@dataclass(frozen=True)
class _Figures:
    english: float | None
    others: float | None
    steps: int
    tokens: int
    seconds: float


def _figures(run: Run) -> _Figures:
    last = next((c["groups"] for c in run.table["changes"] if c["from"] == "eval/base"), {})
    english = {group["name"]: group["english"] for group in run.table["groups"]}
    return _Figures(
        english=_mean([c["value"] for name, c in last.items() if english[name]]),
        others=_mean([c["value"] for name, c in last.items() if not english[name]]),
        steps=sum(m["steps"] for m in run.trainings()),
        tokens=sum(m["tokens"] for m in run.trainings()),
        seconds=sum(stage.seconds for stage in run.stages.values()),
    )


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def _spread(found: Sequence[float | None]) -> Spread | None:
    values = [value for value in found if value is not None]
    return {"mean": fmean(values), "least": min(values), "most": max(values)} if values else None
