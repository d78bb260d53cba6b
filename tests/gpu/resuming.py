"""Parts about killed trainings: do they resume, and is the result bitwise equal."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.gpu.common import Ended, Part, Runs, gib, peak, qcft, run_recipe, share_of_cores, write_recipe, write_rows

WEIGHTS = "adapter/adapter_model.safetensors"
# Code that runs before qcft, and arguments of its command line: sets of kernels, each more deterministic than the last.
WAYS: dict[str, tuple[str, list[str]]] = {
    "as qcft trains": ("", []),
    "attention by plain arithmetic": (
        "from torch.backends import cuda\n"
        "cuda.enable_flash_sdp(False); cuda.enable_mem_efficient_sdp(False); cuda.enable_cudnn_sdp(False)",
        [],
    ),
    "deterministic: true": ("", ["--set", "deterministic=true"]),
}
LABELS = {"killed": "killed and resumed", "second": "left alone twice"}
STEPS = 24


def resume(part: Part) -> None:
    """One training, twice undisturbed and once killed and resumed: whether all are equal, for three sets of kernels."""
    place, model = part.folder(), part.model("small")
    phase = {
        "name": "phase1",
        "data": [{"path": str(write_rows(place / "rows.jsonl", 240, 24, 120)), "lang": "en"}],
        "train": {"steps": STEPS, "batch": 8, "lr": 1e-3, "max_length": 256, "checkpoint_steps": 4},
    }
    recipe = write_recipe(place, "resume", model, [phase], lora={"r": 16, "dropout": 0.05})
    # A CPU is deterministic: if the resumed training is equal, a second undisturbed one would be equal too.
    ways = dict([list(WAYS.items())[-1]]) if part.dry else WAYS
    names = ("killed", "first") if part.dry else ("killed", "first", "second")
    processes = min(len(ways) * len(names), os.cpu_count() or 1)

    def train(way: str, name: str, kill: bool) -> Runs:
        before, changes = ways[way]
        runs = Runs(place / way.replace(" ", "-") / name, "resume")
        options = {"before": before, "environment": share_of_cores(processes)}
        if kill:
            killed = run_killed(recipe, runs, "phase1", STEPS * 7 // 12, *changes, **options)
            part.report("killed", way=way, **killed)
        run_recipe(recipe, runs, until="phase1", changes=changes, **options).check()
        return runs

    with ThreadPoolExecutor(processes) as pool:
        waiting: dict[tuple[str, str], Future[Runs]] = {
            (way, name): pool.submit(train, way, name, name == "killed") for way in ways for name in names
        }
        for way in ways:
            for name in names:
                if name != "first":
                    runs = (waiting[way, "first"], waiting[way, name])
                    part.attempt(f"{way}: {LABELS[name]}", lambda runs=runs: _compared(*(one.result() for one in runs)))


def _compared(first: Runs, other: Runs) -> dict[str, Any]:
    metrics = (other.done("phase1") or {})["metrics"]
    return {
        **differences(first, other, "phase1"),
        "resumed_from": metrics["resumed_from"],
        "steps": metrics["steps"],
        "last_loss": first.log("phase1")[-1]["loss"],
    }


def run_killed(recipe: Path | str, runs: Runs, stage: str, steps: int, *more: object, **options: Any) -> dict[str, Any]:
    """`qcft run`, killed by SIGKILL when a training has logged so many steps; RuntimeError if it ended before."""
    ended = qcft("run", recipe, "--runs", runs.folder, *more, stop=lambda: len(runs.log(stage)) >= steps, **options)
    ended.check()
    if ended.exit != -signal.SIGKILL or runs.done(stage) is not None:
        raise RuntimeError(f"the training was over before it could be killed at step {steps}")
    return {"at_step": len(runs.log(stage)), "after_seconds": ended.seconds}


def differences(one: Runs, other: Runs, stage: str) -> dict[str, Any]:
    """The difference of two trainings of one stage: bitwise equal, or the differences of losses and adapters."""
    losses = [[entry["loss"] for entry in runs.log(stage)] for runs in (one, other)]
    files = [runs.place(stage, WEIGHTS) for runs in (one, other)]
    equal = len({hashlib.sha256(file.read_bytes()).hexdigest() for file in files}) == 1
    found: dict[str, Any] = {"adapter_equal": equal, "losses_equal": losses[0] == losses[1]}
    if not found["losses_equal"]:
        pairs = list(zip(*losses, strict=True))
        found["first_unequal_step"] = next(i for i, (a, b) in enumerate(pairs, start=1) if a != b)
        found["loss_differs_most"] = max(abs(a - b) for a, b in pairs)
    if not equal:
        found["adapter_differs_relative"] = _relative(*files)
    return found


def _relative(one: Path, other: Path) -> float:
    """The norm of the difference of two adapters divided by the norm of the first."""
    from safetensors.torch import load_file

    a, b = load_file(one), load_file(other)
    apart = sum(float((a[key].double() - b[key].double()).norm()) ** 2 for key in a) ** 0.5
    return float(f"{apart / sum(float(a[key].double().norm()) ** 2 for key in a) ** 0.5:.3g}")


# ---- the quickstart -----------------------------------------------------------------------------------------------


def quickstart(part: Part) -> None:
    """`qcft run quickstart` on its real weights (`--dry`: a tiny model); then phase 2 again, undisturbed and killed."""
    place = part.folder()
    changes = _tiny_quickstart(part) if part.dry else []
    first = Runs(place / "first", "quickstart")

    def stage(name: str, record: Mapping[str, Any]) -> None:
        part.report(
            "stage", stage=name, seconds=round(record["seconds"], 1), peak_gib=gib(peak(record)), **_figures(record)
        )

    def run(runs: Runs, **options: Any) -> Ended:
        return run_recipe("quickstart", runs, changes=changes, **options)

    def whole() -> dict[str, Any]:
        ended = run(first, report=stage)
        ended.check()
        nll = {
            name: {group: round(one["nll"], 4) for group, one in record["metrics"]["groups"].items()}
            for name in first.stages()
            if name.startswith("eval/") and (record := first.done(name))
        }
        return {"run_seconds": ended.seconds, "nll": nll, "warnings": ended.warnings()}

    if part.attempt("qcft run quickstart", whole) is None:
        return

    def again(label: str, kill: bool) -> dict[str, Any]:
        runs = first.copy_without(place / label, "phase2", "eval/phase2")
        found: dict[str, Any] = {}
        if kill:
            steps = (first.done("phase2") or {})["metrics"]["steps"]
            found = run_killed("quickstart", runs, "phase2", max(2, steps * 2 // 3), *changes)
        run(runs).check()
        groups = [(one.done("eval/phase2") or {})["metrics"]["groups"] for one in (first, runs)]
        return {
            **found,
            "resumed_from": (runs.done("phase2") or {})["metrics"]["resumed_from"],
            **differences(first, runs, "phase2"),
            "nll_differs_most": max(abs(groups[0][name]["nll"] - groups[1][name]["nll"]) for name in groups[0]),
        }

    with ThreadPoolExecutor(2) as pool:
        for one in [
            pool.submit(part.attempt, "phase 2 again, left alone", lambda: again("alone", False)),
            pool.submit(part.attempt, "phase 2 again, killed and resumed", lambda: again("killed", True)),
        ]:
            one.result()


def _figures(record: Mapping[str, Any]) -> dict[str, Any]:
    """The interesting values of a stage's metrics, with its seconds and its peak."""
    metrics = record["metrics"]
    wanted = ("steps", "tokens", "loss", "prefix_cache", "recomputed", "pass_limit", "rows", "share", "kl")
    found = {key: metrics[key] for key in wanted if key in metrics}
    parts = metrics.get("parts")
    if parts and parts[0].get("generation"):
        found["generation"] = parts[0]["generation"]
    if metrics.get("answers"):
        found["answers"] = metrics["answers"]
    return found


def _tiny_quickstart(part: Part) -> list[str]:
    """The quickstart's flags for the tiny model, whose tokens are bytes and whose answers are not English."""
    filters = "{duplicates: false, loops: null, language: null}"
    replay = (
        f"{{ratio: 0.2, kind: generative, max_new_tokens: 64, chunk: 16, on_shortfall: shrink, filters: {filters}}}"
    )
    keys = {
        "model": f"{{name: {part.model()}}}", "phase1.data.0.take": 12, "phase2.data.0.take": 8, "heldout.rows": 2,
        "answers.prompts": 2, "answers.max_new_tokens": 8, "phase1.train.max_length": 1024,
        "phase2.train.max_length": 1024, "phase2.freeze": "first:2", "phase2.replay": replay,
    }  # fmt: skip
    return [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
