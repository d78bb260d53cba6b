"""Parts about a card with little free memory: another process occupies the rest of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.gpu.common import GIB, Part, Runs, gib, peak, run_recipe, write_recipe, write_rows

BALLAST = """
import sys, torch
where, room = sys.argv[1], float(sys.argv[2]) * 2**30
held = [torch.ones(1, device=where)]
free = lambda: torch.cuda.mem_get_info()[0] if where == "cuda" else room
while (take := int(free() - room)) >= 1 << 24:
    held.append(torch.empty(min(take, 8 << 30), dtype=torch.uint8, device=where))
print(free(), flush=True)
sys.stdin.read()
"""


class Ballast:
    """A context in which another process occupies the card's memory except `room` GiB; yields the free GiB.

    Plain allocations, released at the end. With --dry the process allocates nothing.
    """

    def __init__(self, part: Part, room: float) -> None:
        self._command = [sys.executable, "-c", BALLAST, "cuda" if part.cuda else "cpu", f"{room:.3f}"]

    def __enter__(self) -> float:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that holds the card's memory ended with {self._process.wait()}")
        return round(float(line) / GIB, 2)

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def oom(part: Part) -> None:
    """A training runs out of memory: its step is repeated in smaller passes, and the losses stay the same."""
    place, model = part.folder(), part.model(alone=True)
    rows = write_rows(place / "rows.jsonl", 160, 64, 128)
    train = {
        "steps": 3, "batch": 64, "micro_batch": 64, "packing": False, "max_length": 256, "prefix_cache": False,
        "gradient_checkpointing": False,  # qcft would turn it on by itself, and not run out of memory
    }  # fmt: skip
    data = [{"path": str(rows), "lang": "en"}]
    recipe = write_recipe(place, "oom", model, [{"name": "phase1", "data": data, "train": train}])
    free = Runs(place / "free", "oom")

    def without_limit() -> dict[str, Any]:
        run_recipe(recipe, free).check()
        return {"measured_gib": gib(peak(free.done("phase1") or {})), **_passes(free)}

    if part.attempt("with the whole card", without_limit) is None:
        return
    need = peak(free.done("phase1") or {}) / GIB
    for label, share in (("half", 0.45), ("a quarter", 0.25)):
        # The training's memory apart from activations, and that of CUDA itself, are added.
        room = max(0.1, share * need) + (0.9 if part.cuda else 0)
        part.attempt(
            f"with {label} of the memory", lambda label=label, room=room: _limited(part, recipe, free, label, room)
        )


def _limited(part: Part, recipe: Path, free: Runs, label: str, room: float) -> dict[str, Any]:
    """The same training with so many GiB of the card, compared with the one that had all of it."""
    runs = free.copy_without(free.folder.parent / label.replace(" ", "-"), "phase1", "eval/phase1")
    with Ballast(part, room) as there:
        ended = run_recipe(recipe, runs, until="phase1")
    ended.check()
    found = _passes(runs)
    ran_out = found["pass_limit"] is not None or found["recomputed"]
    whole = free.log("phase1")
    return {
        **({"failed": f"memory did not run out with {there} GiB"} if part.cuda and not ran_out else {}),
        "room_gib": there,
        "measured_gib": gib(peak(runs.done("phase1") or {})),
        "memory_ran_out": ran_out,
        **found,
        "loss_differs_most": max(abs(a - b["loss"]) for a, b in zip(found["losses"], whole, strict=True)),
        "warnings": ended.warnings(),
    }


def _passes(runs: Runs) -> dict[str, Any]:
    metrics = (runs.done("phase1") or {})["metrics"]
    losses = [entry["loss"] for entry in runs.log("phase1")]
    return {"pass_limit": metrics["pass_limit"], "recomputed": metrics["recomputed"], "losses": losses}


def card8(part: Part) -> None:
    """A card with 8 GB: loading, answers, training as in the README and with `batch: auto`, 16 bits offloaded.

    A stage that fails there is run again with the whole card, so that the later stages are tested too.
    """
    place, model = part.folder(), part.model(alone=True)
    train = {
        "steps": 3,
        "batch": 2 if part.dry else 16,
        "max_length": 1024,
        "checkpoint_steps": 100,
        "prefix_cache": False,
    }
    data = [{"path": "qcft:instructions/en", "take": 64, "lang": "en"}]
    phases = [
        {"name": "recomputed", "data": data, "train": {**train, "gradient_checkpointing": True}},
        {"name": "auto", "start": "base", "data": data, "train": {**train, "micro_batch": "auto"}},
    ]
    measured = {"heldout": {"rows": 4}, "answers": {"prompts": 4, "max_new_tokens": 8}}
    recipe, runs = write_recipe(place, "card8", model, phases, **measured), Runs(place / "runs", "card8")
    room = 7.4  # GiB, including CUDA's own: free memory of an 8 GB card that also runs a desktop

    seen: set[str] = set()

    def stage(name: str, record: Mapping[str, Any], **more: Any) -> None:
        if name in seen:  # done by an earlier command, maybe with the whole card
            return
        seen.add(name)
        metrics = record["metrics"]
        found = {key: metrics[key] for key in ("recomputed", "pass_limit", "loss", "answers") if key in metrics}
        if log := runs.log(name):
            found["tokens_per_second"] = log[-1]["tokens_per_second"]
        part.report(name, seconds=round(record["seconds"], 1), peak_gib=gib(peak(record)), **found, **more)

    helped: set[str] = set()
    while True:
        with Ballast(part, room) as free:
            ended = run_recipe(recipe, runs, lambda name, record: stage(name, record, room_gib=free))
        part.report("run", exit=ended.exit, run_seconds=ended.seconds, room_gib=free, warnings=ended.warnings())
        todo = [name for name in runs.stages() if runs.done(name) is None]
        if not todo and not ended.exit:
            return
        name = todo[0] if todo else "before the first stage"
        part.report(name, room_gib=free, failed=f"exit code {ended.exit}: {ended.stderr[-800:].strip()}")
        if not todo or name in helped:
            return
        helped.add(name)
        run_recipe(recipe, runs, until=name)
        if (record := runs.done(name)) is None:
            return
        stage(name, record, room_gib="the whole card")
