"""Recipes: reading, changing, validating; the error of each mistake."""

import pytest

from qcft import InputError
from qcft.recipe import built_in_recipes, load_recipe, parse_assignments, recipe_from

RAW = {
    "name": "x",
    "model": {"name": "m"},
    "phases": [
        {"name": "phase1", "data": [{"path": "a.jsonl", "lang": "en"}]},
        {"name": "phase2", "data": [{"path": "{lang}.jsonl", "lang": ["es", "pt"]}]},
    ],
}


def test_set_addresses_phases_by_name_and_creates_what_is_null():
    recipe = recipe_from(RAW, parse_assignments(["phase2.replay.ratio=0.2", "phase1.train.lr=2e-4", "seed=3"]))
    assert recipe.phase("phase2").replay.ratio == 0.2
    assert recipe.phase("phase1").train.lr == 2e-4  # PyYAML reads 2e-4 as text
    assert recipe.seed == 3


def test_null_removes_a_phase_or_a_part():
    assert [p.name for p in recipe_from(RAW, {"phase1": None}).phases] == ["phase2"]
    replayed = recipe_from(RAW, {"phase2.replay.ratio": 0.1}).model_dump(mode="json")
    assert recipe_from(replayed, {"phase2.replay": None}).phase("phase2").replay is None


def test_a_mapping_of_phases_is_a_list_in_order():
    raw = {**RAW, "phases": {"phase1": {"adapter": "there"}, "phase2": {"data": [{"path": "a"}]}}}
    assert [p.name for p in recipe_from(raw).phases] == ["phase1", "phase2"]
    assert recipe_from(raw).phases[0].adapter == "there"


def test_a_source_per_language():
    sources = recipe_from(RAW).phase("phase2").sources()
    assert [(s.path, s.lang) for s in sources] == [("es.jsonl", "es"), ("pt.jsonl", "pt")]


def test_a_resolved_recipe_reads_back_as_itself():
    recipe = recipe_from(RAW, {"phase2.replay.ratio": 0.2, "phase2.freeze": "first:0.5"})
    back = recipe_from(recipe.model_dump(mode="json"))
    assert back == recipe
    assert back.model_dump_json() == recipe.model_dump_json()  # 32 and 32.0 are equal, but not in a step's id


def test_a_key_may_lead_into_what_was_just_set_in_short():
    changes = ["model=other", "model.chat_template=chatml", "phase2.replay=0.3", "phase2.replay.kind=phase1",
               "phase2.data=x.jsonl", "phase2.data.0.take=5"]  # fmt: skip
    recipe = recipe_from(RAW, parse_assignments(changes))
    assert (recipe.model.name, recipe.model.chat_template) == ("other", "chatml")
    phase = recipe.phases[1]
    assert (phase.replay.ratio, phase.replay.kind) == (0.3, "phase1")
    assert (phase.data[0].path, phase.data[0].take) == ("x.jsonl", 5)


def test_paths_of_a_model_and_its_base_are_relative_to_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "sub" / "m").mkdir(parents=True)
    (tmp_path / "sub" / "b").mkdir()
    (tmp_path / "sub" / "r.yaml").write_text("{name: x, model: {name: m, base: b}, phases: [{name: phase2, data: a}]}")
    monkeypatch.chdir(tmp_path)
    model = load_recipe("sub/r.yaml").model
    assert (model.name, model.base) == (str(tmp_path / "sub" / "m"), str(tmp_path / "sub" / "b"))


def test_an_anchor_in_short_and_at_length():
    def anchor(*changes):
        return recipe_from(RAW, parse_assignments(changes)).phases[1].anchor

    assert anchor() is None
    assert str(anchor("phase2.anchor=target-masked")) == str(anchor("phase2.anchor={}")) == "target-masked:1"
    assert str(anchor("phase2.anchor=kl")) == str(anchor("phase2.anchor.kind=kl")) == "kl:0.01"
    assert str(anchor("phase2.anchor=kl:0.5", "phase2.anchor.kind=target-masked")) == "target-masked:0.5"
    assert str(anchor("phase2.anchor=kl", "phase2.anchor.weight=0")) == "kl:0"
    assert anchor("phase2.anchor=kl", "phase2.anchor=null") is None
    kept = recipe_from(RAW, {"phase2.anchor": "kl"}).model_dump(mode="json")
    assert str(recipe_from(kept, {"phase2.anchor.kind": "target-masked"}).phases[1].anchor) == "target-masked:1"


