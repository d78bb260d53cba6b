"""Each kind of adapter merges to what PEFT's own merge gives in fp32, or to the live adapter; files are streamed."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from qcft import InputError, QcftError
from qcft.events import Watch
from qcft.files import is_whole_safetensors
from qcft.models.deltas import read_adapter
from qcft.models.load import load_model
from qcft.models.merge import MARK, Target, merge_adapters
from qcft.models.tensors import PlannedTensor, stored_tensors, write_bytes, write_tensors
from qcft.recipe import Model

LINEAR = ["q_proj", "v_proj", "down_proj"]
SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(1, 25).reshape(2, 12)

# name -> (the model's options, the adapter's)
KINDS = {
    "patterns": (
        {},
        {
            "target_modules": [*LINEAR, "k_proj"],
            "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 7},
            "alpha_pattern": {r"layers\.0\..*down_proj": 40, "k_proj": 3},
        },
    ),
    "rslora with patterns": ({}, {"target_modules": LINEAR, "use_rslora": True, "rank_pattern": {"v_proj": 6}}),
    "modules_to_save": ({}, {"target_modules": LINEAR, "modules_to_save": ["lm_head", "norm"]}),
    "dora": ({}, {"target_modules": LINEAR, "use_dora": True}),
    "dora with patterns": ({}, {"target_modules": LINEAR, "use_dora": True, "rank_pattern": {"q_proj": 2}}),
    "bias all": ({"attention_bias": True}, {"target_modules": LINEAR, "bias": "all"}),
    "bias lora_only": ({"attention_bias": True}, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "lora_bias": ({"attention_bias": True}, {"target_modules": ["q_proj", "o_proj"], "lora_bias": True}),
    "embedding": ({}, {"target_modules": [*LINEAR, "embed_tokens"]}),
    "head": ({}, {"target_modules": [*LINEAR, "lm_head"]}),
    "saved in 16 bits": ({}, {"target_modules": LINEAR, "modules_to_save": ["lm_head"], "half": True}),
}
TIED = {
    "embedding, tied": {"target_modules": [*LINEAR, "embed_tokens"]},
    "head, tied": {"target_modules": ["q_proj", "lm_head"]},
    "saved head, tied": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embedding, tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both saved, tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


def llama(folder, **options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))  # biases begin as zeros, norms as ones
    model.save_pretrained(folder)
    return folder


def adapt(base, folder, **options):
    """A random adapter saved to `folder`; the live model."""
    half = options.pop("half", False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **options}, task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn_like(parameter) + parameter * ("magnitude" in name))
    adapted.save_pretrained(folder)
    if half:
        held = {k: v.to(torch.bfloat16) for k, v in load_file(folder / "adapter_model.safetensors").items()}
        save_file(held, folder / "adapter_model.safetensors")
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    return adapted.eval()


def merged(base, adapters, to, target=None):
    to.mkdir()
    merge_adapters(base, adapters, to, Watch(), target or Target())
    return to


def held(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def check_equal(found, expected):
    for name, tensor in found.items():
        error = (tensor - expected[name]).norm() / expected[name].norm().clamp(min=1e-9)
        assert error < 1e-6, (name, float(error))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_equals_pefts_own_merge_and_twice_is_the_same(kind, tmp_path):
    model, adapter = KINDS[kind]
    base = llama(tmp_path / "base", **model)
    live = adapt(base, tmp_path / "adapter", **adapter)
    with torch.no_grad():
        logits = live(IDS).logits
    expected = live.merge_and_unload().state_dict()
    if kind == "bias lora_only" and not any("bias" in name for name in held(tmp_path / "adapter")):
        with pytest.raises(InputError, match="does not hold"):  # PEFT 0.20 does not save them
            merged(base, [tmp_path / "adapter"], tmp_path / "out")
        return
    out = merged(base, [tmp_path / "adapter"], tmp_path / "out")
    assert held(out).keys() == held(base).keys()
    check_equal(held(out), expected)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, logits, atol=1e-4)
    again = merged(base, [tmp_path / "adapter"], tmp_path / "again")
    for file in out.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()


@pytest.mark.parametrize("kind", ["bias all", "bias lora_only"])
def test_biases_that_were_trained_but_not_saved_are_missed(kind, tmp_path):
    model, adapter = KINDS[kind]
    base = llama(tmp_path / "base", **model)
    adapt(base, tmp_path / "adapter", **adapter)
    factors = {name: t for name, t in held(tmp_path / "adapter").items() if "bias" not in name}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=rf"bias: {kind[5:]}\) but does not hold model.layers.0.self_attn"):
        merged(base, [tmp_path / "adapter"], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", TIED)
def test_tied_weights_are_untied_where_the_adapter_makes_them_differ(kind, tmp_path):
    """PEFT's merge writes an embedding's delta into the head as well; the live adapter is what was trained."""
    base = llama(tmp_path / "base", tie_word_embeddings=True)
    live = adapt(base, tmp_path / "adapter", **TIED[kind])
    out = merged(base, [tmp_path / "adapter"], tmp_path / "out")
    assert held(out).keys() == {*held(base), "lm_head.weight"}
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, live(IDS).logits, atol=1e-4)


def test_fan_in_fan_out(tmp_path):
    """GPT-2 stores its weights the other way round, square ones among them."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    for number, dora in enumerate((False, True)):
        folder = tmp_path / f"adapter{number}"
        targets = ["c_attn", "c_proj", "c_fc"]
        live = adapt(tmp_path / "base", folder, target_modules=targets, fan_in_fan_out=True, use_dora=dora)
        expected = live.merge_and_unload().state_dict()
        check_equal(held(merged(tmp_path / "base", [folder], tmp_path / f"out{number}")), expected)


