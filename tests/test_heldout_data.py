"""One's own test sets: measured at every stage, never trained, nor their translations, nor replayed."""

import pytest

from qcft import InputError
from qcft.cli.flags import phase1_recipe
from qcft.events import Note, Watch
from qcft.plan import make_plan
from qcft.prepare.prepared import Prepared
from qcft.prepare.rows import english_prompts
from qcft.recipe import recipe_from

from .helpers.tiny import ASK, write_rows


def prepare(raw, events=None, **changes):
    return Prepared(recipe_from(raw, changes), Watch() if events is None else Watch(events.append))


@pytest.fixture
def own_rows(tmp_path):
    """Spanish rows: five with ids of the training data, one with a prompt of it, two of their own, one twice."""
    rows = [{"id": f"c{i}", "instruction": f"otra pregunta {i}", "output": "rojo"} for i in range(5)]
    rows += [{"instruction": f"{ASK['es']} 20", "output": "azul azul"}]
    rows += [{"instruction": f"nueva {i}", "output": "verde"} for i in (1, 2, 2)]
    return str(write_rows(tmp_path / "test_es.jsonl", rows))


def by_name(prepared):
    return {group.name: group for group in prepared.groups}


def test_every_row_is_measured_once_under_the_phases_system(raw_recipe, own_rows):
    raw_recipe["phases"][1]["system"] = "sé breve"
    prepared = prepare({**raw_recipe, "heldout": {**raw_recipe["heldout"], "data": [{"path": own_rows, "lang": "es"}]}})
    assert [*by_name(prepared)] == ["phase1 en", "phase2 es", "phase2 pt", "test es"]
    group = by_name(prepared)["test es"]
    assert len(group.rows) == 8  # more than heldout.rows
    assert (group.system, group.max_length) == ("sé breve", 1024)
    assert len(prepared.held_out(group).rows) == 8
    limited = prepare(raw_recipe, **{"heldout.data": [{"path": own_rows, "lang": "es", "take": 3}]})
    assert len(by_name(limited)["test es"].rows) == 3


def test_nothing_of_it_is_trained_or_replayed(raw_recipe, own_rows):
    events = []
    raw_recipe["phases"][1]["data"] = [{**raw_recipe["phases"][1]["data"][0], "take": None}]
    raw_recipe["phases"][0]["data"][0]["take"] = None
    with_test = prepare(raw_recipe, events, **{"heldout.data": [{"path": own_rows, "lang": "es"}]})
    without = prepare(raw_recipe)
    keys = {row.key for row in by_name(with_test)["test es"].rows}
    prompts = {row.prompt_digest for row in by_name(with_test)["test es"].rows}
    for phase in ("phase1", "phase2"):
        before = [row for rows in without.rows[phase] for row in rows]
        after = [row for rows in with_test.rows[phase] for row in rows]
        assert len(after) < len(before)
        assert not {row.key for row in after} & keys
        assert not {row.prompt_digest for row in after} & prompts
        assert after == [row for row in before if row.key not in keys and row.prompt_digest not in prompts]
    assert not {row.key for pool in with_test.pools["phase2"] for row in pool.rows} & keys
    notes = [event.text for event in events if isinstance(event, Note)]
    assert any("rows of es.jsonl are not trained on, as they have the prompt or the id of a row of heldout.data" in n
               for n in notes)  # fmt: skip


def test_ids_of_steps_follow_it(raw_recipe, own_rows, tmp_path):
    """What is measured has another id; what is trained only where rows are taken out of it."""
    apart = write_rows(tmp_path / "apart.jsonl", [{"instruction": f"nueva {i}", "output": "verde"} for i in range(3)])

    def ids(**changes):
        prepared = prepare(raw_recipe, **changes)
        return {step.stage: step.id for step in make_plan(prepared.recipe, prepared.digests()).steps}

    plain, other = ids(), ids(**{"heldout.data": [{"path": str(apart), "lang": "es"}]})
    assert plain["phase1"] == other["phase1"]
    assert plain["phase2"] == other["phase2"]
    assert plain["eval/base"] != other["eval/base"]
    assert ids(**{"heldout.data": [{"path": own_rows, "lang": "es"}]})["phase1"] != plain["phase1"]
    assert ids(**{"heldout.data": []}) == plain


def test_it_may_be_the_english_that_stages_are_judged_by(raw_recipe, tmp_path):
    english = write_rows(tmp_path / "en.jsonl", [{"instruction": f"what {i}", "output": "red"} for i in range(4)])
    raw = {**raw_recipe, "phases": [{**raw_recipe["phases"][1], "replay": None}]}
    prepared = prepare(raw, **{"heldout.data": [{"path": str(english), "lang": "en"}]})
    assert [*by_name(prepared)] == ["phase2 es", "phase2 pt", "test en"]  # not what ships with qcft
    assert {group.phase for group, _ in english_prompts(prepared.for_steps, prepared.held_out_digest(), 3)} == {"test"}