@pytest.mark.parametrize(
    ("change", "says", "hints"),
    [
        ("phase2.train.lrr=1", "unknown key 'phase2.train.lrr'", "did you mean 'lr'"),
        ("phase2.frezee=first:2", "unknown key 'phase2.frezee'", "did you mean 'freeze'"),
        ("phase2.data.0.pth=x", "unknown key 'phase2.data.0.pth'", "did you mean 'path'"),
        ("modle.name=x", "no phase or recipe key 'modle'", "did you mean 'model'"),
        ("phase3.freeze=none", "no phase or recipe key 'phase3'", "phases: phase1, phase2"),
        ("phase2.replay.ratio=0.95", "phase2.replay.ratio: 0.95 is outside [0, 0.9]", "share"),
        ("phase2.replay.ratio=-0.1", "outside [0, 0.9]", "share"),
        ("phase2.train.lr=fast", "phase2.train.lr: 'fast'", "number"),
        ("phase2.train.lr=true", "phase2.train.lr", "number"),
        ("phase2.train.lr=0", "greater than 0", ""),
        ("phase2.train.batch=2.5", "phase2.train.batch", ""),
        ("phase2.data=[]", "phase 'phase2' has no data", "path"),
        ("phase2.adapter=x", "both data and an adapter", ""),
        ("phase2.anchor=kll", "there is no anchor 'kll'", "target-masked or kl"),
        ("phase2.anchor=kl:much", "phase2.anchor.weight: 'much'", "number"),
        ("phase2.anchor=0.5", "phase2.anchor: 0.5 is not an anchor", "{kind: kl, weight: 0.01}"),
        ("phase2.anchor=[kl]", "phase2.anchor: ['kl'] is not an anchor", "null for none"),
        ("phase2.anchor={kind: [kl]}", "there is no anchor ['kl']", "target-masked or kl"),
        ("phase2.anchor.weight=-1", "phase2.anchor.weight: -1 is below 0", "0, which only measures"),
        ("phase2.anchor.weight=true", "phase2.anchor.weight", "number"),
        ("phase2.anchor.wait=1", "unknown key 'phase2.anchor.wait'", "did you mean 'weight'"),
        ("phase1={adapter: x, anchor: kl}", "made elsewhere and not trained", "omit its anchor"),
        ("phase2.replay={ratio: 0, loss: distil}", "loss: distil with ratio 0 has no rows", "ratio"),
        ("phase2.replay={ratio: 0.1, loss: destil}", "phase2.replay.loss: 'destil'", "answer"),
        ("name=a/b", "'a/b' cannot name a run", "no slash"),
        ("phase2.freeze=firts:2", "is not a freeze spec", "first"),
        ("phase2.train.sft={packing: true}", "packing is set by qcft", "train.packing"),
        ("phase2.train.sft={learning_rate: 1}", "learning_rate is set by qcft", "train.lr"),
        ("phase2.data.4.take=1", "'4' is not an entry", "0 to 0"),
        ("model.name.x=3", "nothing can be set below", ""),
        ("version=2", "version", "1"),
        ("phases=[]", "phases", ""),
    ],
)
def test_a_mistake_is_named(change, says, hints):
    with pytest.raises(InputError) as error:
        recipe_from(RAW, parse_assignments([change]))
    assert says in error.value.message
    assert "\n" not in error.value.message
    assert error.value.hint
    assert hints in error.value.hint


def test_set_without_a_value():
    with pytest.raises(InputError, match="not KEY=VALUE"):
        parse_assignments(["phase2.replay.ratio"])


def test_names_of_phases_are_unique_and_not_qcfts_own_words():
    for name in ("phase1", "model", "a/b"):
        raw = {**RAW, "phases": [RAW["phases"][0], {**RAW["phases"][1], "name": name}]}
        with pytest.raises(InputError):
            recipe_from(raw)


def test_a_key_written_twice_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: a\nname: b\nmodel: {name: m}\nphases: [{name: p, data: [{path: x}]}]\n")
    with pytest.raises(InputError, match="'name' is given twice"):
        load_recipe(path)


