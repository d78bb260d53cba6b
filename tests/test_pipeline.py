"""The whole pipeline on a tiny model, from Python: stages, table, reuse, replay, report."""

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import qcft
from qcft import api
from qcft.data.encode import Encoder
from qcft.data.load import load_source
from qcft.events import Mixed, Note, Progress, StepBegun, Watch
from qcft.files import read_json, write_json
from qcft.measure.stats import mean_nll
from qcft.models.adapters import load_adapter
from qcft.models.load import evaluating, load_model, load_tokenizer
from qcft.prepare.checks import check_prepared
from qcft.prepare.prepared import Prepared
from qcft.recipe import load_recipe, recipe_from
from qcft.recipe.shared import shared_yaml

from .helpers.scores import by_hand
from .helpers.tiny import make_llama, write_rows


@pytest.fixture
def recipe_file(raw_recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw_recipe))
    return path


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory):
    """One runs folder for the module: steps that several tests need run once."""
    return tmp_path_factory.mktemp("shared") / "runs"


def run(recipe_file, runs, changes=None):
    events = []
    done = qcft.run(recipe_file, set=changes or {}, runs=runs, listener=events.append)
    return done, events


def states(events):
    return {e.title: e.state for e in events if isinstance(e, StepBegun)}


def test_two_phases_give_stages_and_a_table(recipe_file, shared_runs):
    done, events = run(recipe_file, shared_runs)
    assert list(done.stages) == [
        "eval/base-16bit", "eval/base", "phase1", "eval/phase1", "merged", "eval/merged", "kept-merged",
        "replay", "phase2", "eval/phase2",
    ]  # fmt: skip
    table = done.table
    assert [g["name"] for g in table["groups"]] == ["phase1 en", "phase2 es", "phase2 pt"]
    assert [g["english"] for g in table["groups"]] == [True, False, False]
    names = [(s["name"], s["precision"]) for s in table["stages"]]
    assert names == [
        ("base", "16 bit"), ("base", "NF4"), ("phase1", "NF4"), ("phase1 merged", "NF4"), ("phase2", "NF4")
    ]  # fmt: skip
    nll = {s["stage"]: {g: v["nll"] for g, v in s["groups"].items()} for s in table["stages"]}
    assert nll["eval/phase1"]["phase1 en"] < nll["eval/base"]["phase1 en"] - 0.5
    assert nll["eval/phase2"]["phase2 es"] < nll["eval/base"]["phase2 es"] - 0.5
    change = table["changes"][0]
    assert (change["from"], change["to"]) == ("eval/phase1", "eval/phase2")
    for group, entry in change["groups"].items():
        assert entry["value"] == pytest.approx(nll["eval/phase2"][group] - nll["eval/phase1"][group])
    assert table["kept"]["merged"]["share"] is not None
    assert all(s["answers"]["rows"] == 3 for s in table["stages"])
    json.dumps(table)
    assert set(states(events).values()) == {"new"}
    for stage, found in done.stages.items():
        assert (done.folder / stage / "done.json").is_file()
        assert found.folder.resolve() == (done.folder / stage).resolve()


def test_collections_do_not_walk_the_libraries(recipe_file, shared_runs):
    run(recipe_file, shared_runs)
    assert gc.get_freeze_count() > 100_000


