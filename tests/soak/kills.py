"""Kill a run of a tiny model with SIGKILL at random times, in every kind of step and in the report, many times. When a
run is finished, every file and every score of every step must be bitwise equal to those of a run that is not killed.

python tests/soak/kills.py [--kills 30 | --each] [--seed 0]

With --each there is one kill in the first step of each kind and one in the report, as in the test suite.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import yaml

from qcft import api
from qcft.events import StepBegun, StepEnded, Watch
from qcft.files import read_json
from qcft.recipe import load_recipe
from qcft.runner.recipe import plan_recipe

REPORT = "report"
# Files with the folder of an adapter's base, and with the seconds of each live probe (its results are among the
# metrics too).
NOT_COMPARED = ("adapter/adapter_config.json", "english.jsonl")
# Those of a step's metrics that depend on time, or on the number of kills.
CIRCUMSTANCES = {"tokens_per_second", "resumed_from", "chunks_made", "chunks_reused", "share_of_time"}
FORK = multiprocessing.get_context("fork")  # imports here are inherited by every child, so that they start fast


def recipe(model: Path, data: Path) -> dict[str, Any]:
    """Two phases with generative replay; every kind of step takes long enough to be hit."""
    train = {"lr": 1e-2, "batch": 4, "max_length": 64, "checkpoint_steps": 3}
    return {
        "name": "tiny",
        "model": str(model),
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "heldout": {"share": 0.2, "rows": 6},
        "answers": {"prompts": 3, "max_new_tokens": 8},
        "merge": {"refuse_below": None},
        "forgetting": {"every": 2},
        "evaluate": {"tasks": ["xquad_es", "fidelity"], "limit": 8, "max_new_tokens": 8,
                     "local": {"xquad_es": str(data / "xquad.jsonl")},
                     "fidelity": {"prompts": 3, "max_new_tokens": 8}},
        "phases": [
            {"name": "phase1", "data": {"path": str(data / "en.jsonl"), "take": 24, "lang": "en"},
             "train": {**train, "epochs": 6}},
            {"name": "phase2", "data": {"path": str(data / "{lang}.jsonl"), "lang": ["es", "pt"], "take": 12},
             "freeze": "snr:0.5", "train": train,
             "replay": {"ratio": 0.3, "max_new_tokens": 24, "temperature": 1.0, "chunk": 2}},
        ],
    }  # fmt: skip


def work(recipe_file: Path, runs: Path, said: Any, at: str | None, delay: float) -> None:
    """Run in a child process, which kills itself some seconds after the start of step `at`."""
    loaded = load_recipe(recipe_file)
    last = plan_recipe(loaded, runs, Watch())[0].plan.steps[-1].id

    def listen(event: Any) -> None:
        title = None
        if isinstance(event, StepBegun) and event.state != "reused":
            title = event.title
        elif isinstance(event, StepEnded) and event.step == last:
            title = REPORT
        if title is not None:
            said.send((title, time.monotonic()))
            if title == at:
                timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
                timer.daemon = True
                timer.start()

    api.run_watched(loaded, runs, Watch(listen))
    said.send(("end", time.monotonic()))


def run(recipe_file: Path, runs: Path, at: str | None = None, delay: float = 0.0) -> tuple[int, dict[str, float]]:
    """The child's exit code, and the seconds of each step that it started."""
    here, there = FORK.Pipe(duplex=False)
    child = FORK.Process(target=work, args=(recipe_file, runs, there, at, delay))
    child.start()
    there.close()
    moments = []
    try:
        while True:
            moments.append(here.recv())
    except EOFError:
        child.join()
    took = {title: after - begun for (title, begun), (_, after) in pairwise(moments)}
    return child.exitcode or 0, took


def results(runs: Path) -> dict[str, Any]:
    """What must be equal of each stage of a run."""
    stages = read_json(runs / "tiny" / "run.json")["stages"]
    return {stage: equal_parts(read_json(runs / ".steps" / step / "done.json")) for stage, step in stages.items()}


