"""The cost in minutes, tokens, memory and disk, step by step; steps that runs share are counted once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict, cast

from qcft.report.arms import ArmRuns, Member, members, with_of
from qcft.report.document import Section, Table
from qcft.store.metrics import ReplayMetrics
from qcft.store.results import Run, Stage
from qcft.store.upkeep import size_of


@dataclass(frozen=True)
class Cost:
    """The cost of a step: seconds of work, tokens trained or generated (None if neither), peak of this kind of
    `memory`, disk. `runs`: the runs that share it, if there are several."""

    stage: str
    step: str
    runs: str
    seconds: float
    tokens: int | None
    memory: str
    peak_bytes: int
    disk_bytes: int


class RunCost(TypedDict):
    """The cost of a run's done steps: their number, seconds, tokens, the highest peak and the disk in bytes."""

    steps: int
    seconds: float
    tokens: int | None
    peak_bytes: int
    disk_bytes: int


def costs_of(run: Run) -> list[Cost]:
    """The cost of every done step of a run."""
    found = {}
    for stage in run.stages.values():
        memory, peak = _peak(stage.metrics)
        disk = size_of(stage.folder)
        found[stage.step] = Cost(stage.name, stage.step, "", stage.seconds, _tokens(stage), memory, peak, disk)
    return list(found.values())


def cost_section(arms: Sequence[ArmRuns]) -> Section | None:
    """The table of steps, shared ones once, with their sum."""
    found: dict[str, Cost] = {}
    sharing: dict[str, list[Member]] = {}
    for member in members(arms):
        for cost in costs_of(member[1].run):
            found.setdefault(cost.step, cost)
            sharing.setdefault(cost.step, []).append(member)
    if not found:
        return None
    costs = [replace(cost, runs="; ".join(run.run.name for _, run in sharing[cost.step])) for cost in found.values()]
    peak = f"peak {' or '.join(dict.fromkeys(cost.memory for cost in costs))}, GiB"
    rows = [
        with_of({"stage": cost.stage, "step": cost.step, **_figures(cost, peak)}, sharing[cost.step], arms)
        for cost in costs
    ]
    rows.append(dict.fromkeys(rows[0], "") | {"stage": "in all"} | _figures(in_all(costs), peak))
    note = "Tokens: trained on or generated. Without a GPU the peak is that of the whole process so far."
    if len(members(arms)) > 1:
        apart = sum(cost.seconds * len(sharing[cost.step]) for cost in costs) / 60
        note += f" Shared steps ran once: without sharing, all runs together would have taken {apart:.1f} minutes."
    title = "Minutes, tokens, memory and disk"
    return Section("cost", "Cost", (Table.of("cost", title, rows, map(asdict, costs), note, {"step"}, {len(costs)}),))


def in_all(costs: Sequence[Cost]) -> Cost:
    """The cost of all steps: sums, and the highest peak."""
    seconds, tokens = sum(cost.seconds for cost in costs), sum(cost.tokens or 0 for cost in costs)
    peak = max((cost.peak_bytes for cost in costs), default=0)
    return Cost("in all", "", "", seconds, tokens, "", peak, sum(cost.disk_bytes for cost in costs))


def _figures(cost: Cost, peak: str) -> dict[str, str]:
    return {
        "minutes": f"{cost.seconds / 60:.1f}",
        "tokens": "" if cost.tokens is None else f"{cost.tokens:,}",
        peak: f"{cost.peak_bytes / 2**30:.2f}",
        "disk, MB": f"{cost.disk_bytes / 1e6:,.1f}",
    }


def _tokens(stage: Stage) -> int | None:
    """The tokens a step trained on or answered with."""
    if stage.training:
        return stage.training["tokens"]
    if not stage.step.startswith("replay-"):
        return None
    parts = cast("ReplayMetrics", stage.metrics)["parts"]
    made = [generation["tokens"] for part in parts if (generation := part.get("generation"))]
    return sum(made) if made else None


def _peak(metrics: Mapping[str, Any]) -> tuple[str, int]:
    for key, value in metrics.items():
        if key.startswith("peak_"):
            return key.removeprefix("peak_").removesuffix("_bytes"), int(value)
    return "memory", 0