def test_every_arm_of_an_ablation_measures_it(raw_recipe, own_rows):
    raw_recipe["heldout"]["data"] = [{"path": own_rows, "lang": "es"}]
    raw_recipe["heldout"]["of"] = [{"name": "phase2", "data": raw_recipe["phases"][1]["data"], "system": "s"}]
    group = by_name(prepare(raw_recipe))["test es"]
    assert (group.system, len(group.rows)) == ("s", 8)


def test_what_cannot_be_measured_is_refused(raw_recipe, tmp_path):
    empty = write_rows(tmp_path / "empty.jsonl", [{"instruction": "q", "output": ""}] * 2)
    with pytest.raises(InputError, match=r"heldout.data: .* gives no row to use \(2 empty answer\)"):
        prepare(raw_recipe, **{"heldout.data": [{"path": str(empty), "lang": "es"}]})
    odd = write_rows(tmp_path / "odd.jsonl", [{"x": "q"}])
    with pytest.raises(InputError, match=r"heldout.data: row 1 of .* no known format"):
        prepare(raw_recipe, **{"heldout.data": [{"path": str(odd), "lang": "es"}]})
    long = write_rows(tmp_path / "long.jsonl", [{"instruction": "red " * 3000, "output": "a"}])
    prepared = prepare(raw_recipe, **{"heldout.data": [{"path": str(long), "lang": "es"}]})
    with pytest.raises(InputError, match=r"none of the 1 held-out rows of test es") as error:
        prepared.held_out(by_name(prepared)["test es"])
    assert error.value.hint == "give shorter rows: at most 1024 tokens are measured"
    raw_recipe["phases"][1]["name"] = "test"
    with pytest.raises(InputError, match=r"'test' is the name for heldout.data"):
        recipe_from(raw_recipe, {"heldout.data": str(odd)})
    recipe_from(raw_recipe)


def test_the_flag(tmp_path):
    def recipe(*tests):
        keys = {"take": 3, "columns": {"output": "antwort"}}
        return phase1_recipe("r", "m", ["a.jsonl"], None, keys, [*tests], None, None, [])

    (found,) = recipe("es=test_es.jsonl").heldout.data
    assert (found.path, found.lang, found.take) == ("test_es.jsonl", "es", None)
    assert found.columns == {"output": "antwort"}
    with pytest.raises(InputError, match=r"--test 'test_es.jsonl' is not LANG=PATH"):
        recipe("test_es.jsonl")


def test_keys_below_it_can_be_set(raw_recipe):
    raw_recipe["heldout"]["data"] = "a.jsonl"
    recipe = recipe_from(raw_recipe, {"heldout.data.0.lang": "es"})
    assert [(source.path, source.lang) for source in recipe.heldout.data] == [("a.jsonl", "es")]
    with pytest.raises(InputError, match=r"unknown key 'heldout\.data\.0\.langg'"):
        recipe_from(raw_recipe, {"heldout.data.0.langg": "es"})


def test_a_run_shows_it_at_every_stage(qcft, raw_recipe, own_rows, tmp_path):
    import json

    import yaml

    raw_recipe["heldout"]["data"] = [{"path": own_rows, "lang": "es"}]
    raw_recipe["phases"][1]["balance"] = "equal"
    raw_recipe["phases"][1]["data"] = [
        {"path": source.replace("{lang}", lang), "take": take}
        for source, lang, take in ((raw_recipe["phases"][1]["data"][0]["path"], "es", 12),
                                   (raw_recipe["phases"][1]["data"][0]["path"], "pt", 20))
    ]  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw_recipe))
    code, out, err = qcft("run", "recipe.yaml", "--json")
    assert code == 0, err
    table = json.loads(out)
    names = {group["name"] for group in table["groups"]}
    assert "test es" in names
    assert all("test es" in stage["groups"] for stage in table["stages"])
    # Neither source has a language: both are guessed, reported, and kept with the run.
    assert "pt.jsonl has no lang: taken as pt" in err
    kept = yaml.safe_load((tmp_path / "runs/tiny/recipe.yaml").read_text())
    assert [source["lang"] for source in kept["phases"][1]["data"]] == ["es", "pt"]
    done = json.loads((tmp_path / "runs/tiny/phase2/done.json").read_text())["metrics"]
    shares = {share["source"]: share for share in done["mix"]}
    assert shares["es.jsonl (es)"]["rows"] == shares["pt.jsonl (pt)"]["rows"] > 0
    assert shares["pt.jsonl (pt)"]["left_out"]["not drawn, to balance languages"] > 0
