"""Before a model is trained: its loss packed, padded and alone is its own, and every adapter learns."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import qcft as package
from qcft import QcftError
from qcft.events import Note, Watch
from qcft.models.adapters import add_lora
from qcft.models.load import load_model, load_tokenizer
from qcft.recipe import Lora, Model, recipe_from
from qcft.training.agreement import agreement, check_live, compare

from .helpers.families import make_family
from .helpers.tiny import make_recipe

SCALED = """
from transformers import LlamaForCausalLM


class ScaledForCausalLM(LlamaForCausalLM):
    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = output.logits / 4
        return output
"""


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def loaded(tiny_model):
    named = Model(name=str(tiny_model))
    return load_model(tiny_model, named), load_tokenizer(tiny_model, named)


def test_a_model_that_agrees_is_unmodified(loaded):
    model, tokenizer = loaded
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        before = model.train()(input_ids=ids).logits
    found = compare(model, tokenizer)
    assert (found.fused, found.padded, found.packed, found.why) == (True, True, True, "")
    with torch.no_grad():
        assert torch.equal(model.train()(input_ids=ids).logits, before)
    assert "forward" not in model.__dict__
    assert model.config._attn_implementation == "sdpa"
    assert not model.base_model._forward_hooks


def test_agreement_is_computed_once(loaded, monkeypatch):
    model, tokenizer = loaded
    first = agreement(model, tokenizer, Watch())
    monkeypatch.setattr("qcft.training.agreement.compare", None)
    assert agreement(model, tokenizer, Watch()) == first


@pytest.mark.parametrize("family", ["gpt_oss", "mpt", "opt", "bloom", "qwen3_5"])
def test_families_whose_rows_see_each_other_are_found(family, tmp_path):
    named = Model(name=str(make_family(family, tmp_path / family)))
    folder = tmp_path / family
    found = compare(load_model(folder, named), load_tokenizer(folder, named))
    assert found.fused
    assert found.padded
    assert not found.packed
    assert "see each other" in found.why or "cannot be packed" in found.why


@pytest.fixture
def scaled(tiny_model, tmp_path):
    """A model whose own code divides its logits, as some on the hub do."""
    folder = shutil.copytree(tiny_model, tmp_path / "scaled")
    (folder / "modeling_scaled.py").write_text(SCALED)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_scaled.ScaledForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_scaled_logits_are_trained_as_the_model_scales_them(scaled, tiny_model, color_data, tmp_path):
    """Its loss is that of a model whose head is scaled in its weights, which TRL's head gets right."""
    raw = make_recipe(scaled, color_data)
    raw["model"]["trust_remote_code"] = True
    raw["phases"], raw["answers"] = raw["phases"][:1], {"prompts": 0}
    notes = []
    watch = lambda event: notes.append(event.text) if isinstance(event, Note) else None  # noqa: E731
    run = package.run(recipe_from(raw), runs=tmp_path / "runs", listener=watch)
    assert any("the loss is taken from the model's own logits" in note for note in notes)
    plain = shutil.copytree(tiny_model, tmp_path / "plain")
    model = LlamaForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() / 4)
    model.save_pretrained(plain)
    raw["model"] = {"name": str(plain)}
    other = package.run(recipe_from(raw), runs=tmp_path / "other")
    assert run.stages["phase1"].metrics["loss"] == pytest.approx(other.stages["phase1"].metrics["loss"], rel=1e-3)


def test_every_adapter_learns_and_one_that_does_not_is_named(loaded, monkeypatch):
    model, tokenizer = loaded
    modules = ["model.layers.1.self_attn.q_proj", "model.layers.2.mlp.up_proj"]
    adapted = add_lora(model, modules, Lora(r=2))
    check_live(adapted, modules, tokenizer, Watch())
    assert all(weight.grad is None for weight in adapted.parameters())
    shutil.rmtree(package.cache.cache_folder() / "live")
    adapted.get_base_model().get_submodule(modules[1]).scaling["default"] = 0.0
    with pytest.raises(QcftError, match=r"1 of 2 adapters get no gradient, such as that on model\.layers\.2"):
        check_live(adapted, modules, tokenizer, Watch())


def test_computing_agreement_changes_no_training(raw_recipe, tmp_path, cache):
    """A training right after the comparison gives the same adapter as one that reads the cached result."""
    raw_recipe["lora"]["dropout"] = 0.1
    adapters = []
    for name in ("compared", "cached"):
        run = package.run(recipe_from(raw_recipe), runs=tmp_path / name)
        adapters.append(load_file(run.stages["phase2"].folder / "adapter" / "adapter_model.safetensors"))
    assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])


@pytest.mark.parametrize("quantize", ["nf4", "none"])
@pytest.mark.parametrize(
    "gone", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_weights_that_would_be_random_are_refused_by_name(tiny_model, raw_recipe, tmp_path, gone, quantize):
    folder = shutil.copytree(tiny_model, tmp_path / "holed")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != gone}, folder / "model.safetensors", {"format": "pt"})
    raw_recipe["model"] = {"name": str(folder), "quantize": quantize}
    with pytest.raises(package.InputError, match=f"lacks 1 weights, such as {gone}"):
        package.run(recipe_from(raw_recipe), runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    with pytest.raises(QcftError, match=f"lacks 1 weights, such as {gone}"):
        load_model(folder, Model(name=str(folder)), quantize)


def test_a_model_under_other_names_altogether_is_refused(tiny_model, raw_recipe, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "other")
    weights = {f"module.{k}": v for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    raw_recipe["model"] = {"name": str(folder), "quantize": "none"}
    with pytest.raises(package.InputError, match="which would be random numbers"):
        package.run(recipe_from(raw_recipe), runs=tmp_path / "runs")
