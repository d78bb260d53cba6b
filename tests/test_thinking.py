"""Templates and rows that take more than a plain reading: what is refused, said, and part of the ids of steps."""

import json

import pytest
import yaml
from transformers import AutoTokenizer

from qcft.data.encode import Encoder
from qcft.data.formats import Unusable, to_row
from qcft.data.rows import digest_rows, message_from
from qcft.events import Watch
from qcft.files import read_json
from qcft.models.load import load_tokenizer
from qcft.recipe import Model, recipe_from
from qcft.runner.planned import PlannedRecipe

from .helpers.tiny import make_llama, write_rows
from .test_chat_templates import TRL, template_of

USER, GOOD = {"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}


def answers(record, format="messages"):
    return [(m.content, m.train, m.reasoning) for m in to_row(record, format).messages if m.role == "assistant"]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0}, {"weight": 0, "train": True}])
def test_a_marked_answer_has_no_loss(mark):
    bad = {"role": "assistant", "content": "bad", **mark}
    plain = {"messages": [USER, bad, USER, {**GOOD, "weight": 1, "train": True}]}
    assert answers(plain) == [("bad", False, None), ("good", True, None)]
    shared = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "bad", **mark}, USER, GOOD]}
    assert answers(shared, "sharegpt") == [("bad", False, None), ("good", True, None)]
    with pytest.raises(Unusable, match="no answer to train"):
        to_row({"messages": [USER, bad]}, "messages")


@pytest.mark.parametrize("mark", [{"weight": 0.5}, {"weight": "0"}, {"train": "no"}])
def test_an_unclear_mark_is_counted(mark):
    with pytest.raises(Unusable, match=r"weight|train"):
        to_row({"messages": [USER, {**GOOD, **mark}]}, "messages")


def test_only_the_completion_has_loss():
    record = {"prompt": [USER, {"role": "assistant", "content": "weak"}, USER], "completion": [GOOD]}
    assert answers(record, "prompt-completion") == [("weak", False, None), ("good", True, None)]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_read_by_any_of_its_names(name):
    record = {"messages": [USER, {**GOOD, name: "why"}]}
    assert answers(record) == [("good", True, "why")]
    assert answers({"messages": [USER, {**GOOD, name: None}]}) == [("good", True, None)]
    row = to_row(record, "messages")
    assert [message_from(turn) for turn in row.as_dict()["completion"]] == list(row.completion)