def test_what_others_loaded_before_stays_with_the_collector():
    """A model of theirs may be alive."""
    code = (
        "import gc, transformers; from qcft.runner.libraries import *; set_environment(); exclude_from_gc(); "
        "print(gc.get_freeze_count())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_the_mix_is_exact_and_shown_before_training(recipe_file, shared_runs, tmp_path):
    _, events = run(recipe_file, tmp_path / "runs", {"phase1": None, "heldout.rows": 5})
    mixed = next(e for e in events if isinstance(e, Mixed))
    rows = {s.source: s.rows for s in mixed.shares}
    assert rows == {"es.jsonl (es)": 12, "pt.jsonl (pt)": 12, "replay (english)": 6}
    assert all(s.tokens > s.answer_tokens > 0 for s in mixed.shares)
    first_step = next(e for e in events if isinstance(e, Progress) and e.label == "training phase2")
    assert events.index(mixed) < events.index(first_step)


def test_a_second_run_reuses_everything(recipe_file, shared_runs):
    first, _ = run(recipe_file, shared_runs)
    again, events = run(recipe_file, shared_runs)
    assert set(states(events).values()) == {"reused"}
    assert again.table == first.table
    assert again.folder == first.folder


def test_other_settings_share_what_they_can_under_another_name(recipe_file, shared_runs):
    first, _ = run(recipe_file, shared_runs)
    other, events = run(recipe_file, shared_runs, {"phase2.freeze": "none", "phase2.replay": None})
    assert (first.name, other.name) == ("tiny", "tiny-2")
    fresh = {title for title, state in states(events).items() if state == "new"}
    assert fresh == {"train phase2", "measure phase2"}
    assert other.stages["phase1"].step == first.stages["phase1"].step
    assert (shared_runs / "tiny" / "phase2").resolve() == first.stages["phase2"].folder.resolve()


def test_a_merge_that_lost_phase_1_is_refused_and_can_be_let_through(recipe_file, shared_runs):
    """Whatever the merge kept, a limit above it refuses, one below it warns or passes; nothing is done twice."""
    first, _ = run(recipe_file, shared_runs)
    share = first.table["kept"]["merged"]["share"]
    above, below = (
        {"merge.refuse_below": 1.0, "merge.warn_below": 1.0},
        {"merge.refuse_below": -9, "merge.warn_below": -9},
    )
    assert share < 1
    with pytest.raises(qcft.QcftError, match="merging phase1 kept only") as error:
        run(recipe_file, shared_runs, above)
    assert error.value.exit_code == 1
    assert "merge.refuse_below=null" in error.value.hint
    _, events = run(recipe_file, shared_runs, {**above, "merge.refuse_below": None})
    assert any("kept only" in getattr(e, "text", "") for e in events)
    _, events = run(recipe_file, shared_runs, below)
    assert not any("kept only" in getattr(e, "text", "") for e in events)


def test_a_quantised_checkpoint_is_refused(recipe_file, tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "quantised")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(qcft.InputError, match="quantised already"):
        run(recipe_file, tmp_path / "runs", {"model.name": str(copy)})
    assert not (tmp_path / "runs").exists()


def test_the_tables_nll_is_that_of_plain_transformers(recipe_file, shared_runs):
    """The held-out rows, loaded and scored by hand with transformers and PEFT alone."""
    done, _ = run(recipe_file, shared_runs)
    recipe = load_recipe(recipe_file)
    merged = done.stages["merged"].folder / "model"
    tokenizer = load_tokenizer(merged, recipe.model)
    model = load_adapter(load_model(merged, recipe.model), done.stages["phase2"].folder / "adapter")
    source = recipe.phase("phase2").sources()[0]
    held_out = load_source(source, recipe.heldout, Watch()).held_out
    encoded = Encoder(tokenizer).encode_all(held_out).encoded
    with evaluating(model):
        sums = [by_hand(model, row) for row in encoded]
    nll = sum(n for n, _ in sums) / sum(t for _, t in sums)
    assert done.stages["eval/phase2"].metrics["groups"]["phase2 es"]["nll"] == pytest.approx(nll, rel=1e-2)


def test_the_merged_model_is_the_base_plus_the_adapter(recipe_file, shared_runs, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    done, _ = run(recipe_file, shared_runs)
    live = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    live = PeftModel.from_pretrained(live, done.stages["phase1"].folder / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(done.stages["merged"].folder / "model", dtype=torch.float32)
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        a, b = live(ids).logits, merged(ids).logits
    assert (a - b).abs().max() < 0.05 * a.abs().max()  # bf16 rounding of the merged weights


def test_held_out_rows_never_train_nor_replay(recipe_file, shared_runs):
    done, _ = run(recipe_file, shared_runs)
    prepared = Prepared(load_recipe(recipe_file), Watch())
    held = {row.key for group in prepared.groups for row in group.rows}
    assert held
    trained = {r.key for sets in prepared.rows.values() for rows in sets for r in rows}
    replayed = [json.loads(line) for line in (done.folder / "replay" / "replay.jsonl").read_text().splitlines()]
    assert len(replayed) == 6
    held_ids = {row.id for group in prepared.groups for row in group.rows}
    assert not held & trained
    assert not held_ids & {r["id"] for r in replayed}


def test_line_ends_in_replayed_text_end_no_line_of_its_file(qcft, recipe_file, raw_recipe, tmp_path):
    """U+2028, U+2029 and U+0085 end a line for `str.splitlines`; models write them too."""
    text = "red\u2028blue\u2029green\u0085"
    rows = [{"id": f"c{i}", "instruction": f"what {text} {i}", "output": text} for i in range(60)]
    write_rows(tmp_path / "odd.jsonl", rows)
    done, _ = run(recipe_file, tmp_path / "runs", {"phase2.replay.data": [{"path": str(tmp_path / "odd.jsonl")}]})
    shares = done.stages["phase2"].metrics["exposure"]
    assert sum(share["rows"] for share in shares) == 24 + 6
    code, out, err = qcft("replay", "tiny", "--show", "9", "--json")
    assert code == 0, err
    assert [row["completion"][0]["content"] for row in json.loads(out)["samples"]] == [text] * 6


def test_generative_replay_answers_english_prompts(recipe_file, tmp_path, monkeypatch):
    changes = {
        "phase2.replay": {"ratio": 0.1, "max_new_tokens": 24, "temperature": 0, "chunk": 4},
        "phase1.train.epochs": 12,
    }
    done, _ = run(recipe_file, tmp_path / "runs", changes)
    rows = [json.loads(line) for line in (done.folder / "replay" / "replay.jsonl").read_text().splitlines()]
    assert len(rows) == 3  # 0.1 / 0.9 of 24, to the nearest row
    metrics = done.stages["replay"].metrics
    assert metrics["reason"] == "English versions of 12 of the 12 rows of phase2, in phase1 by id"
    assert metrics["share_of_rows"] == 3 / 27
    # Greedy answers of the model phase 2 starts from: generated again, they are the same.
    recipe = load_recipe(recipe_file)
    merged = done.stages["merged"].folder / "model"
    tokenizer = load_tokenizer(merged, recipe.model)
    model = load_model(merged, recipe.model)
    encoder = Encoder(tokenizer)
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([prompt])
        with evaluating(model):
            made = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=encoder.end_ids)
        assert (
            tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
            == row["completion"][0]["content"]
        )


def test_a_killed_generation_resumes_at_the_next_chunk(recipe_file, tmp_path):
    changes = {
        "phase2.replay": {"ratio": 0.2, "max_new_tokens": 24, "temperature": 1.0, "chunk": 2},
        "phase1.train.epochs": 12,
    }
    whole, _ = run(recipe_file, tmp_path / "whole", changes)
    seen = []

    def stop(event):
        if getattr(event, "label", "") == "generating replay" and event.done:
            seen.append(event)
            watch.ask_to_stop()

    watch = Watch(stop)
    with pytest.raises(qcft.Interrupted):
        api.run_watched(load_recipe(recipe_file, changes), tmp_path / "cut", watch)
    assert seen
    again, _ = run(recipe_file, tmp_path / "cut", changes)
    assert again.stages["replay"].step == whole.stages["replay"].step
    files = [r.folder / "replay" / "replay.jsonl" for r in (whole, again)]
    assert files[0].read_text() == files[1].read_text()


def test_a_pool_that_is_too_small_says_how_many_rows_are_missing(raw_recipe, tmp_path):
    recipe = recipe_from(raw_recipe, {"phase2.replay.ratio": 0.9})
    with pytest.raises(qcft.InputError, match=r"needs 216 replay rows, but only \d+ can be made"):
        api.run(recipe, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_loaded_recipe_can_be_changed_too(raw_recipe, tmp_path):
    with pytest.raises(qcft.InputError, match="unknown key"):
        qcft.run(recipe_from(raw_recipe), set={"phase2.train.lrr": 1}, runs=tmp_path)


def test_a_prompt_the_template_refuses_is_dropped_from_answers_and_replay(raw_recipe, tiny_model, tmp_path):
    """Rows that a template raises on: counted, not a crash in the middle."""
    model = shutil.copytree(tiny_model, tmp_path / "refuses")
    template = (model / "chat_template.jinja").read_text()
    refuse = "{% if messages[0]['content'] == 's' %}{{ raise_exception('no s') }}{% endif %}"
    (model / "chat_template.jinja").write_text(refuse + template)
    rows = [
        {"id": f"r{i}", "instruction": f"what number {i}", "output": "red", **({"system": "s"} if i % 2 else {})}
        for i in range(80)
    ]
    write_rows(tmp_path / "en.jsonl", rows)
    changes = {
        "model.name": str(model),
        "phase1.data": [{"path": str(tmp_path / "en.jsonl"), "lang": "en"}],
        "phase1.train.epochs": 3,
        "phase2.replay": {"ratio": 0.1, "max_new_tokens": 40},
    }
    done = api.run(recipe_from(raw_recipe, changes), runs=tmp_path / "runs")
    left_out = done.stages["replay"].metrics["left_out"]
    assert left_out["the chat template refuses it: no s"] > 0
    assert "refuses" in str(done.stages["phase1"].metrics["mix"][0]["left_out"])


def test_an_instruct_model_needs_no_phase_1(recipe_file, tmp_path):
    done, _ = run(recipe_file, tmp_path / "runs", {"phase1": None})
    assert list(done.stages) == ["eval/base-16bit", "eval/base", "replay", "phase2", "eval/phase2"]
    groups = [g["name"] for g in done.table["groups"]]
    assert groups == ["phase2 es", "phase2 pt", "probe en"]  # English that ships with qcft
    assert done.table["changes"][0]["from"] == "eval/base"


def test_an_imported_adapter_is_phase_1(recipe_file, raw_recipe, shared_runs, tmp_path, color_data):
    first, _ = run(recipe_file, shared_runs)
    brought = {"name": "phase1", "adapter": str(first.stages["phase1"].folder / "adapter")}
    probe = [{"path": str(color_data / "en.jsonl"), "lang": "en"}]
    raw = {**raw_recipe, "name": "brought", "phases": [brought, raw_recipe["phases"][1]], "probe": probe}
    done = api.run(recipe_from(raw), runs=tmp_path / "runs")
    a, b = (read_json(r.folder / "merged" / "done.json")["files"] for r in (first, done))
    assert a == b  # the same adapter merges to the same files


def test_an_adapter_of_another_model_is_refused_before_anything_is_written(
    raw_recipe, shared_runs, recipe_file, tokenizer, tmp_path
):
    first, _ = run(recipe_file, shared_runs)
    other = make_llama(tmp_path / "other", tokenizer, intermediate_size=192)
    brought = {"name": "phase1", "adapter": str(first.stages["phase1"].folder / "adapter")}
    raw = {**raw_recipe, "model": str(other), "phases": [brought, raw_recipe["phases"][1]]}
    with pytest.raises(qcft.InputError, match="but its config and the model need"):
        api.run(recipe_from(raw), runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    # One that fits the shapes may be of the same model under another name: a warning.
    copied = shutil.copytree(brought["adapter"], tmp_path / "copied")
    config = read_json(copied / "adapter_config.json")
    for base, warned in ((f"somebody/{Path(raw_recipe['model']['name']).name}", 0), ("somebody/else", 1)):
        write_json(copied / "adapter_config.json", config | {"base_model_name_or_path": base})
        events = []
        recipe = recipe_from({**raw, "model": raw_recipe["model"], "phases": [{**brought, "adapter": str(copied)}]})
        check_prepared(Prepared(recipe, Watch(events.append)))
        notes = [event.text for event in events if isinstance(event, Note)]
        assert sum("was made for 'somebody/else'" in text for text in notes) == warned


def test_phase_1_alone_then_phase_2_is_the_same_as_both(raw_recipe, shared_runs, tmp_path):
    one = recipe_from({**raw_recipe, "phases": raw_recipe["phases"][:1]})
    both = recipe_from(raw_recipe)
    first = api.run(one, runs=tmp_path / "runs")
    second = api.run(both, runs=tmp_path / "runs")
    assert first.name == second.name == "tiny"
    assert first.stages["phase1"].step == second.stages["phase1"].step
    assert [p.name for p in recipe_from(yaml.safe_load((second.folder / "recipe.yaml").read_text())).phases] == [
        "phase1",
        "phase2",
    ]


def test_the_quickstart_on_a_tiny_model(tiny_model, tmp_path):
    """The recipe as it ships, generative replay and all; only the model, the takes and the lengths are smaller."""
    changes = {
        "model.name": str(tiny_model),
        "heldout.rows": 4,
        "answers": {"prompts": 2, "max_new_tokens": 8},
        "phase1.data.0.take": 40,
        "phase1.train": {"lr": 1e-2, "batch": 4, "max_length": 1024},
        "phase2.data.0.take": 6,
        "phase2.freeze": "first:2",
        "phase2.replay.max_new_tokens": 200,
        "phase2.train.max_length": 1024,
    }
    done = qcft.run("quickstart", set=changes, runs=tmp_path / "runs")
    assert list(done.stages) == [
        "eval/base-16bit", "eval/base", "phase1", "eval/phase1", "merged", "eval/merged", "kept-merged",
        "replay", "phase2", "eval/phase2",
    ]  # fmt: skip
    assert [g["name"] for g in done.table["groups"]] == ["phase1 en", "phase2 es", "phase2 pt", "phase2 fr", "test en"]
    mix = {share["source"]: share["rows"] for share in done.stages["phase2"].metrics["mix"]}
    assert mix["replay (generative)"] == 5  # 0.2 / 0.8 of 18, rounded half up
    assert done.stages["phase2"].metrics["frozen_layers"] == [0, 1]
    nll = {s["stage"]: s["groups"] for s in done.table["stages"]}
    assert nll["eval/phase2"]["phase2 es"]["nll"] < nll["eval/base"]["phase2 es"]["nll"]
    answer = (done.folder / "report" / "report.md").read_text().split("##")[0]
    assert "English" in answer
    assert "Compared with the 4-bit base model" in answer  # the gain, after a sentence for each English group


def test_without_quantisation_and_with_another_attention(recipe_file, tmp_path):
    changes = {"model.quantize": "none", "model.attn_implementation": "eager", "phase2.replay": None}
    done, _ = run(recipe_file, tmp_path / "runs", changes)
    assert {s["precision"] for s in done.table["stages"]} == {"16 bit"}
    nll = {s["stage"]: s["groups"]["phase2 es"]["nll"] for s in done.table["stages"]}
    assert nll["eval/phase2"] < nll["eval/base"] - 0.5


def test_the_report_holds_the_table_and_what_repeats_it(recipe_file, shared_runs):
    done, _ = run(recipe_file, shared_runs)
    text = (done.folder / "report" / "report.md").read_text()
    scores = [s["groups"]["phase2 es"]["nll"] for s in done.table["stages"]]
    assert all(f"{score:.3f}" in text for score in scores)
    assert "phase1 en \\*" in text
    assert text.split("```yaml\n")[1].split("```")[0] == shared_yaml(load_recipe(recipe_file))


def test_mean_nll_of_the_table_is_over_answer_tokens(recipe_file, shared_runs):
    done, _ = run(recipe_file, shared_runs)
    stage = done.stages["eval/base"]
    entries = read_json(stage.folder / "scores.json")["phase2 es"]
    total = sum(e["nll"] for e in entries) / sum(e["tokens"] for e in entries)
    assert stage.metrics["groups"]["phase2 es"]["nll"] == pytest.approx(total)
    assert stage.metrics["groups"]["phase2 es"]["rows"] == len(entries)
    assert mean_nll.__doc__


def test_public_names():
    assert qcft.__all__ == [
        *("Ablation", "Comparison", "InputError", "Interrupted", "QcftError", "Run", "Stage", "ablate", "chat"),
        *("check_recipe", "compare", "export", "merge", "open", "run", "runs"),
    ]
    assert all(getattr(qcft, name) for name in qcft.__all__)
    with pytest.raises(AttributeError):
        _ = qcft.nothing
