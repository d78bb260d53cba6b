"""The suites read their data from a hub: `qcft eval` as the documents show it, on a hub of this machine that has a few
rows of each data set, in the layout and with the columns of the real one."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qcft import api

from .helpers.fake_hub import FakeHub
from .helpers.tiny import WORDS, write_rows
from .test_abilities import hellaswag_rows, mmlu_rows, xquad_rows

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("nltk")
pyarrow = pytest.importorskip("pyarrow")

ROOT = Path(__file__).parents[1]
CONVERTED = "refs/convert/parquet"
EVAL = shlex.split("eval spanish --suite english --suite multilingual --limit 200")


def with_configs(folder, ways):
    """The card that says to `datasets` which files each configuration has: {name: {split: path}}."""
    configs = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in files.items()]}
        for name, files in ways.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")


def converted(folder, config, splits):
    """A configuration as the hub converts it: CONFIG/SPLIT/0000.parquet, and no card."""
    import pyarrow.parquet as parquet

    for split, rows in splits.items():
        (folder / config / split).mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / config / split / "0000.parquet")


def subjects():
    """MMLU's subjects, by lm-eval's files."""
    for file in (Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default").glob("mmlu_*.yaml"):
        yield yaml.safe_load(file.read_text())["dataset_name"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    place = tmp_path_factory.mktemp("hub")
    folders = {}
    instruction = {"instruction_id_list": ["length_constraints:number_words"]}
    rows = [{"key": 1, "prompt": "the cat runs", **instruction, "kwargs": [{"relation": "less than", "num_words": 9}]}]
    folders["google/IFEval"] = write_rows(place / "ifeval" / "train.jsonl", rows).parent
    for split in ("train", "validation"):
        write_rows(place / "hellaswag" / "data" / f"{split}.jsonl", hellaswag_rows(4))
    folders["Rowan/hellaswag"] = place / "hellaswag"
    for subject in subjects():
        write_rows(place / "mmlu" / subject / "test.jsonl", mmlu_rows(subject, 1))
        write_rows(place / "mmlu" / subject / "dev.jsonl", mmlu_rows(subject, 5))
    ways = {one: {split: f"{one}/{split}.jsonl" for split in ("test", "dev")} for one in subjects()}
    with_configs(place / "mmlu", ways)
    folders["cais/mmlu"] = place / "mmlu"
    write_rows(place / "alpaca" / "alpaca_eval.json", [{"instruction": "what color is the cat", "output": "red"}])
    folders["tatsu-lab/alpaca_eval"] = place / "alpaca"
    for lang in ("en", "es"):
        write_rows(place / "xquad" / f"xquad.{lang}" / "validation.jsonl", xquad_rows(3))
    ways = {f"xquad.{lang}": {"validation": f"xquad.{lang}/validation.jsonl"} for lang in ("en", "es")}
    with_configs(place / "xquad", ways)
    folders["google/xquad"] = place / "xquad"
    options = {f"option_{letter}": word for letter, word in zip("abcd", WORDS.split(), strict=False)}
    kinds = ["Business", "Humanities", "Medical", "Other", "STEM", "Social Sciences"]
    rows = [{"question": "what number", "answer": "B", **options, "subject_category": kind} for kind in kinds]
    for lang, split in [(lang, split) for lang in ("es", "pt") for split in ("test", "dev")]:
        write_rows(place / "global" / lang / f"{split}.jsonl", rows)
    with_configs(place / "global", {one: {s: f"{one}/{s}.jsonl" for s in ("test", "dev")} for one in ("es", "pt")})
    # The name before and after its owner was renamed; the hub answers to both, and lm-eval asks by both.
    folders["CohereLabs/Global-MMLU-Lite"] = folders["CohereForAI/Global-MMLU-Lite"] = place / "global"
    # Scripts, which `datasets` no longer runs, and on another branch what the hub made of them.
    for name in ("csebuetnlp/xlsum", "facebook/mlqa"):
        script = place / "scripts" / name.split("/")[1]
        script.mkdir(parents=True)
        (script / f"{script.name}.py").write_text("raise SystemExit('a script ran')\n")
        folders[name] = script
    news = [
        {"id": "1", "text": "the cat runs", "summary": "cat"},
        {"id": "2", "text": "the dog eats", "summary": "dog"},
    ]
    for config in ("english", "spanish", "portuguese"):
        converted(place / "xlsum", config, {"train": news, "validation": news, "test": news[:1]})
    folders["csebuetnlp/xlsum", CONVERTED] = place / "xlsum"
    converted(place / "mlqa", "mlqa.es.es", {"test": xquad_rows(3), "validation": xquad_rows(1)})
    converted(place / "mlqa", "mlqa.de.de", {"test": xquad_rows(5), "validation": xquad_rows(5)})
    folders["facebook/mlqa", CONVERTED] = place / "mlqa"
    hub = FakeHub(datasets=folders)
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def punkt(tmp_path_factory):
    """NLTK's sentence splitter, trained on nothing."""
    folder = tmp_path_factory.mktemp("nltk")
    english = folder / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (english / name).touch()
    return folder


def test_the_documented_suites_from_a_hub(hub, punkt, raw_recipe, tmp_path):
    raw_recipe["name"] = "spanish"
    raw_recipe["evaluate"] = {"max_new_tokens": 8, "fidelity": {"prompts": 2, "max_new_tokens": 8}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw_recipe))
    api.run(tmp_path / "recipe.yaml", runs=tmp_path / "runs")
    places = {"HF_HOME": str(tmp_path / "hf"), "NLTK_DATA": str(punkt), "PYTHONPATH": str(ROOT)}
    answers = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "qcft", *EVAL, "--json"],
        env={**os.environ, **places, **answers}, cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (table,) = json.loads(done.stdout)["abilities"]["tables"]
    assert {task["task"]: task["items"] for task in table["tasks"]} == {
        "ifeval": 1, "hellaswag": 4, "mmlu": 57, "xlsum_en": 1, "mlqa_es_es": 3, "xquad_es": 3, "xlsum_es": 1,
        "xlsum_pt": 1, "global_mmlu_es": 6, "global_mmlu_pt": 6,
    }  # fmt: skip
    assert [len(stage["scores"]) for stage in table["stages"]] == [10] * 3  # base, merged, phase2
    assert "pt is not evaluated" in done.stderr  # MLQA and XQuAD have no Portuguese
