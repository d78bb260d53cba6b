"""What it cost: minutes, tokens, memory, disk, step by step; steps that runs share are counted once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qcft.report.arms import Arm, Member, members, with_of
from qcft.report.document import Section, Table
from qcft.store.results import Run, Stage
from qcft.store.upkeep import size_of


def costs_of(run: Run) -> list[dict[str, Any]]:
    """Every done step of a run: seconds of work, tokens trained or generated (None where neither), memory, disk."""
    found = {}
    for stage in run.stages.values():
        memory, peak = _peak(stage.metrics)
        found[stage.step] = {
            "stage": stage.name, "step": stage.step, "runs": "", "seconds": stage.seconds, "tokens": _tokens(stage),
            "memory": memory, "peak_bytes": peak, "disk_bytes": size_of(stage.folder),
        }  # fmt: skip
    return list(found.values())


def cost_section(arms: Sequence[Arm]) -> Section | None:
    """The table of steps, those that runs share once, with their sum."""
    found: dict[str, dict[str, Any]] = {}
    sharing: dict[str, list[Member]] = {}
    for member in members(arms):
        for cost in costs_of(member[1].run):
            found.setdefault(cost["step"], cost)
            sharing.setdefault(cost["step"], []).append(member)
    if not found:
        return None
    costs = list(found.values())
    peak = f"peak {' or '.join(dict.fromkeys(cost['memory'] for cost in costs))}, GiB"
    rows = []
    for cost in costs:
        runs = sharing[cost["step"]]
        rows.append(with_of({"stage": cost["stage"], "step": cost["step"], **_figures(cost, peak)}, runs, arms))
        cost["runs"] = "; ".join(run.run.name for _, run in runs)
    rows.append(dict.fromkeys(rows[0], "") | {"stage": "in all"} | _figures(in_all(costs), peak))
    note = "Tokens trained or generated. Without a GPU the peak is that of the whole process so far."
    if len(members(arms)) > 1:
        apart = sum(cost["seconds"] * len(sharing[cost["step"]]) for cost in costs) / 60
        note += f" Steps that runs share are done once: each run by itself would have taken {apart:.1f} minutes in all."
    title = "Minutes, tokens, memory and disk"
    return Section("cost", "Cost", (Table.of("cost", title, rows, costs, note, {"step"}, {len(costs)}),))


def in_all(costs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sums over steps; the highest peak."""
    return {
        "seconds": sum(cost["seconds"] for cost in costs),
        "tokens": sum(cost["tokens"] or 0 for cost in costs),
        "peak_bytes": max((cost["peak_bytes"] for cost in costs), default=0),
        "disk_bytes": sum(cost["disk_bytes"] for cost in costs),
    }


def _figures(cost: Mapping[str, Any], peak: str) -> dict[str, str]:
    return {
        "minutes": f"{cost['seconds'] / 60:.1f}",
        "tokens": "" if cost["tokens"] is None else f"{cost['tokens']:,}",
        peak: f"{cost['peak_bytes'] / 2**30:.2f}",
        "disk, MB": f"{cost['disk_bytes'] / 1e6:,.1f}",
    }


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