def test_a_stack_merges_to_one_model_and_a_scale_scales_the_delta(tmp_path):
    base = llama(tmp_path / "base")
    adapt(base, tmp_path / "one", target_modules=LINEAR)
    adapt(base, tmp_path / "two", target_modules=["q_proj", "k_proj"], r=2, use_rslora=True)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "one", "one")
    model.load_adapter(tmp_path / "two", "two")
    model.base_model.set_adapter(["one", "two"])
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("two", 0.7)
    expected = model.merge_and_unload().state_dict()
    check_equal(held(merged(base, [tmp_path / "one", (tmp_path / "two", 0.7)], tmp_path / "out")), expected)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_what_has_no_scale_or_no_place_in_a_stack_is_refused(options, tmp_path):
    base = llama(tmp_path / "base")
    adapt(base, tmp_path / "adapter", target_modules=LINEAR, **options)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="cannot be scaled"):
        merge_adapters(base, [(tmp_path / "adapter", 0.5)], tmp_path / "out", Watch())
    with pytest.raises(InputError, match="part of a stack"):
        merge_adapters(base, [tmp_path / "adapter"] * 2, tmp_path / "out", Watch())
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda held: held.pop(next(k for k in held if "magnitude" in k)), "without magnitudes"),
        (lambda held: held.update({"base_model.model.model.embed_tokens.weight": torch.zeros(60, 32)}), "60 x 32"),
        (lambda held: held.update({"base_model.model.model.nothing.weight": torch.zeros(2)}), "model lacks"),
        (lambda held: held.update({"base_model.model.lm_head.token_adapter.delta": torch.zeros(2)}), "token_adapter"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(change, says, tmp_path):
    base = llama(tmp_path / "base")
    adapt(base, tmp_path / "adapter", target_modules=LINEAR, use_dora=True)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "out").mkdir()
    with pytest.raises(QcftError, match=says):
        merge_adapters(base, [tmp_path / "adapter"], tmp_path / "out", Watch())
    assert not list((tmp_path / "out").iterdir())


def test_another_dtype_is_written_to_the_config(tmp_path):
    base = llama(tmp_path / "base")
    adapt(base, tmp_path / "adapter", target_modules=LINEAR)
    out = merged(base, [tmp_path / "adapter"], tmp_path / "out", Target(dtype="bfloat16"))
    assert {tensor.dtype for tensor in held(out).values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def test_a_dequantised_base_is_the_4_bit_one_and_gives_what_was_trained(tiny_model, tmp_path):
    from peft.tuners.lora import LoraLayer

    live = get_peft_model(
        load_model(tiny_model, Model(name="tiny")), LoraConfig(r=4, target_modules=["q_proj", "gate_proj"])
    ).eval()
    torch.manual_seed(1)
    for name, parameter in live.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    live.save_pretrained(tmp_path / "adapter")
    out = merged(tiny_model, [tmp_path / "adapter"], tmp_path / "out", Target(dequantised=True))
    assert json.loads((out / MARK).read_text())["merged_onto"] == "dequantised"
    import bitsandbytes as bnb

    found, seen = held(out), 0
    for name, module in live.base_model.model.named_modules():
        layer = module.base_layer if isinstance(module, LoraLayer) else module
        if isinstance(layer, bnb.nn.Linear4bit) and ".base_layer" not in name:
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            if isinstance(module, LoraLayer):
                weight = (weight.float() + module.get_delta_weight("default").float()).to(torch.bfloat16)
                assert torch.allclose(found[f"{name}.weight"].float(), weight.float(), rtol=0.01, atol=1e-6)
            else:
                assert torch.equal(found[f"{name}.weight"], weight)
            seen += 1
    assert seen == 21


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from(["bfloat16", "float32", "int64", "uint8", "float64"]), max_size=6), st.integers(0, 99))
def test_a_file_written_tensor_by_tensor_is_read_by_the_formats_own_library(tmp_path_factory, dtypes, seed):
    rng = random.Random(seed)
    tensors = {}
    for i, dtype in enumerate(dtypes):
        shape = [rng.randint(0, 5) for _ in range(rng.randint(0, 3))]
        tensors[f"t{i}"] = (torch.rand(shape) * 100).to(getattr(torch, dtype))
    names = {"bfloat16": "BF16", "float32": "F32", "int64": "I64", "uint8": "U8", "float64": "F64"}
    planned = [PlannedTensor(f"t{i}", names[d], tuple(tensors[f"t{i}"].shape)) for i, d in enumerate(dtypes)]
    file = tmp_path_factory.mktemp("st") / "x.safetensors"
    write_tensors(file, planned, lambda t, out: write_bytes(tensors[t.name], out))
    assert is_whole_safetensors(file)
    read, stored = load_file(file), stored_tensors(file)
    assert read.keys() == stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor)
        assert torch.equal(stored[name].read(), tensor)
        assert stored[name].begin % tensor.element_size() == 0


def test_rank_and_alpha_of_each_module_are_read(tmp_path):
    base = llama(tmp_path / "base")
    adapt(base, tmp_path / "adapter", **KINDS["patterns"][1])
    changes = read_adapter(tmp_path / "adapter").changes
    assert changes["model.layers.0.self_attn.q_proj.weight"].scale == 8 / 2
    assert changes["model.layers.1.self_attn.v_proj.weight"].scale == 8 / 7
    assert changes["model.layers.0.mlp.down_proj.weight"].scale == 40 / 4
