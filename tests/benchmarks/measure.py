"""The cost of scoring three stages on four tasks in one command, compared with twelve single evaluations.

Each single evaluation is a new process, as lm-eval is run by hand: it reads its data, loads the model and scores one
task. Its seconds are those of the scoring; loading, which one command saves, is counted separately. The goal: the
whole matrix costs at most 1.1 times the sum of the single scorings and its own loads.

    python tests/benchmarks/measure.py [--items 8] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

TASKS = ("hellaswag", "xquad_en", "xquad_es", "xquad_de")
TEXT = "The cat that lives in the red house by the river sleeps all day and eats at night"
WORDS = TEXT.split(" ")


def write_copies(folder: Path, items: int) -> dict[str, str]:
    """Local copies with the hub's columns and invented texts of realistic length."""
    rows: dict[str, list[dict[str, Any]]] = {"hellaswag": [], "xquad": []}
    for i in range(items):
        text = " ".join(WORDS[(i + j) % len(WORDS)] for j in range(60 + i))
        endings = [f"{word} number {i}." for word in WORDS[:4]]
        rows["hellaswag"].append(
            {"activity_label": "A house", "ctx_a": text, "ctx_b": "it", "endings": endings, "label": str(i % 4)}
        )
        answers = {"text": [WORDS[i % len(WORDS)]], "answer_start": [0]}
        rows["xquad"].append({"id": str(i), "context": text, "question": f"What is number {i}?", "answers": answers})
    for name, records in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    return {task: str(folder / f"{task.split('_')[0]}.jsonl") for task in TASKS}


def recipe(copies: dict[str, str], stages: list[str], tasks: list[str]) -> dict[str, Any]:
    """The quickstart's phases, shortened, as only the evaluation is measured."""
    return {
        "evaluate.tasks": tasks,
        "evaluate.stages": stages,
        "evaluate.max_new_tokens": 16,
        "evaluate.local": {task: copies[task] for task in tasks},
        "phase1.data.0.take": 8,
        "phase2.data.0.take": 4,
        "phase2.replay": None,
        "heldout.rows": 2,
        "answers.prompts": 0,
        "merge.refuse_below": None,
    }


def evaluate(runs: str, copies: dict[str, str], stages: list[str], tasks: list[str]) -> dict[str, float]:
    """Seconds from the first evaluation to the last, and seconds of the loads, in this process."""
    import qcft
    import qcft.measure.suites  # takes seconds, which must not count as scoring
    from qcft.events import StepBegun, StepEnded
    from qcft.steps import suite

    spent = {"loads": 0.0}
    load = suite.Switched

    def begin(*arguments: Any) -> Any:
        begun = time.monotonic()
        try:
            return load(*arguments)
        finally:
            spent["loads"] += time.monotonic() - begun

    suite.Switched = begin
    plain = suite.load_model

    def timed(*arguments: Any) -> Any:
        begun = time.monotonic()
        try:
            return plain(*arguments)
        finally:
            spent["loads"] += time.monotonic() - begun

    suite.load_model = timed
    marks: list[float] = []

    def listen(event: object) -> None:
        if isinstance(event, (StepBegun, StepEnded)) and event.step.startswith("suite-"):
            marks.append(time.monotonic())

    qcft.run("quickstart", set=recipe(copies, stages, tasks), runs=runs, listener=listen)
    return {"whole": marks[-1] - marks[0] if marks else 0.0, **spent}


def child(runs: str, copies: dict[str, str], stages: list[str], tasks: list[str]) -> dict[str, float]:
    """`evaluate` in a new process."""
    arguments = json.dumps([runs, copies, stages, tasks])
    done = subprocess.run([sys.executable, __file__, "--child", arguments], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, print a table and then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child")
    given = parser.parse_args()
    if given.child:
        print(json.dumps(evaluate(*json.loads(given.child))))
        return
    stages = ["base", "merged", "phase2"]
    ratios, plain = [], []
    with tempfile.TemporaryDirectory() as place:
        copies = write_copies(Path(place), given.items)
        runs = f"{place}/runs"
        child(runs, copies, ["base"], ["hellaswag"])  # trains, and warms up
        print("one go, s   loads   single scorings, s   single loads   ratio")
        for _ in range(given.rounds):
            forget(Path(runs))
            together = child(runs, copies, stages, list(TASKS))
            forget(Path(runs))
            singles = [child(runs, copies, [stage], [task]) for stage in stages for task in TASKS]
            scoring = sum(one["whole"] - one["loads"] for one in singles)
            loads = sum(one["loads"] for one in singles)
            ratios.append(together["whole"] / (scoring + together["loads"]))
            plain.append((scoring + loads) / together["whole"])
            print(
                f"{together['whole']:9.1f} {together['loads']:7.1f} {scoring:20.1f} {loads:14.1f} {ratios[-1]:7.2f}",
                flush=True,
            )
    figures = {
        "one_go_over_singles_less_loads": {
            "value": round(median(ratios), 3), "unit": "x", "goal": 1.1, "met": median(ratios) <= 1.1
        },
        "singles_over_one_go": {"value": round(median(plain), 2), "unit": "x", "goal": None, "met": None},
    }  # fmt: skip
    print(json.dumps({"benchmark": "measure", "figures": figures, "machine": platform.platform()}))


def forget(runs: Path) -> None:
    """Remove the evaluations, so that they run again."""
    import shutil

    for step in (runs / ".steps").glob("suite-*"):
        shutil.rmtree(step)


if __name__ == "__main__":
    main()
