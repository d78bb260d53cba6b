"""What the arms of an ablation came to, side by side: from their runs' tables and the steps' metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from qcft.store.ablations import Ablation, Fault
from qcft.store.results import Run


def outcome(ablation: Ablation, found: Mapping[str, Run]) -> dict[str, Any]:
    """The ablation as plain data: `arms`, each with the mean, least and most over its seeds, and every run's state.

    Changes are of the last stage's NLL since the base as it is loaded, which all arms share, in nats per answer token:
    `english` over the English groups, `others` over the rest, each group weighing the same. `steps` and `tokens` are
    the training of all phases. `found` holds the runs by name, as far as they are done.
    """
    states = ablation.states()
    arms = []
    for name in dict.fromkeys(state.arm for state in states):
        own = [state for state in states if state.arm == name]
        done = [_figures(found[state.run]) for state in own if state.state == "done"]
        keys = ("english", "others", "steps", "tokens", "seconds")
        figures = {key: _spread([value for one in done if (value := one[key]) is not None]) for key in keys}
        arms.append({"arm": name, "seeds": len(own), "done": len(done), **figures})
    return {
        "ablation": ablation.name,
        "folder": str(ablation.folder),
        "unit": "NLL since the base, nats per answer token; lower is better",
        "arms": arms,
        "runs": [asdict(state) for state in states],
    }


def in_words(error: Fault) -> str:
    """What ended an arm, on one line."""
    where = f"{error['title']}: " if error.get("title") else ""
    return f"{where}{error['message']}" + (f" ({error['hint']})" if error["hint"] else "")


def _figures(run: Run) -> dict[str, float | None]:
    last: Mapping[str, Any] = next((c["groups"] for c in run.table["changes"] if c["from"] == "eval/base"), {})
    english = {group["name"]: group["english"] for group in run.table["groups"]}
    trained = [stage.metrics for stage in run.stages.values() if "exposure" in stage.metrics]
    return {
        "english": _mean([c["value"] for name, c in last.items() if english[name]]),
        "others": _mean([c["value"] for name, c in last.items() if not english[name]]),
        "steps": sum(m["steps"] for m in trained),
        "tokens": sum(m["tokens"] for m in trained),
        "seconds": sum(stage.seconds for stage in run.stages.values()),
    }


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    return {"mean": fmean(values), "least": min(values), "most": max(values)} if values else None
