"""Everything needed to repeat it: commands, recipe, versions, digests."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from qcft.report.arms import Arm, Evidence, flow, shared_by
from qcft.report.document import Block, Listing, Section, Table


def arms_section(arms: Sequence[Arm]) -> Section | None:
    """What sets the arms apart; None where there is but one."""
    if len(arms) == 1:
        return None
    rows, records = [], []
    for arm in arms:
        sets = "\n".join(_assignments(arm.sets)) or "nothing: the first recipe"
        ended = sum(run.last is not None for run in arm.runs)
        seeds = ", ".join(str(run.recipe.seed) for run in arm.runs)
        rows.append((arm.name, seeds, f"{ended} of {len(arm.runs)}", sets))
        records += [
            {"arm": arm.name, "run": run.run.name, "seed": run.recipe.seed, "set": flow(dict(arm.sets))}
            for run in arm.runs
        ]
    table = Table(
        "arms",
        f"What sets the arms apart from {arms[0].name}",
        ("arm", "seeds", "runs measured to their end", "other recipe keys"),
        tuple(rows),
        tuple(records),
        words=(0, 1, 3),
    )
    return Section("arms", "The arms", (table,))


def repeat_section(arms: Sequence[Arm]) -> Section:
    """The commands, the recipe they read, versions and digests."""
    first = arms[0].runs[0]
    recipe = yaml.safe_dump(first.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    blocks: list[Block] = [
        Listing("The recipe (recipe.yaml)", recipe, "yaml"),
        Listing("The commands", commands(arms), "sh"),
    ]
    if any(run.run.stages for arm in arms for run in arm.runs):
        blocks += [_versions(arms), _digests(arms)]
    return Section("repeat", "To repeat it", tuple(blocks))


def commands(arms: Sequence[Arm]) -> str:
    """A line for each run, given the first run's recipe as recipe.yaml."""
    first, lines = arms[0].runs[0].recipe, []
    for arm in arms:
        for run in arm.runs:
            seed = {} if run.recipe.seed == first.seed else {"seed": run.recipe.seed}
            name = ["--as", run.run.name] if run.run.name != first.name else []
            flags = [word for text in _assignments({**arm.sets, **seed}) for word in ("--set", text)]
            lines.append(shlex.join(["qcft", "run", "recipe.yaml", *name, *flags]) + "\n")
    return "".join(lines)


def _assignments(sets: Mapping[str, Any]) -> list[str]:
    return [f"{key}={flow(value)}" for key, value in sets.items()]


def _versions(arms: Sequence[Arm]) -> Table:
    """The versions and the hardware that the steps ran on."""
    used: dict[str, list[str]] = {}
    for run in (run for arm in arms for run in arm.runs):
        for stage in run.run.stages.values():
            step = stage.opened.begun
            found = {**step.get("versions", {}), **{k: str(value) for k, value in step.get("hardware", {}).items()}}
            for name, version in found.items():
                versions = used.setdefault(name, [])
                if version not in versions:
                    versions.append(version)
    return Table(
        "versions",
        "Versions and hardware",
        ("what", "value"),
        tuple((name, ", ".join(versions)) for name, versions in used.items()),
        tuple({"what": name, "value": ", ".join(versions)} for name, versions in used.items()),
        "Several values: steps of different runs of the tool." if any(len(v) > 1 for v in used.values()) else "",
        words=(0, 1),
    )


def _digests(arms: Sequence[Arm]) -> Table:
    """Digests of model, rows and adapters; equal ones once."""
    used: dict[tuple[str, str], list[tuple[Arm, Evidence]]] = {}
    for arm in arms:
        for run in arm.runs:
            for what, digest in digests(run).items():
                used.setdefault((what, digest), []).append((arm, run))
    several = sum(len(arm.runs) for arm in arms) > 1
    of = {key: shared_by(runs, arms) for key, runs in used.items()}
    return Table(
        "digests",
        "Digests",
        ("what", "of", "digest") if several else ("what", "digest"),
        tuple((what, *((of[what, digest],) if several else ()), digest) for what, digest in used),
        tuple({"what": what, "of": of[what, digest], "digest": digest} for what, digest in used),
        "SHA-256. Equal digests and settings make equal steps.",
        words=(0, 1, 2),
    )


def digests(run: Evidence) -> dict[str, str]:
    """A run's digests: the model, held-out rows, each phase's rows, each adapter."""
    found: dict[str, str] = {}
    for stage in run.run.stages.values():
        settings = stage.opened.inputs["settings"]
        if "held_out" in settings:
            found["model"] = settings["model"]
            found["held-out rows"] = settings["held_out"]
        if "rows" in settings and stage.step.startswith(("train-", "adapter-")):
            found[f"rows of {stage.name}"] = settings["rows"]
        for name, digest in stage.record["files"].items():
            if name == "adapter/adapter_model.safetensors":
                found[f"adapter of {stage.name}"] = digest
    return found
