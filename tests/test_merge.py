"""Merging equals W + s B A and PEFT's own merge; shards, dtype, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open

from qcft import InputError, QcftError
from qcft.events import Watch
from qcft.layers import adapted_modules
from qcft.models import merge
from qcft.models.adapter_config import read_adapter_config
from qcft.models.adapters import add_lora
from qcft.models.deltas import read_adapter
from qcft.models.load import load_model
from qcft.models.merge import merge_adapters
from qcft.recipe import Lora, Model, parse_freeze

from .helpers.tiny import make_llama


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


@pytest.fixture(params=[{}, {"rslora": True}, {"targets": ["q_proj", "down_proj"], "freeze": "first:1"}])
def adapter(request, tiny_model, tmp_path):
    """An adapter with random factors, on the tiny model."""
    options = dict(request.param)
    freeze, targets = options.pop("freeze", "none"), options.get("targets", "all-linear")
    model = load_model(tiny_model, Model(name="tiny"), quantize="none").float()
    adapted = add_lora(model, adapted_modules(model, targets, parse_freeze(freeze), 0), Lora(r=4, alpha=8, **options))
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merged = adapted.merge_and_unload().state_dict()
    return tmp_path / "adapter", merged


def fp32_copy(tiny_model, to):
    model = load_model(tiny_model, Model(name="tiny"), quantize="none").float()
    model.save_pretrained(to)
    return to


def test_merge_equals_pefts_in_fp32(tiny_model, adapter, tmp_path):
    folder, expected = adapter
    base = fp32_copy(tiny_model, tmp_path / "base")
    (tmp_path / "out").mkdir()
    merge_adapters(base, [folder], tmp_path / "out", Watch())
    merged, before = tensors(tmp_path / "out"), tensors(base)
    assert merged.keys() == before.keys()
    changed = [name for name in merged if not torch.equal(merged[name], before[name])]
    assert changed
    for name, tensor in merged.items():
        error = (tensor - expected[name]).norm() / expected[name].norm()
        assert error < 1e-6, name


def test_merge_is_w_plus_scaled_ba_in_the_bases_dtype(tiny_model, adapter, tmp_path):
    folder, _ = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "out").mkdir()
    count = merge_adapters(tiny_model, [folder], tmp_path / "out", Watch())
    merged, base, factors = tensors(tmp_path / "out"), tensors(tiny_model), tensors(folder)
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    by_hand = 0
    for name, weight in base.items():
        a = factors.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        if a is None:
            assert torch.equal(merged[name], weight)
            continue
        b = factors[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
        wanted = (weight.float() + scale * (b.float() @ a.float())).to(torch.bfloat16)
        assert torch.equal(merged[name], wanted)
        by_hand += 1
    assert count == by_hand == len(factors) // 2


def test_shards_have_an_index_and_merging_twice_is_the_same(tiny_model, adapter, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    folder, _ = adapter
    for name in ("one", "two", "whole"):
        (tmp_path / name).mkdir()
    merge_adapters(tiny_model, [folder], tmp_path / "whole", Watch())
    monkeypatch.setattr(merge, "SHARD_BYTES", 50_000)
    for name in ("one", "two"):
        merge_adapters(tiny_model, [folder], tmp_path / name, Watch())
    shards = sorted(p.name for p in (tmp_path / "one").glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        assert (tmp_path / "one" / shard).read_bytes() == (tmp_path / "two" / shard).read_bytes()
    a = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    b = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_an_adapter_for_another_model_is_refused(adapter, tokenizer, tmp_path):
    folder, _ = adapter
    other = make_llama(tmp_path / "other", tokenizer, layers=1)
    (tmp_path / "out").mkdir()
    with pytest.raises(QcftError, match="the model lacks"):
        merge_adapters(other, [folder], tmp_path / "out", Watch())
    wide = make_llama(tmp_path / "wide", tokenizer, intermediate_size=256, num_key_value_heads=4)
    with pytest.raises(QcftError, match="delta for"):
        merge_adapters(wide, [folder], tmp_path / "out", Watch())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"trainable_token_indices": [1, 2]}, "trained tokens"),
        ({"target_parameters": ["experts"]}, "adapted parameters"),
        ({"a_key_of_a_later_peft": True}, "a_key_of_a_later_peft"),
        ({"peft_type": "LOHA"}, "not LORA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
    ],
)
def test_what_an_adapter_holds_beyond_lora_is_refused_by_name(adapter, change, says):
    folder, _ = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=says):
        read_adapter_config(folder)


def test_a_truncated_or_pickled_adapter_is_refused(adapter, tmp_path):
    folder, _ = adapter
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-7])
    with pytest.raises(InputError, match="truncated"):
        read_adapter_config(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors") as error:
        read_adapter_config(folder)
    assert "pickled" in error.value.hint
    with pytest.raises(InputError, match="no folder"):
        read_adapter_config(tmp_path / "nowhere")


def test_only_the_files_a_model_is_loaded_from_are_merged(tiny_model, adapter, tmp_path):
    """Some repositories carry the same weights a second time in another layout."""
    folder, _ = adapter
    base = shutil.copytree(tiny_model, tmp_path / "base")
    shutil.copyfile(base / "model.safetensors", base / "consolidated.safetensors")
    (tmp_path / "out").mkdir()
    merge_adapters(base, [folder], tmp_path / "out", Watch())
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_a_factor_without_its_partner_is_refused_by_name(adapter):
    from safetensors.torch import load_file, save_file

    folder, _ = adapter
    held = load_file(folder / "adapter_model.safetensors")
    held["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(4, 10)
    save_file(held, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="lora_embedding_A"):
        read_adapter(folder)
