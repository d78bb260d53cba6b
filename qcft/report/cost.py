"""What it cost: minutes, tokens, memory, disk, step by step; steps that runs share are counted once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qcft.report.arms import Arm, Evidence, shared_by
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
    runs: list[tuple[Arm, Evidence]] = field(default_factory=list)


def costs_of(run: Run) -> list[Cost]:
    """Every done step of a run."""
    found = {}
    for stage in run.stages.values():
        memory, peak = _peak(stage.metrics)
        tokens, disk = _tokens(stage), size_of(stage.folder)
        found[stage.step] = Cost(stage, stage.seconds, tokens, memory, peak, disk)
    return list(found.values())


def shared_costs(arms: Sequence[Arm]) -> list[Cost]:
    """Every done step of several runs once."""
    found: dict[str, Cost] = {}
    for arm in arms:
        for evidence in arm.runs:
            for cost in costs_of(evidence.run):
                found.setdefault(cost.stage.step, cost).runs.append((arm, evidence))
    return list(found.values())


def cost_section(arms: Sequence[Arm]) -> Section | None:
    """The table of steps, with their sum."""
    found = shared_costs(arms)
    if not found:
        return None
    runs = sum(len(arm.runs) for arm in arms)
    rows = [_row(cost, arms) for cost in found]
    total = in_all(found)
    cells = ["in all", "", f"{total['seconds'] / 60:.1f}", f"{total['tokens']:,}"]
    cells += [f"{total['peak_bytes'] / 2**30:.2f}", f"{total['disk_bytes'] / 1e6:,.1f}"]
    head = ["stage", "step", "minutes", "tokens", f"peak {_memory(found)}, GiB", "disk, MB"]
    note = "Tokens trained or generated. Without a GPU the peak is that of the whole process so far."
    if runs > 1:
        cells.insert(1, "")
        head.insert(1, "of")
        apart = sum(cost.seconds * len(cost.runs) for cost in found) / 60
        note += f" Steps that runs share are done once: each run by itself would have taken {apart:.1f} minutes in all."
    table = Table(
        "cost",
        "Minutes, tokens, memory and disk",
        tuple(head),
        (*rows, tuple(cells)),
        tuple(_record(cost) for cost in found),
        note,
        words=(0, 1, 2) if runs > 1 else (0, 1),
        strong=frozenset({len(rows)}),
    )
    return Section("cost", "Cost", (table,))


def in_all(found: Sequence[Cost]) -> dict[str, float]:
    """Sums over steps; the highest peak."""
    return {
        "seconds": sum(cost.seconds for cost in found),
        "tokens": sum(cost.tokens or 0 for cost in found),
        "peak_bytes": max((cost.peak for cost in found), default=0),
        "disk_bytes": sum(cost.disk for cost in found),
    }


def _row(cost: Cost, arms: Sequence[Arm]) -> tuple[str, ...]:
    cells = [
        cost.stage.name,
        cost.stage.step,
        f"{cost.seconds / 60:.1f}",
        "" if cost.tokens is None else f"{cost.tokens:,}",
        f"{cost.peak / 2**30:.2f}",
        f"{cost.disk / 1e6:,.1f}",
    ]
    if sum(len(arm.runs) for arm in arms) > 1:
        cells.insert(1, shared_by(cost.runs, arms))
    return tuple(cells)


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


def _memory(found: Sequence[Cost]) -> str:
    return " or ".join(dict.fromkeys(cost.memory for cost in found))
