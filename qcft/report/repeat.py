"""Everything needed to repeat the runs: commands, recipe, versions, digests."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from qcft.recipe.shared import shared, shared_yaml
from qcft.report.arms import ArmRuns, Evidence, Member, flow, members, shared_by, whose, with_of
from qcft.report.document import Block, Listing, Section, Table


def arms_section(arms: Sequence[ArmRuns]) -> Section | None:
    """How the arms differ; None where there is only one."""
    if len(arms) == 1:
        return None
    rows = [
        {
            "arm": arm.name,
            "seeds": ", ".join(str(run.recipe.seed) for run in arm.runs),
            "runs measured after the last phase": f"{sum(run.last is not None for run in arm.runs)} of {len(arm.runs)}",
            "other recipe keys": "\n".join(_assignments(arm.sets)) or "nothing: the first recipe",
        }
        for arm in arms
    ]
    records = ({**whose(arm, run), "set": flow(shared(dict(arm.sets)))} for arm, run in members(arms))
    words = ("seeds", "other recipe keys")
    table = Table.of("arms", f"How the arms differ from {arms[0].name}", rows, records, words=words)
    return Section("arms", "The arms", (table,))


def repeat_section(arms: Sequence[ArmRuns]) -> Section:
    """The commands, their recipe, versions and digests."""
    first = arms[0].runs[0]
    recipe = shared_yaml(first.recipe)
    blocks: list[Block] = [
        Listing("The recipe (recipe.yaml)", recipe, "yaml"),
        Listing("The commands", commands(arms), "sh"),
    ]
    if any(run.run.stages for _, run in members(arms)):
        blocks += [_versions(arms), _digests(arms)]
    return Section("repeat", "To repeat it", tuple(blocks))


def commands(arms: Sequence[ArmRuns]) -> str:
    """A command for each run, with the first run's recipe as recipe.yaml."""
    first, lines = arms[0].runs[0].recipe, []
    for arm, run in members(arms):
        seed = {} if run.recipe.seed == first.seed else {"seed": run.recipe.seed}
        name = ["--as", run.run.name] if run.run.name != first.name else []
        flags = [word for text in _assignments({**arm.sets, **seed}) for word in ("--set", text)]
        lines.append(shlex.join(["qcft", "run", "recipe.yaml", *name, *flags]) + "\n")
    return "".join(lines)


def _assignments(sets: Mapping[str, Any]) -> list[str]:
    return [f"{key}={flow(value)}" for key, value in shared(dict(sets)).items()]


def _versions(arms: Sequence[ArmRuns]) -> Table:
    """The library versions and the hardware of the steps."""
    used: dict[str, dict[str, None]] = {}
    for _, run in members(arms):
        for stage in run.run.stages.values():
            step = stage.opened.begun
            for name, version in {**step.get("versions", {}), **step.get("hardware", {})}.items():
                used.setdefault(name, {})[str(version)] = None
    rows = [{"what": name, "value": ", ".join(versions)} for name, versions in used.items()]
    note = (
        "Several values: the steps ran at different times or on different machines."
        if any(len(v) > 1 for v in used.values())
        else ""
    )
    return Table.of("versions", "Versions and hardware", rows, rows, note, {"value"})


def _digests(arms: Sequence[ArmRuns]) -> Table:
    """Digests of model, rows and adapters; equal ones are listed once."""
    used: dict[tuple[str, str], list[Member]] = {}
    for arm, run in members(arms):
        for what, digest in digests(run).items():
            used.setdefault((what, digest), []).append((arm, run))
    rows = [with_of({"what": what, "digest": digest}, runs, arms) for (what, digest), runs in used.items()]
    records = ({"what": what, "of": shared_by(runs, arms), "digest": digest} for (what, digest), runs in used.items())
    return Table.of(
        "digests", "Digests", rows, records, "SHA-256. Equal digests and settings give equal steps.", {"digest"}
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
