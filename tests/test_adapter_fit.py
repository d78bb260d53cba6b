"""Adapters made elsewhere: whole ones are taken, and whatever contradicts itself or the model is refused in a line."""

import json
import shutil
import struct
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qcft import InputError
from qcft.models.adapter_config import CONFIG, PREFIX, WEIGHTS, read_adapter_config
from qcft.models.adapter_fit import check_fit
from qcft.models.deltas import read_adapter
from qcft.models.meta import model_without_weights
from qcft.recipe import Model


@pytest.fixture(scope="module")
def meta(tiny_model):
    return model_without_weights(tiny_model, Model(name=str(tiny_model)))


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """An adapter of PEFT's on two kinds of modules."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]))
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(folder)
    return folder


def changed(whole, folder, config=None, weights=None):
    """A copy whose config, or whose weights, a function changed."""
    shutil.copytree(whole, folder)
    if config:
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | config))
    if weights:
        save_file(weights(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    return folder


def check(folder, meta):
    read_adapter_config(folder)
    check_fit(folder, meta)
    return read_adapter(folder)


def test_a_complete_adapter_is_accepted(whole, meta):
    assert len(check(whole, meta).changes) == 6


WANT = "but its config and the model need"
Q = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: {k.removeprefix(PREFIX): v for k, v in w.items()}, "does not begin with base_model.model."),
        (lambda w: {k: v for k, v in w.items() if k != Q}, "lacks .*q_proj.lora_A.weight, which its config requires"),
        (lambda w: {**w, Q.replace("q_proj", "k_proj"): w[Q].clone()}, "which its config does not mention"),
        (lambda w: {**w, Q.replace("layers.0", "layers.7"): w[Q].clone()}, "which the model lacks"),
        (lambda w: {**w, Q: torch.full_like(w[Q], torch.nan)}, "which is not finite"),
        (lambda w: {**w, Q: w[Q].to(torch.int8)}, "of type"),
        (lambda w: {**w, Q: w[Q][:, :-1].contiguous()}, WANT),
        (
            lambda w: {k: torch.cat([v, v]) if "lora_A" in k else v for k, v in w.items()},
            WANT,
        ),
    ],
)
def test_weights_that_contradict_the_config_are_refused(whole, meta, tmp_path, change, says):
    with pytest.raises(InputError, match=says):
        check(changed(whole, tmp_path / "a", weights=change), meta)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"target_modules": ["q_proj"]}, "which its config does not mention"),
        ({"target_modules": ["q_proj", "up_proj", "down_proj"]}, "lacks .* and 5 more"),
        ({"target_modules": ["nothing"]}, "does not fit the model"),
        ({"target_modules": "("}, "has an invalid pattern"),
        ({"target_modules": r"((\w|\.)+)+!"}, "takes over"),
        ({"r": 10**6}, WANT),
        ({"r": 2}, WANT),
        ({"rank_pattern": {"q_proj": 2}}, WANT),
        ({"layers_to_transform": [0]}, "which its config does not mention"),
        ({"modules_to_save": ["lm_head"]}, "lacks .*lm_head"),
        ({"use_dora": True}, "lacks|without magnitudes"),
        ({"lora_alpha": float("nan")}, "no finite lora_alpha"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "no finite lora_alpha"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "layers of Megatron"),
    ],
)
def test_configs_that_contradict_the_weights_are_refused(whole, meta, tmp_path, monkeypatch, config, says):
    monkeypatch.setattr("qcft.models.adapter_fit.SECONDS", 2)
    begun = time.monotonic()
    with pytest.raises(InputError, match=says):
        check(changed(whole, tmp_path / "a", config=config), meta)
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: {**entry, "data_offsets": [64, 0]},
        lambda entry: {**entry, "data_offsets": [-8, 1016]},
        lambda entry: {**entry, "shape": [2**40, 2**40]},
        lambda entry: {**entry, "shape": "4"},
        lambda entry: {**entry, "dtype": "X"},
        lambda entry: {},
        lambda entry: None,
    ],
)
def test_headers_that_do_not_fit_are_refused(whole, tmp_path, change):
    folder = changed(whole, tmp_path / "a")
    content = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    text = json.dumps(header | {Q: change(header[Q])}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    with pytest.raises(InputError, match="truncated or altered"):
        read_adapter_config(folder)


ODD = [None, "x", "", -1, 0, 1.5, True, [], ["x"], [[]], {}, {"x": 1}, {"(": 2}, {"q_proj": "x"}]


def test_any_value_in_a_config_is_accepted_or_refused_in_one_line(whole, meta, tmp_path):
    """Every key with values of every kind; and what is taken holds all that the file does."""
    keys = json.loads((whole / CONFIG).read_text())
    number = 0
    for key in [*keys, "made_up"]:
        for value in ODD:
            number += 1
            folder = changed(whole, tmp_path / str(number), config={key: value})
            said = taken(folder, meta)
            assert said is True or (said.startswith("adapter: ") and "\n" not in said), (key, value)
            shutil.rmtree(folder)


def taken(folder, meta):
    """True where all of an adapter is taken, else what is said."""
    try:
        return len(check(folder, meta).changes) == 6
    except InputError as error:
        return error.message
