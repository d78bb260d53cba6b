"""What it cost: minutes, tokens, memory, disk, step by step; steps that runs share are counted once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qcft.report.arms import Arm, Member, members, with_of
from qcft.report.document import Section, Table
from qcft.store.results import Run, Stage
from qcft.store.upkeep import size_of


@dataclass(frozen=True)
class Cost:
    """One step's: seconds of work, tokens trained or generated (None where neither), peak memory in bytes, disk."""

    stage: Stage
    seconds: float
    tokens: int | None
    memory: str
    peak: int
    disk: int
    runs: list[Member] = field(default_factory=list)


def costs_of(run: Run) -> list[Cost]:
    """Every done step of a run."""
    found = {}
    for stage in run.stages.values():
        found[stage.step] = Cost(stage, stage.seconds, _tokens(stage), *_peak(stage.metrics), size_of(stage.folder))
    return list(found.values())


def cost_section(arms: Sequence[Arm]) -> Section | None:
    """The table of steps, those that runs share once, with their sum."""
    steps: dict[str, Cost] = {}
    for member in members(arms):
        for cost in costs_of(member[1].run):
            steps.setdefault(cost.stage.step, cost).runs.append(member)
    found = list(steps.values())
    if not found:
        return None
    peak = f"peak {' or '.join(dict.fromkeys(cost.memory for cost in found))}, GiB"
    total = in_all(found)
    rows = [
        with_of({"stage": cost.stage.name, "step": cost.stage.step, **_figures(_record(cost), peak)}, cost.runs, arms)
        for cost in found
    ]
    rows.append(dict.fromkeys(rows[0], "") | {"stage": "in all"} | _figures(total, peak))
    note = "Tokens trained or generated. Without a GPU the peak is that of the whole process so far."
    if len(members(arms)) > 1:
        apart = sum(cost.seconds * len(cost.runs) for cost in found) / 60
        note += f" Steps that runs share are done once: each run by itself would have taken {apart:.1f} minutes in all."
    records = map(_record, found)
    title = "Minutes, tokens, memory and disk"
    return Section("cost", "Cost", (Table.of("cost", title, rows, records, note, {"step"}, {len(found)}),))


def in_all(found: Sequence[Cost]) -> dict[str, float]:
    """Sums over steps; the highest peak."""
    return {
        "seconds": sum(cost.seconds for cost in found),
        "tokens": sum(cost.tokens or 0 for cost in found),
        "peak_bytes": max((cost.peak for cost in found), default=0),
        "disk_bytes": sum(cost.disk for cost in found),
    }


def _figures(cost: Mapping[str, Any], peak: str) -> dict[str, str]:
    return {
        "minutes": f"{cost['seconds'] / 60:.1f}",
        "tokens": "" if cost["tokens"] is None else f"{cost['tokens']:,}",
        peak: f"{cost['peak_bytes'] / 2**30:.2f}",
        "disk, MB": f"{cost['disk_bytes'] / 1e6:,.1f}",
    }


def _record(cost: Cost) -> dict[str, Any]:
    return {
        "stage": cost.stage.name, "step": cost.stage.step, "runs": "; ".join(run.run.name for _, run in cost.runs),
        "seconds": cost.seconds,
        "tokens": cost.tokens, "memory": cost.memory, "peak_bytes": cost.peak, "disk_bytes": cost.disk,
    }  # fmt: skip


def _tokens(stage: Stage) -> int | None:
    """The tokens a step trained on or answered with."""
    if "exposure" in stage.metrics:
        return int(stage.metrics["tokens"])
    if not stage.step.startswith("replay-"):
        return None
    made = [part["generation"]["tokens"] for part in stage.metrics["parts"] if part.get("generation")]
    return sum(made) if made else None


def _peak(metrics: Mapping[str, Any]) -> tuple[str, int]:
    for key, value in metrics.items():
        if key.startswith("peak_"):
            return key.removeprefix("peak_").removesuffix("_bytes"), int(value)
    return "memory", 0
