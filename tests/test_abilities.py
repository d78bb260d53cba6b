"""Abilities through lm-eval: its own numbers, one load, local copies, what fails and what goes on."""

import json

import pytest

from qcft import api
from qcft.recipe import recipe_from

from .conftest import write_rows

pytest.importorskip("lm_eval")

QUESTIONS = ("what color is the cat", "what animal runs", "a dog is a number", "one two three four")


def xquad_rows(count: int) -> list[dict]:
    rows = []
    for i in range(count):
        answer = {"text": [("red", "blue", "green")[i % 3]], "answer_start": [0]}
        rows.append({"id": f"q{i}", "context": f"the cat is red {i}", "question": QUESTIONS[i % 4], "answers": answer})
    return rows


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Local copies of a few rows with the hub's columns."""
    folder = tmp_path_factory.mktemp("copies")
    ends = ["cat runs", "dog eats the red bird", "bird", "a number one two"]
    hellaswag = [
        {"activity_label": "Cats", "ctx_a": f"the cat number {i}", "ctx_b": "it", "endings": ends, "label": str(i % 4)}
        for i in range(12)
    ]
    mmlu = [
        {"question": f"what number is {i}", "subject": subject, "choices": ["one", "two", "three", "four"], "answer": i % 4}
        for subject in ("anatomy", "virology")
        for i in range(6)
    ]
    write_rows(folder / "hellaswag.jsonl", hellaswag)
    write_rows(folder / "mmlu" / "test.jsonl", mmlu)
    write_rows(folder / "mmlu" / "dev.jsonl", mmlu[::2])
    write_rows(folder / "xquad_es.jsonl", xquad_rows(8))
    write_rows(folder / "xquad_en.jsonl", xquad_rows(8))
    return folder


@pytest.fixture
def evaluated(raw_recipe, copies):
    """The tiny recipe, evaluated on four tasks."""
    evaluate = {
        "tasks": ["hellaswag", "mmlu_anatomy", "xquad_en", "xquad_es", "fidelity"],
        "limit": 6,
        "max_new_tokens": 8,
        "local": {
            "hellaswag": str(copies / "hellaswag.jsonl"),
            "mmlu_anatomy": str(copies / "mmlu"),
            "xquad_en": str(copies / "xquad_en.jsonl"),
            "xquad_es": str(copies / "xquad_es.jsonl"),
        },
        "fidelity": {"prompts": 3, "max_new_tokens": 8},
    }
    return {**raw_recipe, "evaluate": evaluate}


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory):
    return tmp_path_factory.mktemp("shared") / "runs"


def test_every_stage_is_evaluated_on_every_task(evaluated, shared_runs):
    done = api.run(recipe_from(evaluated), runs=shared_runs)
    assert not done.failed
    stages = [stage for stage in done.stages if stage.startswith("abilities/")]
    assert len(stages) == 15
    print(json.dumps({s: done.stages[s].metrics for s in stages}, indent=1, default=str)[:3000])
