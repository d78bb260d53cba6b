"""Parts about memory and speed: estimates and measurements, qcft compared with plain TRL and plain transformers."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tests.gpu.common import (
    Part,
    Runs,
    command,
    gib,
    peak,
    qcft,
    run_recipe,
    share_of_cores,
    step_seconds,
    write_recipe,
    write_rows,
)

# ---- memory -------------------------------------------------------------------------------------------------------


def memory(part: Part) -> None:
    """The estimate of `qcft check` and the peak in `qcft run`: for each training, and for measuring the base model.

    The phases of one recipe all start from the base, so that one command computes the weights' digest once and
    measures all of them. A training's peak includes loading its model: `load_gib`, the peak of measuring one row, is
    about the memory of loading. If `loading_decides`, the training itself needed less.
    """
    place, model = part.folder(), part.model()
    train = {"steps": 2, "batch": 16, "max_length": 1024, "prefix_cache": False, "checkpoint_steps": 100}
    if part.dry:
        train |= {"batch": 2}

    def phase(name: str, changes: dict[str, Any], **more: Any) -> dict[str, Any]:
        data = [{"path": "qcft:instructions/en", "take": 64, "lang": "en"}]
        return {"name": name, "start": "base", "data": data, "train": {**train, **changes}, **more}

    recomputed = phase("recomputed", {"gradient_checkpointing": True})
    stored = phase("stored", {"prefix_cache": True}, freeze="first:0.5")
    chosen = [] if part.size == "8B" else [phase("as-qcft-chooses", {})]
    recipes = {"nf4": write_recipe(place, "nf4", model, [recomputed, *chosen, stored])}
    if part.size == "1B":
        padded = phase("padded-rank-64", {"packing": False})
        recipes |= {
            "sixteen": write_recipe(place, "sixteen", model, [recomputed], quantize="none"),
            "padded": write_recipe(place, "padded", model, [padded], lora={"r": 64}),
        }
    # nvidia-smi counts the whole card: only valid while one recipe is measured and no model is being made.
    alone = len(recipes) == 1 and all((one / "ready").is_file() for one in (part.work / "models").iterdir())
    cores = share_of_cores(2 * len(recipes))
    with CardUse(part.cuda and alone) as card, ThreadPoolExecutor(2 if part.dry else len(recipes)) as pool:

        def measure(recipe: Path) -> dict[str, Any]:
            return _estimated_and_measured(part, recipe, card, cores)

        waiting = [pool.submit(part.attempt, name, partial(measure, recipe)) for name, recipe in recipes.items()]
        for one in waiting:
            one.result()
    if card.most:
        part.report("nvidia-smi's figure, less what was in use before", gib=gib(card.most))


def _estimated_and_measured(part: Part, recipe: Path, card: CardUse, cores: dict[str, str]) -> dict[str, Any]:
    """Both for one recipe; the estimate is made while the run starts, and measurements are also reported at once."""
    name = recipe.stem
    runs = Runs(recipe.parent / f"runs-{name}", name)
    last = json.loads(recipe.read_text(encoding="utf-8"))["phases"][-1]["name"]

    def done(stage: str, record: Mapping[str, Any]) -> None:
        measured = gib(peak(record))
        part.report("measured", recipe=name, stage=stage, measured_gib=measured, seconds=round(record["seconds"], 1))

    with ThreadPoolExecutor(1) as beside:
        line = ("check", recipe, "--runs", recipe.parent / "none", "--rows", 0, "--json")
        check = beside.submit(qcft, *line, environment=cores)
        check.add_done_callback(lambda _: card.count())
        ended = run_recipe(recipe, runs, done, until=last, environment=cores)
        ended.check()
        estimate = check.result().json()
    base = runs.done("eval/base")
    load = peak(base) if base else 0
    for phase in estimate["phases"]:
        record, log = runs.done(phase["phase"]), runs.log(phase["phase"])
        assert record is not None
        measured, parts = peak(record), {k: gib(v) for k, v in phase["memory"].items() if v}
        part.report(
            "training",
            recipe=name,
            phase=phase["phase"],
            estimated_gib=parts,
            measured_gib=gib(measured),
            load_gib=gib(load),
            loading_decides=measured <= 1.01 * load,
            off=round(phase["memory"]["total"] / measured - 1, 3),
            estimated_seconds=phase["seconds"] and round(phase["seconds"], 1),
            measured_seconds=round(sum(step_seconds(log)), 1),
            tokens=log[-1]["tokens"],
            tokens_per_second=log[-1]["tokens_per_second"],
            **{key: record["metrics"][key] for key in ("recomputed", "pass_limit", "prefix_cache")},
        )
    totals = {one["id"]: one["memory"]["total"] for one in estimate["steps"] if one["memory"]}
    measuring = {
        stage: {"estimated_gib": gib(totals[step]), "measured_gib": gib(peak(record))}
        for stage, step in runs.stages().items()
        if stage.startswith("eval/") and step in totals and (record := runs.done(stage))
    }
    return {"run_seconds": ended.seconds, "measuring": measuring, "warnings": ended.warnings()}


class CardUse:
    """The peak memory in use on the card since `count`, in bytes, minus what was in use before."""

    def __init__(self, wanted: bool) -> None:
        self.most = 0
        self._counts, self._over = threading.Event(), threading.Event()
        self._before = self._used() if wanted else None
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> CardUse:
        if self._before is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._before is not None:
            self._thread.join()

    def count(self) -> None:
        """Start: from now on only the measured process runs on the card."""
        self._counts.set()

    def _look(self) -> None:
        while not self._over.wait(0.3):
            used = self._used() or 0
            if self._counts.is_set():
                self.most = max(self.most, used - (self._before or 0))

    @staticmethod
    def _used() -> int | None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
        try:
            return int(subprocess.run(query, capture_output=True, text=True, check=True, timeout=5).stdout) << 20
        except (OSError, ValueError, subprocess.SubprocessError):
            return None


# ---- an optimizer step --------------------------------------------------------------------------------------------


def step(part: Part) -> None:
    """Seconds of an optimizer step: plain TRL + PEFT and qcft on the same rows and modules, none and half frozen.

    The plain script runs before and after qcft. qcft's peak includes loading the model.
    """
    place, model = part.folder(), part.model(alone=True)
    layers = json.loads((model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    half, batch, tokens, steps = layers // 2, 4, 64 if part.dry else 512, 3 if part.dry else 6
    rows = write_rows(place / "rows.jsonl", 2 * batch * steps, tokens, tokens)
    train = {
        "lr": 2e-4, "scheduler": "constant", "warmup": 0, "optimizer": "adamw_torch_fused", "batch": batch,
        "micro_batch": batch, "packing": False, "max_length": tokens, "steps": steps, "checkpoint_steps": 1000,
        "prefix_cache": False, "gradient_checkpointing": False,
    }  # fmt: skip
    kinds = {
        "recomputed": ("none", {"gradient_checkpointing": True}),
        "half-recomputed": (f"first:{half}", {"gradient_checkpointing": True}),
        "half": (f"first:{half}", {}),
        "half-stored": (f"first:{half}", {"prefix_cache": True}),
    }
    data = [{"path": str(rows), "lang": "en", "take": batch * steps}]
    phases = [
        {"name": name, "start": "base", "data": data, "freeze": freeze, "train": {**train, **changes}}
        for name, (freeze, changes) in kinds.items()
    ]
    recipe, runs = write_recipe(place, "step", model, phases), Runs(place / "runs", "step")
    frozen = {"recomputed": 0} | dict.fromkeys(list(kinds)[1:], half)

    def plain(count: int) -> dict[str, Any]:
        line = ["train", model, rows, "--batch", batch, "--steps", steps, "--frozen", count]
        found = _plain(line)
        return _figures(found["step_seconds"], found["losses"], batch * tokens, found["peak"])

    def stage(name: str, record: Mapping[str, Any]) -> None:
        if name in kinds:
            log = runs.log(name)
            figures = _figures(
                step_seconds(log), [entry["loss"] for entry in log], log[-1]["tokens"] / len(log), peak(record)
            )
            # The stage's seconds include loading and storing the states.
            part.report(f"qcft, {name}", frozen=frozen[name], **figures, stage_seconds=round(record["seconds"], 1))

    part.attempt("plain TRL + PEFT", lambda: plain(0), frozen=0)
    part.attempt("qcft run", lambda: {"run_seconds": _whole(recipe, runs, stage, "half-stored")})
    part.attempt("plain TRL + PEFT", lambda: plain(half), frozen=half)


def _whole(recipe: Path, runs: Runs, stage: Any, until: str) -> float:
    ended = run_recipe(recipe, runs, stage, until=until)
    ended.check()
    return ended.seconds


def _figures(seconds: list[float], losses: list[float], tokens: float, most: float) -> dict[str, Any]:
    """The median step after the first, which is the warm-up."""
    middle = statistics.median(seconds[1:] or seconds)
    return {
        "step_seconds": round(middle, 4),
        "first_step_seconds": seconds[0],
        "tokens_per_second": round(tokens / middle, 1),
        "peak_gib": gib(most),
        "losses": [round(loss, 4) for loss in losses],
    }


def _plain(arguments: list[Any]) -> dict[str, Any]:
    """The results of tests/gpu/plain.py, which does not use qcft."""
    ended = command([sys.executable, "-m", "tests.gpu.plain", *map(str, arguments)])
    ended.check()
    return dict(json.loads(ended.stdout.splitlines()[-1]))


# ---- answers ------------------------------------------------------------------------------------------------------


def generate(part: Part) -> None:
    """Answer tokens per second: qcft's replay and transformers' `generate`, with the same prompts and sampling.

    The random model ends an answer after 40 tokens on average, so that answers differ in length as real ones do.
    """
    place, model = part.folder(), part.model(alone=True)
    count, new, chunk = (8, 16, 4) if part.dry else (128, 128, 64)
    rows = write_rows(place / "rows.jsonl", 3 * count, 60, 240, answer=20)
    filters = {"duplicates": False, "loops": None, "language": None}
    replay = {
        "ratio": 0.5, "kind": "generative", "data": [{"path": str(rows), "lang": "en"}], "max_new_tokens": new,
        "temperature": 0.7, "top_p": 0.9, "chunk": chunk, "on_shortfall": "shrink", "filters": filters,
    }  # fmt: skip
    data = [{"path": str(rows), "lang": "en", "take": count}]
    phase = {"name": "phase1", "data": data, "replay": replay, "train": {"steps": 1}}
    recipe = write_recipe(place, "generate", model, [phase])

    def ours() -> dict[str, Any]:
        runs = Runs(place / "runs", "generate")
        start = time.monotonic()
        command([sys.executable, "-m", "tests.gpu.insides", "replay", str(recipe), str(runs.folder)]).check()
        record = runs.done("replay")
        assert record is not None
        made = record["metrics"]["parts"][0]["generation"]
        chunks = sorted(runs.folder.glob(".steps/pool-*/chunks/*.json"))
        return {
            **{key: made[key] for key in ("answers", "tokens", "tokens_per_second", "batch")},
            "generating_seconds": made["seconds"],
            "tokens_per_second_by_chunk": [_rate(json.loads(file.read_text(encoding="utf-8"))) for file in chunks],
            "peak_gib": gib(peak(record)),
            "left_out": record["metrics"]["left_out"],
            "whole_command_seconds": round(time.monotonic() - start, 1),
        }

    part.attempt("qcft, its own batches", ours)
    line = ["generate", model, rows, "--count", chunk, "--new", new, "--batches", f"{chunk},{max(1, chunk // 4)}"]
    part.attempt("transformers' generate, by batch", lambda: _plain(line))


def _rate(chunk: Mapping[str, Any]) -> float:
    return round(sum(answer.get("tokens", 0) for answer in chunk["answers"]) / max(1e-9, chunk["seconds"]), 1)
