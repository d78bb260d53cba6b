"""`qcft init`: the recipe it writes is one that `qcft check` accepts; what it is given wrong, it refuses at once."""

import re
import shutil

import pytest
import yaml

from qcft.recipe import expand_ablation, load_recipe, read_recipe
from qcft.recipe.own import suggested_model

from .helpers.bad_input import check_refused
from .helpers.tiny import write_rows
from .test_answers import Terminal

GB = 1 << 30


@pytest.fixture
def place(tiny_model, color_data, tmp_path, monkeypatch):
    """The working folder, with a model and data in three languages."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny_model, tmp_path / "tiny")
    for lang in ("en", "es", "pt"):
        shutil.copyfile(color_data / f"{lang}.jsonl", tmp_path / f"{lang}.jsonl")
    (tmp_path / "folder").mkdir()
    (tmp_path / "odd.jsonl").write_text('{"foo": 1}\n')
    (tmp_path / "dangling").symlink_to("nowhere")
    return tmp_path


DATA = ("--data", "es=es.jsonl", "--data", "pt=pt.jsonl")


def test_what_is_written_passes_check_and_says_what_each_key_is(place, qcft):
    given = ("--phase1", "en.jsonl", "--replay", "0.1", "--freeze", "first:1", "--vram", "8GB", "--name", "mine")
    code, out, err = qcft("init", "--model", "tiny", *DATA, *given, "-o", "my recipe.yaml")
    assert (code, out) == (0, "")
    assert err.splitlines()[-3:] == [
        "wrote 'my recipe.yaml'", "next: qcft check 'my recipe.yaml' --vram 8GB", "next: qcft run 'my recipe.yaml'"
    ]  # fmt: skip
    text = (place / "my recipe.yaml").read_text()
    keys = [line for line in text.splitlines() if re.match(r" *(- )?\w+: ", line) and not line.startswith("version")]
    assert keys
    assert all(" # " in line for line in keys)
    assert str(place) not in text  # the folder can be moved
    recipe = load_recipe("my recipe.yaml")
    assert recipe.name == "mine"
    assert recipe.model.name == str(place / "tiny")
    assert [[(source.path, source.lang) for source in phase.data] for phase in recipe.phases] == [
        [(str(place / "en.jsonl"), "en")], [(str(place / f"{lang}.jsonl"), lang) for lang in ("es", "pt")]
    ]  # fmt: skip
    assert (recipe.phases[1].replay.ratio, recipe.phases[1].freeze.text) == (0.1, "first:1")
    code, out, err = qcft("check", "my recipe.yaml", "--rows", "0")
    assert code == 0, err
    raw, folder = read_recipe("my recipe.yaml")
    head, _, arms = text.partition("# ablation:")
    (place / "arms.yaml").write_text(head + re.sub("^# ", "", "# ablation:" + arms, flags=re.MULTILINE))
    raw, folder = read_recipe("arms.yaml")
    assert len(expand_ablation(raw, folder=folder)[1]) == 3 * 5


def test_an_unmodified_model_and_a_recipe_that_already_exists(place, qcft):
    code, _, err = qcft("init", "--model", "tiny", "--data", "no=es.jsonl")
    assert code == 0, err
    raw = yaml.safe_load((place / "recipe.yaml").read_text())
    assert raw["name"] == "add-no"
    assert [phase["data"] for phase in raw["phases"]] == [[{"path": "es.jsonl", "lang": "no"}]]
    check_refused(qcft, place, ["init", "--model", "tiny", *DATA], "'recipe.yaml' already exists")
    assert qcft("init", "--model", "tiny", *DATA, "--force")[0] == 0
    assert load_recipe("recipe.yaml").name == "add-es-pt"


def test_it_asks_in_a_terminal_and_asks_again(place, monkeypatch):
    monkeypatch.chdir(place)
    with Terminal("init", "--replay", "0") as terminal:
        for question, answers in {
            "Memory of the GPU": ["8", "8GB"],
            "Model": ["nowhere.gguf", "tiny"],
            "English data of a phase 1": [""],
            "Data in other languages": ["es.jsonl", "'es=es.jsonl", "es=odd.jsonl", "es=es.jsonl pt=pt.jsonl"],
        }.items():
            for answer in answers:
                asked = terminal.until(f"{question}") + terminal.until("]: ")
                terminal.type(f"{answer}\n")
            assert ("[HuggingFaceTB/SmolLM2-1.7B-Instruct]" in asked) == (question == "Model")
        seen = terminal.until("next: qcft run recipe.yaml")
        assert "next: qcft check recipe.yaml --vram 8GB" in seen
    recipe = load_recipe(place / "recipe.yaml")
    assert [source.lang for phase in recipe.phases for source in phase.data] == ["es", "pt"]


def test_an_end_of_input_in_a_terminal_writes_nothing(place):
    with Terminal("init") as terminal:
        terminal.until("Memory of the GPU")
        terminal.type("\x04")
        terminal.until("nothing is written")
        assert terminal.process.wait(60) == 2
    assert not (place / "recipe.yaml").exists()


def test_models_are_suggested_by_the_cards_memory():
    found = [suggested_model(size) for size in (None, 2 * GB, 8 * GB, 12 * GB, 24 * GB)]
    assert found[0] == found[1] == "smollm2-135m-instruct"
    assert found[2] != found[1]
    assert found[3] != found[2]


def given(*more, model="tiny", data=DATA):
    return ["init", "--model", model, *data, *more]


BAD = {
    "no model where nobody is asked": (["init", *DATA], "init needs --model, as there is no terminal"),
    "no data where nobody is asked": (["init", "--model", "tiny"], "init needs --data, as there is no terminal"),
    "nothing where nobody is asked": (["init"], "init needs --model and --data"),
    "a model that is nowhere": (given(model="nowhere.gguf"), "there is no file or folder"),
    "a model of another name": (given(model="smollm2-135m-instuct"), "is not an embedded model"),
    "a folder without a model": (given(model="folder"), "holds no model"),
    "data that is nowhere": (given(data=("--data", "es=nowhere.jsonl")), "there is no file 'nowhere.jsonl'"),
    "data without a language": (given(data=("--data", "es.jsonl")), "'es.jsonl' names no language"),
    "data in a language that is none": (given(data=("--data", "spanish=es.jsonl")), "is not a language code"),
    "data of no known form": (given(data=("--data", "es=odd.jsonl")), "no known format"),
    "data that does not ship": (given(data=("--data", "es=qcft:passages/xx")), "no data named"),
    "a phase 1 on nothing": (given("--phase1", "nowhere.jsonl"), "there is no file 'nowhere.jsonl'"),
    "more replay than the mix": (given("--replay", "1"), "outside [0, 0.9]"),
    "replay that is not a number": (given("--replay", "nan"), "replay"),
    "a freeze spec nobody has": (given("--freeze", "frist:2"), "'frist:2'"),
    "a card without a unit": (given("--vram", "8"), "--vram '8' is not a size"),
    "a name with a slash": (given("--name", "a/b"), "cannot name a run"),
    "a folder to write to": (given("--to", "folder"), "is a folder"),
    "a place in no folder": (given("--to", "nowhere/recipe.yaml"), "there is no folder 'nowhere'"),
    "a link that leads nowhere": (given("--to", "dangling"), "is a link that leads nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_refused_before_anything_is_written(case, place, qcft):
    arguments, says = BAD[case]
    check_refused(qcft, place, arguments, says)


def test_rows_of_which_none_can_be_held_out_are_reported_at_once(place, qcft):
    write_rows(place / "one.jsonl", [{"instruction": "a", "output": "b"}])
    check_refused(qcft, place, given(data=("--data", "es=one.jsonl")), "held-out share")
