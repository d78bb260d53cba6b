"""Abilities through lm-eval: its own numbers, one load for all that share weights, local copies, failures, tables."""

import pytest
import yaml

from qcft import api

from .conftest import write_rows

pytest.importorskip("lm_eval")

NUMBERS = ["one", "two", "three", "four"]
ENDINGS = ["cat runs", "dog eats the red bird", "bird", "a number one two"]
TASKS = ["hellaswag", "mmlu_anatomy", "xquad_en", "xquad_es"]


def hellaswag_rows(count: int) -> list[dict]:
    row = {"activity_label": "Cats", "ctx_b": "it", "endings": ENDINGS}
    return [{**row, "ctx_a": f"the cat number {i}", "label": str(i % 4)} for i in range(count)]


def mmlu_rows(subject: str, count: int) -> list[dict]:
    row = {"subject": subject, "choices": NUMBERS}
    return [{**row, "question": f"{subject}: what number is {i}", "answer": i % 4} for i in range(count)]


def xquad_rows(count: int) -> list[dict]:
    rows = []
    for i in range(count):
        answer = {"text": [("red", "blue", "green")[i % 3]], "answer_start": [0]}
        rows.append({"id": f"q{i}", "context": f"the cat is red {i}", "question": "what color", "answers": answer})
    return rows


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Local copies of a few rows with the hub's columns."""
    folder = tmp_path_factory.mktemp("copies")
    write_rows(folder / "hellaswag.jsonl", hellaswag_rows(12))
    for split, count in (("test", 8), ("dev", 3)):
        write_rows(folder / "mmlu" / f"{split}.jsonl", mmlu_rows("anatomy", count) + mmlu_rows("virology", 2))
    write_rows(folder / "xquad.jsonl", xquad_rows(8))
    copies = {"hellaswag": "hellaswag.jsonl", "mmlu_anatomy": "mmlu", "xquad_en": "xquad.jsonl"}
    return {task: str(folder / name) for task, name in {**copies, "xquad_es": "xquad.jsonl"}.items()}


@pytest.fixture
def recipe_file(raw_recipe, local, tmp_path):
    """The tiny recipe, evaluated on four tasks and on the language of its answers."""
    fidelity = {"prompts": 3, "max_new_tokens": 8}
    evaluate = {"tasks": [*TASKS, "fidelity"], "limit": 6, "max_new_tokens": 8, "local": local, "fidelity": fidelity}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**raw_recipe, "evaluate": evaluate}))
    return path


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory):
    return tmp_path_factory.mktemp("shared") / "runs"


@pytest.fixture
def done(recipe_file, shared_runs):
    return api.run(recipe_file, runs=shared_runs)


def by_hand(task, copies, limit, batch=16, **model):
    """What `lm_eval` says, with its own loader, of a task that includes the original and reads local data."""
    import lm_eval.tasks
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from qcft.measure.squad import stand_in

    stand_in()
    family = task.split("_")[0]
    place = next(f for f in lm_eval.tasks.__path__ for f in [f"{f}/{family}"])
    original = {"mmlu": f"{place}/default/{task}.yaml"}.get(family, f"{place}/{task}.yaml")
    config = {"include": original, "task": f"local_{task}", "dataset_path": "json", "dataset_name": None, **copies}
    folder = copies["dataset_kwargs"].pop("place")
    (folder / f"local_{task}.yaml").write_text(yaml.safe_dump(config))
    return simple_evaluate(
        model="hf",
        model_args={"dtype": "bfloat16", **model},
        tasks=[f"local_{task}"],
        task_manager=TaskManager(include_defaults=False, include_path=folder),
        device="cpu",
        batch_size=batch,
        limit=limit,
        apply_chat_template=True,
        gen_kwargs={"max_gen_toks": 8},
        bootstrap_iters=0,
    )["results"][f"local_{task}"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("stage", ["base", "phase2"])
def test_scores_are_those_of_lm_eval_by_hand_to_the_digit(done, local, tiny_model, tmp_path, task, stage):
    import torch
    from transformers import BitsAndBytesConfig

    if task == "mmlu_anatomy":
        for split in ("test", "dev"):
            write_rows(tmp_path / f"{split}.jsonl", mmlu_rows("anatomy", 8 if split == "test" else 3))
        files = {split: str(tmp_path / f"{split}.jsonl") for split in ("test", "dev")}
    else:
        files = {"validation": local[task]}
    adapter = {"peft": str(done.stages["phase2"].folder / "adapter")} if stage == "phase2" else {}
    weights = done.stages["merged"].folder / "model" if stage == "phase2" else tiny_model
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    copies = {"dataset_kwargs": {"data_files": files, "place": tmp_path}}
    wanted = by_hand(task, copies, 6, pretrained=str(weights), quantization_config=nf4, **adapter)
    found = done.stages[f"abilities/{stage}/{task}"].metrics["scores"]
    assert found == {key: wanted[f"{key},none"] for key in found}
    assert found