def equal_parts(record: dict[str, Any]) -> tuple[str, dict[str, str], Any]:
    """A done step's id, the digests of its files, and all its metrics."""
    files = {name: digest for name, digest in record["files"].items() if name not in NOT_COMPARED}
    return record["step"], files, scores(record["metrics"])


def scores(value: Any) -> Any:
    """The metrics, without those that differ every time."""
    if isinstance(value, dict):
        apart = {key for key in value if key in CIRCUMSTANCES or "seconds" in key or key.startswith("peak_")}
        return {key: scores(one) for key, one in value.items() if key not in apart}
    return [scores(one) for one in value] if isinstance(value, list) else value


def kind_of(title: str) -> str:
    return title.split()[0]


def next_victim(left: list[str], killed: Counter[str], kills: int | None, chance: random.Random) -> str | None:
    """The remaining step for the next kill; None when there were enough kills.

    All kinds are equally likely; when `kills` is None, it is the first step of a kind without a kill so far.
    """
    if kills is None:
        met = {kind_of(title) for title in killed}
        return next((title for title in left if kind_of(title) not in met), None)
    if killed.total() >= kills:
        return None
    kind = chance.choice(sorted({kind_of(title) for title in left}))
    return chance.choice([title for title in left if kind_of(title) == kind])


def kill_runs(raw: dict[str, Any], folder: Path, kills: int | None, seed: int) -> Counter[str]:
    """Run, kill and resume until there were `kills` kills (None: one of each kind) and the last run is finished.

    Returns the kills by step.

    Raises AssertionError when a finished run differs from the one that is not killed.
    """
    recipe_file = folder / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(raw))
    code, took = run(recipe_file, folder / "alone")
    assert code == 0
    whole, chance, killed, number = results(folder / "alone"), random.Random(seed), Counter[str](), 0
    while next_victim(list(took), killed, kills, chance) is not None:
        number += 1
        runs, left = folder / f"killed {number}", list(took)  # steps run in this order
        while True:
            at = next_victim(left, killed, kills, chance)
            code, _ = run(recipe_file, runs, at, chance.uniform(0, took[at]) if at else 0.0)
            if code == 0:
                break
            assert code == -signal.SIGKILL, code
            assert at is not None
            killed[at] += 1
            print(f"kill {killed.total()}: {at}", flush=True)
            left = left[left.index(at) :]
        assert results(runs) == whole, f"run {number} differs"
        assert (runs / "tiny" / "report" / "report.md").is_file()
    return killed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--each", action="store_true", help="one in each kind of step and in the report")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["QCFT_CACHE"] = str(folder / "cache")
        raw = recipe(*make_inputs(folder))
        if options.each:
            raw["evaluate"]["stages"] = ["phase2"]
        killed = kill_runs(raw, folder, None if options.each else options.kills, options.seed)
    for step, count in killed.most_common():
        print(f"{count:4} {step}")
    print(f"{killed.total()} kills; every finished run equal to the bit to the one left alone")


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """Make a tiny model and its data in a child, as this process must not start threads before it forks."""
    child = FORK.Process(target=_make_inputs, args=(folder,))
    child.start()
    child.join()
    assert child.exitcode == 0
    return folder / "model", folder / "data"


def _make_inputs(folder: Path) -> None:
    from tests.helpers import tiny

    tokenizer = tiny.make_tokenizer(folder / "tokenizer")
    tiny.make_llama(folder / "model", tokenizer)
    tiny.make_color_data(folder / "data")
    answers = {"text": ["red"], "answer_start": [11]}
    rows = [{"id": f"q{i}", "context": "the cat is red", "question": f"what color {i}", "answers": answers}
            for i in range(8)]  # fmt: skip
    tiny.write_rows(folder / "data" / "xquad.jsonl", rows)


if __name__ == "__main__":
    for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(threads, "1")  # a tiny model gains nothing from more; read as torch is loaded
    import lm_eval.tasks  # noqa: F401
    import transformers
    import trl  # noqa: F401

    transformers.logging.set_verbosity_error()
    gc.collect()
    gc.freeze()  # half a million objects that the garbage collector of a child can skip
    main()
