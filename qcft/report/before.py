"""What `qcft check` found, as lines of a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GIB = 2**30
PARTS = {
    "weights": "weights in NF4",
    "constants": "their constants",
    "halves": "embeddings, head, norms in 16 bits",
    "file": "the weights' file, mapped",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits",
    "total": "total",
}


def gib(count: float) -> str:
    """`3.84 GiB`, `12 MiB`."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.0f} MiB"


def minutes(seconds: float | None) -> str:
    """`0.4 min`, `2.1 h`, `?` for what is not known."""
    if seconds is None:
        return "?"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def memory_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row for each part of the memory, a column for each phase."""
    memories = [phase["memory"] for phase in found["phases"]]
    return [
        [title, *(gib(memory[key]) for memory in memories)]
        for key, title in PARTS.items()
        if any(memory[key] for memory in memories)
    ]


def check_lines(found: Mapping[str, Any]) -> list[str]:
    """The sentences under the table: whether it fits, how passes are run, time, rows left out or cut, disk."""
    where = {"cuda": "the GPU", "cpu": "main memory"}[found["device"]] if found["here"] else "such a GPU"
    lines = []
    for phase in found["phases"]:
        name, total = phase["phase"], phase["memory"]["total"]
        fits = "fits" if phase["fits"] else "DOES NOT FIT"
        lines.append(f"{name} {fits}: {gib(total)} of {gib(found['free_bytes'])} free in {where}")
        how = "recomputing activations" if phase["gradient_checkpointing"] else "keeping activations"
        known = "" if phase["freeze_is_known"] else "; which layers are frozen is known only once they are measured"
        lines.append(
            f"  {phase['steps']} optimizer steps over {phase['rows']:,} rows, {phase['tokens']:,} tokens, "
            f"at most {phase['pass_tokens']:,} at once, {how}{known}"
        )
        paced = "measured" if phase["measured"] else "from the arithmetic"
        if phase["seconds"] is not None:
            each = phase["seconds"] / phase["steps"]
            lines.append(f"  about {minutes(phase['seconds'])} to train, {each:.2g} s a step ({paced})")
        else:
            lines.append("  how long it trains is not known for a GPU that is not here")
        left_out = ", ".join(f"{n} {reason}" for reason, n in phase["left_out"].items()) or "none"
        share = phase["truncated"] / max(1, phase["rows_read"])
        lines.append(f"  of {phase['rows_read']:,} rows left out: {left_out}; cut: {phase['truncated']} ({share:.1%})")
    lines.append(f"disk: {gib(found['disk_bytes'])} to write of {gib(found['disk_free_bytes'])} free")
    return lines


def step_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row for each step: what, state, time, memory it needs at most, bytes it writes."""
    return [
        [
            step["title"],
            step["state"],
            "" if step["seconds"] is None or step["state"] == "done" else minutes(step["seconds"]),
            gib(step["memory_bytes"]) if step["memory_bytes"] else "",
            gib(step["bytes"]) if step["bytes"] else "",
        ]
        for step in found["steps"]
    ]