def test_a_system_column_and_a_system_turn_are_one():
    turns = [{"from": "system", "value": "be brief"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    for column, text in (("be brief", "be brief"), ("be kind", "be kind\n\nbe brief"), ("", "be brief")):
        row = to_row({"system": column, "conversations": turns}, "sharegpt")
        assert [(m.role, m.content) for m in row.prompt] == [("system", text), ("user", "q")]


def test_rows_without_marks_keep_their_digests():
    """Steps of earlier versions are reused."""
    row = to_row({"messages": [USER, GOOD]}, "messages")
    assert digest_rows([row]) == "35cf482d7b8c7e8bb3787fa182a0290e8266bc3f16cdb2904d9849ed24bf9337"


@pytest.fixture(scope="module")
def thinker(tmp_path_factory, tokenizer_folder):
    """A tiny model with Qwen3's chat template."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template_of("qwen3")
    return make_llama(tmp_path_factory.mktemp("thinker"), tokenizer)


def conversations(path, more=None):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what {i}"},
                {**GOOD, "content": "red"},
                USER,
                {**GOOD, **(more or {})},
            ]
        }
        for i in range(40)
    ]
    return write_rows(path, rows)


def ids_of(raw, **changes):
    return {step.stage: step.id for step in PlannedRecipe(recipe_from(raw, changes), Watch()).plan.steps}


def test_a_thinking_template_trains_every_turn_and_answers_without_thinking(thinker, raw_recipe, tmp_path, qcft):
    data = conversations(tmp_path / "chat.jsonl", {"reasoning_content": "why"})
    raw_recipe["model"]["name"] = str(thinker)
    raw_recipe["phases"] = raw_recipe["phases"][:1]
    raw_recipe["phases"][0] |= {"data": [{"path": str(data), "lang": "en"}]}
    raw_recipe["phases"][0]["train"] |= {"epochs": 1, "max_length": 128}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(raw_recipe))
    code, out, error = qcft("check", tmp_path / "tiny.yaml", "--rows", "2", "--json")
    assert code == 0, error
    (phase,) = json.loads(out)["phases"]
    assert phase["left_out"].keys() <= {"reserved for the test set but not needed (heldout.rows)"}
    assert phase["rows"] == 2 * (phase["rows_read"] - sum(phase["left_out"].values()))
    shown = ["".join(f"[[{s['text']}]]" if s["trained"] else s["text"] for s in row) for row in phase["samples"]]
    assert shown[0].endswith("<think>\n\n</think>\n\n[[red<|im_end|>]]")
    assert shown[1].endswith("assistant\n[[<think>\nwhy\n</think>\n\ngood<|im_end|>]]")
    code, _, error = qcft("run", tmp_path / "tiny.yaml", "--runs", tmp_path / "runs")
    assert code == 0, error
    assert "made into one training row for each answer" in error
    probe = read_json(tmp_path / "runs" / "tiny" / "eval" / "phase1" / "done.json")
    assert probe["metrics"]["answers"]["rows"] == 3


def test_what_takes_more_than_a_plain_reading_is_part_of_ids(thinker, raw_recipe, tmp_path, color_data):
    raw_recipe["phases"][1]["replay"] = {"ratio": 0.2, "kind": "generative"}
    plain = ids_of(raw_recipe)
    assert plain == ids_of(raw_recipe, **{"model.special_tokens_in_text": "allow"})
    off = ids_of(raw_recipe, **{"phase2.thinking": "off"})
    assert off["phase1"] == plain["phase1"]
    assert off["phase2"] != plain["phase2"]
    rows = [json.loads(line) for line in (color_data / "en.jsonl").read_text().splitlines()]
    for row in rows:
        row["output"] += "<|im_end|>"
    data = str(write_rows(tmp_path / "control.jsonl", rows))
    raw_recipe["phases"][0]["data"][0]["path"] = data
    escaped, allowed = ids_of(raw_recipe), ids_of(raw_recipe, **{"model.special_tokens_in_text": "allow"})
    assert escaped["phase1"] != allowed["phase1"]
    raw_recipe["model"]["name"] = str(thinker)
    planned = PlannedRecipe(recipe_from(raw_recipe), Watch())
    assert all(step.settings["template"] == ["thinking"] for step in planned.plan.steps if step.kind == "train")
    prompt = planned.replay_encoder(planned.recipe.phases[1]).prompt_ids(planned.pools["phase2"][0].rows[0])
    assert planned.tokenizer.decode(prompt).endswith("assistant\n<think>\n\n</think>\n\n")


def refused(qcft, raw, tmp_path, says, hint):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(raw))
    for command in (("check", tmp_path / "tiny.yaml"), ("run", tmp_path / "tiny.yaml", "--runs", tmp_path / "runs")):
        code, _, error = qcft(*command)
        assert code == 2, error
        assert says in error
        assert hint in error
    assert not (tmp_path / "runs").exists()


def test_thinking_needs_a_template_that_can(raw_recipe, qcft, tmp_path):
    raw_recipe["phases"][0]["thinking"] = "on"
    refused(qcft, raw_recipe, tmp_path, "has no place for thoughts", "keep phase1.thinking: auto")


@pytest.mark.parametrize("kind", ["word", "pad", "written"])
def test_more_tokens_than_the_embedding_has_rows(raw_recipe, qcft, tmp_path, tokenizer_folder, kind):
    """Only a special token that no row can hold may be missing, as Gemma's for pictures is."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = make_llama(tmp_path / "model", tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(model)
    raw_recipe["model"]["name"] = str(model)
    (tmp_path / "fits.yaml").write_text(yaml.safe_dump(raw_recipe))
    assert qcft("check", tmp_path / "fits.yaml")[0] == 0
    if kind == "word":
        tokenizer.add_tokens(["color"])
    elif kind == "pad":
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    else:
        tokenizer.chat_template = "<image>" + tokenizer.chat_template
    tokenizer.save_pretrained(model)
    refused(qcft, raw_recipe, tmp_path, "have larger ids, such as", "resize_token_embeddings")


def test_a_tokenizer_without_eos(raw_recipe, qcft, tmp_path, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = make_llama(tmp_path / "model", tokenizer)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(model)
    raw_recipe["model"]["name"] = str(model)
    refused(qcft, raw_recipe, tmp_path, "has no EOS token", "tokenizer_config.json")


def test_a_dated_template_is_fixed_when_loaded_and_exported_unmodified(tmp_path, tokenizer_folder):
    from qcft.models.chat import write_chat

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = (TRL / "llama3_2.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = load_tokenizer(tmp_path / "model", Model(name="dated"))
    assert Encoder(loaded).template.traits == ("dated 2024-07-26",)
    write_chat(loaded, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    assert Encoder(loaded).template.traits == ("dated 2024-07-26",)