def test_data_beside_the_recipe_is_found_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_text("{}")
    (tmp_path / "d" / "r.yaml").write_text("name: a\nmodel: {name: m}\nphases: [{name: p, data: [{path: a.jsonl}]}]\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("d/r.yaml").phases[0].data[0].path == str(tmp_path / "d" / "a.jsonl")


@pytest.mark.parametrize("name", list(built_in_recipes()))
def test_built_in_recipes_are_valid_and_say_what_they_do(name):
    assert load_recipe(name).name == name
    assert built_in_recipes()[name].read_text(encoding="utf-8").startswith("# ")


def test_shorthands_are_found_beside_the_recipe_too(tmp_path, monkeypatch):
    folder = tmp_path / "d"
    (folder / "es").mkdir(parents=True)
    for name in ("a.jsonl", "es/train.jsonl", "m"):
        (folder / name).write_text("")
    (folder / "r.yaml").write_text(
        "name: a\nmodel: m\nphases:\n  one: a.jsonl\n  two: {data: [{path: '{lang}/train.jsonl', lang: [es, pt]}]}\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("d/r.yaml")
    assert recipe.model.name == str(folder / "m")
    assert recipe.phases[0].data[0].path == str(folder / "a.jsonl")
    assert recipe.phases[1].data[0].path == str(folder / "{lang}" / "train.jsonl")


def test_paths_that_are_set_are_kept_absolute(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    assert recipe_from(RAW, {"phase2.data": "x.jsonl"}).phase("phase2").data[0].path == str(tmp_path / "x.jsonl")


def test_numbers_yaml_reads_as_text_are_numbers_for_trl():
    recipe = recipe_from(RAW, parse_assignments(["phase2.train.sft={adam_epsilon: 1e-9, weight_decay: 1e-2}"]))
    assert recipe.phase("phase2").train.sft == {"adam_epsilon": 1e-9, "weight_decay": 1e-2}


def test_no_recipe(tmp_path):
    with pytest.raises(InputError, match="no recipe 'quickstrat'") as error:
        load_recipe("quickstrat")
    assert "quickstart" in error.value.hint
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(InputError, match="not readable as YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(InputError, match="mapping"):
        load_recipe(tmp_path / "list.yaml")


def written(folder, more, **changed):
    """A recipe file of three phases, with some lines of its own."""
    lines = {
        "name": "a",
        "model": "m",
        "phases": "\n  one: {data: {path: x.jsonl, lang: en}, train: &t {lr: 1.0e-5, batch: 3}}",
        **changed,
    }
    file = folder / "r.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()) + more, encoding="utf-8")
    return file


def test_merge_keys(tmp_path):
    file = written(
        tmp_path,
        "  two: &u {data: {path: y.jsonl, lang: es}, train: {<<: *t, lr: 1.0e-6}}\n"
        "  three: {<<: *u, train: {<<: [*t], batch: 2}}\n",
    )
    one, two, three = load_recipe(file).phases
    assert [(p.train.lr, p.train.batch) for p in (one, two, three)] == [(1e-5, 3), (1e-6, 3), (1e-5, 2)]
    assert three.data == two.data
    with pytest.raises(InputError, match="'lr' is given twice"):
        load_recipe(written(tmp_path, "  two: {data: y.jsonl, train: {<<: *t, lr: 1, lr: 2}}\n"))


def test_merges_of_merges_are_limited(tmp_path):
    levels = "".join(
        f"x{i + 1}: &x{i + 1} {{<<: *x{i}, {', '.join(f'k{i}y{j}: 1' for j in range(999))}}}\n" for i in range(12)
    )
    with pytest.raises(InputError, match="more than 10,000 keys"):
        load_recipe(written(tmp_path, "x0: &x0 {a: 1}\n" + levels))


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("name", "123", '"123"'),
        ("name", "no", '"no"'),
        ("name", "2024-01-01", '"2024-01-01"'),
        ("model", "123", '"123"'),
        ("phase2.data.0.lang", "no", '"no"'),
        ("phase2.data.0.lang", "[es, no]", '"no"'),
        ("phase2.data.0.split", "1", '"1"'),
        ("phase2.thinking", "on", '"no"'),
        ("model.revision", "1234567", '"1234567"'),
    ],
)
def test_texts_without_their_quotes(key, value, hint):
    with pytest.raises(InputError) as error:
        recipe_from(RAW, parse_assignments([f"{key}={value}"]))
    assert "put it in quotes" in error.value.hint
    assert hint in error.value.hint


def test_settings_are_read_as_files_are():
    with pytest.raises(InputError, match="'lr' is given twice"):
        parse_assignments(["phase1.train={lr: 1, lr: 2}"])
    for place in ("²", "\u0660", "9" * 5000, "-1"):
        with pytest.raises(InputError, match="is not an entry of a list of 1"):
            recipe_from(RAW, {f"phase1.data.{place}": 1})
    assert parse_assignments([r'a="\ud83d\ude00 \U0001F600"'])["a"] == "😀 😀"
    with pytest.raises(InputError, match="half a character"):
        recipe_from(RAW, parse_assignments([r'phase1.system="\ude00\ud83d"']))


def test_escaped_pairs_in_files(tmp_path):
    text = r"""  two: {data: y.jsonl, system: "\ud83d\ude00"}""" + "\n"
    assert load_recipe(written(tmp_path, text)).phases[1].system == "😀"
