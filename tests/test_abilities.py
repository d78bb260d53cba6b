"""Abilities through lm-eval: its own numbers, one load for all that share weights, local copies, failures, tables."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from qcft import Interrupted, api
from qcft.events import StepBegun, StepEnded, Watch
from qcft.recipe import load_recipe, recipe_from
from qcft.steps import suite

from .helpers.tiny import write_rows

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
        rows.append(
            {"id": f"q{i}", "context": f"the cat is red {i}", "question": "what color\u2028is it", "answers": answer}
        )
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


def by_hand(task, data, limit, weights, adapter, folder):
    """What lm-eval says of a task that includes the original and reads local files, with a model loaded by
    transformers and PEFT alone."""
    import lm_eval.tasks
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qcft.measure.squad import stand_in

    stand_in()
    family = Path(lm_eval.tasks.__file__).parent / task.split("_")[0]
    (original,) = (file for file in family.rglob(f"{task}.yaml") if file.parent.name in {"default", family.name})
    config = {"include": str(original), "task": f"local_{task}", "dataset_path": "json", "dataset_name": None}
    (folder / f"local_{task}.yaml").write_text(yaml.safe_dump({**config, "dataset_kwargs": {"data_files": data}}))
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.bfloat16, quantization_config=nf4)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    return simple_evaluate(
        HFLM(pretrained=model, tokenizer=str(weights), batch_size=16),
        tasks=[f"local_{task}"],
        task_manager=TaskManager(include_defaults=False, include_path=folder),
        limit=limit,
        apply_chat_template=True,
        gen_kwargs="max_gen_toks=8",
        bootstrap_iters=0,
    )["results"][f"local_{task}"]


@pytest.mark.parametrize(("task", "stage"), [*((task, "phase2") for task in TASKS), ("hellaswag", "base")])
def test_scores_are_those_of_lm_eval_by_hand_to_the_digit(done, local, tiny_model, tmp_path, task, stage):
    data = dict.fromkeys(("train", "validation"), local[task])  # lm-eval asks for the shots of no shots
    if task == "mmlu_anatomy":
        rows = {"test": mmlu_rows("anatomy", 8), "dev": mmlu_rows("anatomy", 3)}
        data = {split: str(write_rows(tmp_path / f"{split}.jsonl", rows[split])) for split in rows}
    adapter, weights = None, tiny_model
    if stage == "phase2":
        adapter, weights = done.stages["phase2"].folder / "adapter", done.stages["merged"].folder / "model"
    wanted = by_hand(task, data, 6, weights, adapter, tmp_path)
    found = done.stages[f"abilities/{stage}/{task}"].metrics["scores"]
    assert found
    assert found == {key: wanted[f"{key},none"] for key in found}


def test_stages_are_scored_in_one_load_and_alone_the_same(recipe_file, shared_runs, done, tmp_path, monkeypatch):
    """Every stage once more, in another order and alone: other loads, other adapters before it, the same scores."""
    loads = []
    load = suite.load_model
    monkeypatch.setattr(suite, "load_model", lambda *a: loads.append(a[0]) or load(*a))
    runs = shutil.copytree(shared_runs, tmp_path / "runs", symlinks=True)
    for step in (runs / ".steps").glob("suite-*"):
        shutil.rmtree(step)
    chosen = {
        "evaluate.tasks": ["xquad_es"],
        "evaluate.local": {"xquad_es": load_recipe(recipe_file).evaluate.local["xquad_es"]},
    }
    stages = ["phase2", "phase1", "base", "merged"]
    again = api.run(recipe_file, set={**chosen, "evaluate.stages": stages}, runs=runs)
    assert len(loads) == 2  # phase2 and merged on the merged weights, phase1 and base on the unmodified model
    for stage in ("base", "merged", "phase2"):
        name = f"abilities/{stage}/xquad_es"
        assert again.stages[name].step == done.stages[name].step
        assert again.stages[name].metrics["scores"] == done.stages[name].metrics["scores"]
        items = [(found.stages[name].folder / "items.jsonl").read_text() for found in (again, done)]
        assert items[0] == items[1]
    loads.clear()
    api.run(recipe_file, set={**chosen, "evaluate.stages": stages}, runs=runs)
    assert not loads


def test_a_groups_limit_is_for_all_its_tasks_and_its_score_over_all_items(recipe_file, shared_runs, done, tmp_path):
    import lm_eval.tasks

    place = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    subjects = [yaml.safe_load(file.read_text())["dataset_name"] for file in place.glob("mmlu_*.yaml")]
    for split in ("test", "dev"):
        write_rows(tmp_path / "mmlu" / f"{split}.jsonl", [row for one in subjects for row in mmlu_rows(one, 3)])
    changes = {"tasks": ["mmlu"], "local": {"mmlu": str(tmp_path / "mmlu")}, "limit": 100, "stages": ["base-16bit"]}
    runs = shutil.copytree(shared_runs, tmp_path / "runs", symlinks=True)
    found = api.run(recipe_file, set={f"evaluate.{key}": value for key, value in changes.items()}, runs=runs)
    metrics = found.stages["abilities/base-16bit/mmlu"].metrics
    assert len(metrics["parts"]) == len(subjects) == 57
    assert metrics["items"] == 2 * 57  # 100 over 57 tasks, rounded up
    assert all(part["items"] == 2 for part in metrics["parts"].values())
    assert metrics["score"] == pytest.approx(sum(part["acc"] for part in metrics["parts"].values()) / 57)


def test_the_table(done):
    measured = done.table["abilities"]
    (table,) = measured["tables"]
    assert [(t["task"], t["side"]) for t in table["tasks"]] == [
        ("hellaswag", "EA"), ("mmlu_anatomy", "EA"), ("xquad_en", "EA"), ("xquad_es", "MA")
    ]  # fmt: skip
    assert [s["stage"] for s in table["stages"]] == ["base", "merged", "phase2"]
    for stage in table["stages"]:
        assert stage["EA"] == pytest.approx(sum(stage["scores"][t] for t in TASKS[:3]) / 3)
        assert stage["MA"] == stage["scores"]["xquad_es"]
        assert stage["overall"] == pytest.approx((stage["EA"] + stage["MA"]) / 2)
    change = table["changes"][0]
    assert change["overall"]["value"] == pytest.approx((change["EA"]["value"] + change["MA"]["value"]) / 2)
    assert (change["from"], change["to"]) == ("merged", "phase2")
    first, last = table["stages"][1:]
    for task in TASKS:
        entry = change["tasks"][task]
        assert entry["value"] == pytest.approx(last["scores"][task] - first["scores"][task])
        assert entry["clear"] == (entry["low"] is not None and (entry["low"] > 0 or entry["high"] < 0))
    assert change["EA"]["value"] == pytest.approx(last["EA"] - first["EA"])
    transfer = sum(last["scores"][t] - first["scores"][t] for t in TASKS[:3]) / 3
    assert table["continual"]["backward_transfer"] == pytest.approx(transfer)
    nll = {s["stage"]: s["groups"]["phase1 en"]["nll"] for s in done.table["stages"]}
    lost = nll["eval/phase2"] - nll["eval/phase1"]
    assert done.table["continual"] == pytest.approx({"backward_transfer": -lost, "forgetting": lost})
    assert [set(cell["languages"]) for cell in measured["fidelity"]] == [{"en", "es", "pt"}] * 3
    json.dumps(done.table)


def test_other_settings_are_other_tables_and_earlier_tasks_stay(qcft, done, recipe_file, shared_runs, local):
    flags = (
        "--task",
        "xquad_es",
        "--local",
        f"xquad_es={local['xquad_es']}",
        "--stage",
        "phase2",
        "--runs",
        shared_runs,
    )
    code, out, error = qcft("eval", done.name, *flags, "--limit", "4", "--json", "-q")
    assert code == 0, error
    tables = json.loads(out)["abilities"]["tables"]
    assert [sorted(t["task"] for t in table["tasks"]) for table in tables] == [TASKS, ["xquad_es"]]
    assert [s["stage"] for s in tables[1]["stages"]] == ["phase2"]
    assert next(s for s in tables[0]["stages"] if s["stage"] == "phase2")["MA"] is None  # it has its other tasks
    code, out, _ = qcft("report", done.name, "--runs", shared_runs)
    assert code == 0
    page = (shared_runs / done.name / "report" / "report.md").read_text()
    assert out.strip().endswith(str(shared_runs / done.name / "report" / "report.html"))
    assert "with different settings cannot be compared" in page
    assert "Backward transfer" in page
    code, out, _ = qcft("show", done.name, "--runs", shared_runs)
    assert "xquad_es" in out
    assert api.run(recipe_file, runs=shared_runs).table["abilities"] == done.table["abilities"]


def test_a_failing_task_does_not_stop_the_others_and_the_exit_code_is_1(qcft, recipe_file, shared_runs, done, tmp_path):
    rows = xquad_rows(8)
    rows[3]["answers"] = {"text": [], "answer_start": []}
    broken = write_rows(tmp_path / "broken.jsonl", rows)
    changes = [f"evaluate.local.xquad_en={broken}", "evaluate.stages=[base]"]
    flags = [flag for change in changes for flag in ("--set", change)]
    code, out, error = qcft("run", recipe_file, *flags, "--runs", shared_runs, "--json", "-q")
    assert code == 1
    assert "error: 1 evaluation failed: base/xquad_en" in error
    table = json.loads(out)["abilities"]["tables"][0]
    assert set(table["stages"][0]["scores"]) >= {"hellaswag", "xquad_es"}


def test_a_stopped_evaluation_resumes_after_the_last_finished_task(recipe_file, shared_runs, done, tmp_path):
    runs = shutil.copytree(shared_runs, tmp_path / "runs", symlinks=True)
    for step in (runs / ".steps").glob("suite-*"):
        shutil.rmtree(step)
    finished, states = [], {}

    def stop_after_two(event):
        if isinstance(event, StepEnded):
            finished.append(event.step)
            if len(finished) == 2:
                watch.ask_to_stop()

    watch = Watch(stop_after_two)
    with pytest.raises(Interrupted):
        api.run_watched(load_recipe(recipe_file), runs, watch)
    assert len(finished) == 2

    def listen(event):
        if isinstance(event, StepBegun):
            states[event.step] = event.state

    again = api.run(recipe_file, runs=runs, listener=listen)
    assert all(states[step] == "reused" for step in finished)
    for stage, found in done.stages.items():
        if stage.startswith("abilities/") and "scores" in found.metrics:
            assert again.stages[stage].metrics["scores"] == found.metrics["scores"]


@pytest.mark.parametrize(
    ("change", "says", "hint"),
    [
        ({"tasks": ["helaswag"]}, "no task 'helaswag'", "did you mean 'hellaswag'?"),
        (
            {"suites": ["multilingual"], "tasks": [], "languages": ["sp"]},
            "no task of the suites is in 'sp'",
            "they are in",
        ),
        ({"suites": ["englisch"]}, "englisch", ""),
        ({"stages": ["phase3"]}, "no stage 'phase3'", "did you mean"),
        ({"local": {"hellaswag": "nowhere.jsonl"}}, "no file 'nowhere.jsonl'", "folder of splits"),
        ({"local": {"helaswag": "odd.jsonl"}}, "not one of the tasks to evaluate", "did you mean 'hellaswag'?"),
        ({"tasks": ["hellaswag"], "local": {"hellaswag": "odd.jsonl"}}, "has no column 'ctx_a'", "on the hub"),
        ({"tasks": ["xquad_es"], "local": {"xquad_es": "odd.jsonl"}}, "has no column 'context'", "on the hub"),
        ({"tasks": ["xquad_es"], "local": {"xquad_es": "bare.jsonl"}}, "has no column 'answers'", "on the hub"),
        (
            {"tasks": ["mmlu_anatomy"], "local": {"mmlu_anatomy": "unanswered.jsonl"}},
            "no column 'answer'",
            "on the hub",
        ),
        ({"tasks": ["alpaca_eval"], "local": {"alpaca_eval": "bare.jsonl"}}, "no column 'instruction'", "context"),
        ({"tasks": ["hellaswag"], "local": {}}, "the data of hellaswag", "evaluate.local: {hellaswag: PATH}"),
        ({"tasks": ["alpaca_eval"], "local": {}}, "the data of alpaca_eval", "evaluate.local: {alpaca_eval: PATH}"),
        ({"tasks": ["mmlu_anatomy"], "shots": 2, "local": {"mmlu_anatomy": "anatomy.jsonl"}}, "no split 'dev'", "dev"),
        ({"limit": 0}, "evaluate.limit", ""),
    ],
)
def test_bad_input_is_two_lines_exit_2_and_nothing_written(qcft, recipe_file, tmp_path, change, says, hint):
    write_rows(tmp_path / "odd.jsonl", [{"foo": 1}])
    write_rows(tmp_path / "bare.jsonl", [{"context": "c", "question": "q"}])
    write_rows(tmp_path / "anatomy.jsonl", mmlu_rows("anatomy", 4))
    unanswered = [{key: row[key] for key in row if key != "answer"} for row in mmlu_rows("anatomy", 4)]
    write_rows(tmp_path / "unanswered.jsonl", unanswered)
    raw = yaml.safe_load(recipe_file.read_text())
    raw["evaluate"] |= change
    recipe_file.write_text(yaml.safe_dump(raw))
    code, out, error = qcft("run", str(recipe_file), "-q")
    assert code == 2
    assert out == ""
    lines = error.strip().splitlines()
    assert len(lines) == 2, error
    assert says in lines[0]
    assert hint in lines[1]
    assert not (tmp_path / "runs").exists()


def test_a_prompt_that_the_template_refuses_has_no_answer(raw_recipe, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "refuses")
    template = (model / "chat_template.jinja").read_text()
    refuse = "{% if messages[0]['content'] == 's' %}{{ raise_exception('no s') }}{% endif %}"
    (model / "chat_template.jinja").write_text(refuse + template)
    write_rows(tmp_path / "a.json", [{"instruction": text, "output": "red"} for text in ("s", "what color is the cat")])
    evaluate = {"tasks": ["alpaca_eval"], "local": {"alpaca_eval": str(tmp_path / "a.json")}, "max_new_tokens": 4}
    phase = {**raw_recipe["phases"][1], "replay": None, "freeze": "none", "train": {"steps": 1, "batch": 4}}
    raw = {**raw_recipe, "model": {"name": str(model)}, "phases": [phase], "evaluate": {**evaluate, "stages": ["base"]}}
    done = api.run(recipe_from(raw), runs=tmp_path / "runs")
    assert not done.failed
    (folder,) = (one.folder for stage, one in done.stages.items() if stage.endswith("alpaca_eval"))
    outputs = json.loads((folder / "model_outputs.json").read_text())
    assert [one["instruction"] for one in outputs] == ["what color is the cat"]


def test_copies_of_every_suite_and_the_languages_they_lack(tmp_path):
    """A task's language is not a subject, though its rows have subjects; each language that a task lacks is listed."""
    from qcft.measure.catalog import Catalog
    from qcft.recipe import Evaluate

    options = dict(zip(("option_a", "option_b", "option_c", "option_d"), NUMBERS, strict=True))
    row = {"subject": "anatomy", "question": "what number", "answer": "B", **options}
    kinds = ["Business", "Humanities", "Medical", "Other", "STEM", "Social Sciences"]
    write_rows(tmp_path / "global.jsonl", [{**row, "subject_category": kind} for kind in kinds])
    write_rows(tmp_path / "xquad.jsonl", xquad_rows(2))
    write_rows(tmp_path / "xlsum.jsonl", [{"text": "the cat runs", "summary": "cat"}])
    files = {"mlqa_es_es": "xquad", "xquad_es": "xquad", "xlsum_es": "xlsum", "global_mmlu_es": "global"}
    local = {task: str(tmp_path / f"{file}.jsonl") for task, file in files.items()}
    catalog = Catalog(Evaluate(suites=["multilingual"], local=local), Watch())
    paper = ("fr", "ar", "de", "es", "id", "ja", "ko", "pt-BR", "ru", "th", "vi")
    chosen = catalog.choose(paper)
    assert set(chosen.lacking) == {"fr", "de", "id", "ja", "ko", "pt", "ru", "th", "vi"}
    assert chosen.lacking["pt"] == ("mlqa_pt_pt", "xquad_pt")
    assert {f"xlsum_{lang[:2]}" for lang in paper} - set(chosen.tasks) == {"xlsum_de"}
    for task in files:
        catalog.check(task)
    assert sum(len(task.eval_docs) for task in catalog.load("global_mmlu_es")["tasks"].values()) == 6


def test_nothing_to_evaluate_is_reported(qcft, done, shared_runs, recipe_file):
    raw = yaml.safe_load(recipe_file.read_text()) | {"name": "bare", "evaluate": {}}
    recipe_file.write_text(yaml.safe_dump(raw))
    qcft("run", str(recipe_file), "--runs", shared_runs, "-q")
    code, _, error = qcft("eval", "bare", "--runs", shared_runs)
    assert code == 2
    assert "--suite english" in error
    code, _, error = qcft("eval", "bare", "--local", "xquad_es", "--runs", shared_runs)
    assert code == 2
    assert "not TASK=PATH" in error
